"""The first bad layer and the bad rows, for faults planted in models of every kind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from keras import layers, ops

import research
from research.debugging.blame import blame
from research.debugging.instrument import instrumented_step

RNG = np.random.default_rng(0)
ROW = 5
X = np.abs(RNG.normal(size=(8, 6))).astype("float32") + 0.1


@keras.saving.register_keras_serializable()
class Log(layers.Layer):
    """The logarithm: NaN for a negative number, and an infinite derivative at 0."""

    def call(self, inputs: Any) -> Any:
        return ops.log(inputs)


class Root(layers.Layer):
    """The square root, whose derivative at 0 is infinite though its value is finite."""

    def call(self, inputs: Any) -> Any:
        return ops.sqrt(inputs)


def stack(*middle: layers.Layer) -> list[layers.Layer]:
    return [layers.Dense(5, name="first"), *middle, layers.Dense(4, name="last")]


def sequential(*middle: layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((6,)), *middle, *stack()], name="model")


def functional(*middle: layers.Layer) -> keras.Model:
    x = h = keras.Input((6,))
    for layer in middle:
        h = layer(h)
    skip = layers.Dense(5, name="skip")(x)
    return keras.Model(x, layers.Dense(4, name="last")(layers.Add()([layers.Dense(5, name="first")(h), skip])), name="model")


def nested(*middle: layers.Layer) -> keras.Model:
    inner = keras.Sequential([keras.Input((6,)), *middle, layers.Dense(5, name="first")], name="inner")
    return keras.Sequential([keras.Input((6,)), inner, layers.BatchNormalization(), layers.Dense(4, name="last")], name="model")


def subclassed(*middle: layers.Layer) -> keras.Model:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__(name="model")
            self.middle, self.rest = list(middle), stack(layers.Dropout(0.2))

        def call(self, x: Any, training: bool = False) -> Any:
            for layer in [*self.middle, *self.rest]:
                x = layer(x, training=training) if isinstance(layer, layers.Dropout) else layer(x)
            return x

    net = Net()
    net(X)
    return net


def recurrent(*middle: layers.Layer) -> keras.Model:
    rows = [keras.Input((6,)), *middle, layers.Reshape((3, 2)), layers.LSTM(5, name="first", return_sequences=True)]
    return keras.Sequential([*rows, layers.GRU(3), layers.Dense(4, name="last")], name="model")


MODELS = {f.__name__: f for f in (sequential, functional, nested, subclassed, recurrent)}
Y = RNG.normal(size=(8, 4)).astype("float32")


def supervised(model: keras.Model) -> research.Learner:
    return research.supervised(model, loss="mse", optimizer="adam", metrics=["mae"], example=research.Batch(X, Y))


def poisoned_row(build: Callable[..., keras.Model]) -> tuple[research.Learner, Any, Any, str, str, list[int]]:
    learner, x = supervised(build(Log(name="log"))), X.copy()
    x[ROW, 2] = -1.0
    return learner, learner.init(), research.Batch(x, Y), "log", "output", [ROW]


def infinite_gradient(build: Callable[..., keras.Model]) -> tuple[research.Learner, Any, Any, str, str, list[int]]:
    gate = layers.Dense(6, use_bias=False, kernel_initializer="identity", name="gate")
    learner, x = supervised(build(gate, Root(name="root"))), X.copy()
    x[ROW] = 0.0
    return learner, learner.init(), research.Batch(x, Y), "root", "gradient", [ROW]


def poisoned_weights(build: Callable[..., keras.Model]) -> tuple[research.Learner, Any, Any, str, str, list[int]]:
    learner = supervised(build(layers.Dense(6, name="weighted")))
    state = learner.init()
    position = next(i for i, name in enumerate(learner.names.trainable) if "weighted/kernel" in name)
    state.trainable[position] = state.trainable[position].at[0, 0].set(jnp.inf)
    return learner, state, research.Batch(X, Y), "weighted", "output", list(range(8))


def overflow(build: Callable[..., keras.Model]) -> tuple[research.Learner, Any, Any, str, str, list[int]]:
    half = layers.Dense(6, name="half", dtype="float16", kernel_initializer="ones")
    learner, x = supervised(build(half, layers.Activation("linear", dtype="float32"))), X.copy()
    x[ROW] = 30000.0
    return learner, learner.init(), research.Batch(x, Y), "half", "output", [ROW]


FAULTS = (poisoned_row, infinite_gradient, poisoned_weights, overflow)
CASES = {f"{fault.__name__} {model}": (fault, build) for fault in FAULTS for model, build in MODELS.items()}


@pytest.mark.sample(6)
@pytest.mark.promotes
@pytest.mark.parametrize("name", slow_after_first(CASES))
def test_the_layer_and_the_rows_of_a_planted_fault_are_found(name: str) -> None:
    fault, build = CASES[name]
    learner, state, batch, layer, place, rows = fault(build)
    found = blame(learner, state, batch)
    assert found.layer is not None
    assert (found.layer.split("/")[-1], found.place, found.rows) == (layer, place, rows), found.describe()


@pytest.mark.slow
def test_of_several_models_in_one_learner_the_layer_is_found_that_fails() -> None:
    first, second = (
        keras.Sequential([keras.Input((6,)), *stack(Log(name=f"{name}_log"))], name=name) for name in ("first", "second")
    )

    def loss(batch: Any, training: bool) -> Any:
        return ops.mean((first(batch.x) - batch.y) ** 2), {}

    def other(batch: Any, training: bool) -> Any:
        return ops.mean((second(batch.x) - ops.stop_gradient(first(batch.x))) ** 2), {}

    parts = {"first": (loss, first), "second": (other, second)}
    example = research.Batch(X, Y)
    joint = research.joint({k: research.learner(f, m, "sgd", example=example) for k, (f, m) in parts.items()})
    state = joint.init()
    feature = jnp.arange(6)[:, None] == 1  # which only the second model makes something negative of
    state["first"].trainable[0] = jnp.where(feature, 0.0, jnp.ones((6, 5)))
    state["second"].trainable[0] = jnp.where(feature, -100.0, jnp.ones((6, 5)))
    x = X.copy()
    x[:, 1] = np.arange(8) == ROW
    found = blame(joint, state, research.Batch(x, Y))
    assert (str(found.layer).split("/")[-1], found.place, found.rows) == ("second_log", "output", [ROW]), found.describe()


@pytest.mark.slow
@pytest.mark.promotes
def test_a_recorded_step_is_the_step_and_its_gradients_are_those_of_jax() -> None:
    keras.utils.set_random_seed(0)
    model = recurrent()
    learner, batch = supervised(model), research.Batch(X, Y)
    state = learner.init()
    step = instrumented_step(learner, state, batch)
    after, logs = jax.jit(learner.train)(state, batch)
    for a, b in zip(jax.tree.leaves((after, logs)), jax.tree.leaves((step.state, step.logs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    objective, _ = research.keras_objective(model, loss="mse", metrics=["mae"])
    expected = research.gradient(objective)(state, batch)[1].values
    for variable, gradient in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(step.gradients[variable.path], gradient, rtol=1e-4, atol=1e-6)
    assert blame(learner, state, batch).place is None

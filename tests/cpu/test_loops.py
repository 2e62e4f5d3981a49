"""Steps that are fused in a loop, and steps whose batch is gathered on the device, give the bits of single jitted steps."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from jax import lax
from keras import layers

import research
from research.cpu.loops import runs_well_in_loop, without_hoisting
from research.training.programs import train_program

ROWS, STEPS = 32, 6
RNG = np.random.default_rng(0)


class Function(layers.Layer):
    """A layer that computes a function written in JAX."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)


def vectors(*functions: Any, width: int = 50) -> list[Any]:
    return [keras.Input((width,)), layers.Dense(width), *map(Function, functions), layers.Dense(1)]


def sequences(*stack: Any) -> list[Any]:
    return [keras.Input((20, 5)), *stack, layers.Flatten(), layers.Dense(1)]


def tokens(*stack: Any) -> list[Any]:
    return [keras.Input((20,), dtype="int32"), layers.Embedding(20, 5), *stack, layers.Dense(1)]


def images(*stack: Any) -> list[Any]:
    return [keras.Input((8, 8, 3)), *stack, layers.Flatten(), layers.Dense(1)]


def rotate(x: Any) -> Any:
    angles = jnp.arange(20.0)[:, None]
    return x * jnp.cos(angles) + jnp.roll(x, 1, -1) * jnp.sin(angles)


def recurrence(x: Any) -> Any:
    return lax.associative_scan(lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jax.nn.sigmoid(x), x), axis=1)[1]


def fourier(x: Any) -> Any:
    return jnp.concatenate([jnp.sin(3 * x), jnp.cos(3 * x)], -1)


# Where XLA rounded a step otherwise before: next to the slice of a stacked batch or the gather of a resident one, to random bits
# made in another program, or for what it could compute before the loop.
MODELS: dict[str, Callable[[], list[Any]]] = {
    "sines and cosines": lambda: vectors(fourier),
    "rotary positions": lambda: sequences(layers.Dense(5), Function(rotate)),
    "dropout after a norm": lambda: [
        keras.Input((50,)),
        layers.LayerNormalization(),
        layers.Dropout(0.3),
        layers.Dense(8, "relu"),
        layers.Dense(1),
    ],
    "rotary positions of the input": lambda: sequences(Function(rotate)),
    "arc tangents": lambda: vectors(lambda x: jnp.arctan2(x, 1 + x[:, ::-1])),
    "dropout after an embedding": lambda: tokens(layers.Dropout(0.3), layers.GlobalAveragePooling1D()),
    "noise after an embedding": lambda: tokens(layers.GaussianNoise(0.3), layers.GlobalAveragePooling1D()),
    "noise on the input": lambda: [keras.Input((50,)), layers.GaussianNoise(0.3), layers.Dense(8, "tanh"), layers.Dense(1)],
    "dropout of channels": lambda: tokens(layers.SpatialDropout1D(0.3), layers.Flatten()),
    "attention": lambda: [
        inputs := keras.Input((20, 5)),
        layers.Dense(1)(layers.Flatten()(layers.MultiHeadAttention(2, 3, dropout=0.1)(inputs, inputs, use_causal_mask=True))),
    ],
    "noise after a convolution": lambda: images(layers.Conv2D(4, 3), layers.GaussianDropout(0.3)),
    "cumulative sums": lambda: vectors(lambda x: jnp.cumsum(x * x, -1) / jnp.arange(1.0, 51.0)),
    "cumulative log-sums": lambda: vectors(lambda x: lax.cumlogsumexp(x, 1)),
    "an associative scan": lambda: vectors(recurrence),
    "a reduced window": lambda: sequences(
        layers.Dense(5), Function(lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 1, 1), "SAME"))
    ),
    "a recurrence with dropout": lambda: sequences(layers.GRU(4, dropout=0.2, recurrent_dropout=0.2, return_sequences=True)),
}


def build(name: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    first, *rest = MODELS[name]()
    if len(rest) == 1 and not isinstance(rest[0], keras.Layer):
        return keras.Model(first, rest[0])
    return keras.Sequential([first, *rest])


def batches(model: keras.Model) -> research.Batch:
    shape = ROWS * STEPS, *model.input_shape[1:]
    is_tokens = "int" in model.inputs[0].dtype
    x = RNG.integers(0, 20, shape).astype("int32") if is_tokens else RNG.normal(size=shape).astype("float32")
    return research.Batch(x, RNG.normal(size=(ROWS * STEPS, 1)).astype("float32"))


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.sample(6)
@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after_first(MODELS))
def test_fused_steps_and_gathered_batches_give_the_bits_of_single_steps(name: str) -> None:
    model = build(name)
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, STEPS)  # depends on a counter, as a loop has one
    learner = research.supervised(model, loss="mse", optimizer=keras.optimizers.AdamW(schedule), metrics=["mae"])
    data = batches(model)
    resident = research.from_arrays(data.x, data.y, batch_size=ROWS, shuffle=False)
    host = research.from_batches([resident.batch(step) for step in range(STEPS)], steps_per_epoch=STEPS)
    step, expected = jax.jit(learner.train), learner.init()
    for i in range(STEPS):
        expected, logs = step(expected, resident.batch(i))
    state, _ = research.train(learner, resident, epochs=1, hooks=[(1, lambda step, state, logs: None)])
    assert_same_bits(state, expected)
    for source in (resident, host):
        capacity = train_program(learner, source, expected).capacity
        assert capacity == (1 if "convolution" in name else STEPS)
        state, all_logs = research.train(learner, source, epochs=1)
        assert_same_bits(state, expected)
        assert all_logs == {key: float(value) for key, value in logs.items()}


@pytest.mark.slow
def test_evaluation_of_gathered_batches_gives_the_bits_of_batches_from_the_host() -> None:
    for name in ("sines and cosines", "rotary positions of the input"):
        model = build(name)
        learner, data = research.supervised(model, loss="mse", metrics=["mae"]), batches(model)
        resident = research.from_arrays(data.x, data.y, batch_size=ROWS, shuffle=False)
        state, evaluate = learner.init(), jax.jit(learner.evaluate)
        after = state
        for i in range(STEPS):
            after, logs = evaluate(after, resident.batch(i))
        assert research.evaluate(learner, resident, state) == {key: float(value) for key, value in logs.items()}


@pytest.mark.slow
def test_fit_fuses_such_steps_to_the_bits_of_keras_own_fit() -> None:
    def weights(fit: Any) -> list[np.ndarray]:
        model = build("rotary positions")
        model.compile("adam", "mse", jit_compile=True)
        fit(model, data.x, data.y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0)
        return [np.array(v) for v in model.variables]

    data = batches(build("rotary positions"))
    assert_same_bits(weights(research.fit), weights(keras.Model.fit))


def times(state: Any, batch: Any) -> Any:
    return state * batch


def shifted(state: Any, batch: Any) -> Any:
    return state + batch * jnp.sin(jnp.arange(3.0))


def shifted_inside(state: Any, batch: Any) -> Any:
    return lax.fori_loop(0, 3, lambda i, s: jax.jit(lambda s: s * jnp.exp(-jnp.arange(3.0)))(s), state) + batch


def masked(state: Any, batch: Any) -> Any:
    return jnp.where(jnp.arange(3) > 1, state, batch)


def drawn(state: Any, batch: Any) -> Any:
    return state + batch * jax.random.uniform(jax.random.key(batch[0].astype(int)), (3,))


@pytest.mark.parametrize(("step", "wrapped"), [(times, False), (shifted, True), (shifted_inside, True), (masked, True)])
def test_a_step_with_a_computation_that_XLA_would_hoist_becomes_a_branch(step: Any, wrapped: bool) -> None:
    """Then XLA's program for a loop computes nothing of the step before the loop."""
    args = jnp.ones(3), jnp.arange(3.0)
    assert ("cond[" in str(jax.make_jaxpr(without_hoisting(step))(*args))) == wrapped
    np.testing.assert_array_equal(jax.jit(without_hoisting(step))(*args), jax.jit(step)(*args))
    assert runs_well_in_loop(jax.jit(without_hoisting(step)).trace(*args))

    def loop(state: Any, batch: Any, count: Any) -> Any:
        return lax.fori_loop(0, count, lambda i, state: without_hoisting(step)(state, batch), state)

    program = jax.jit(loop).lower(*args, 2).compile().as_text()
    entry = program[program.index("\nENTRY") :]
    assert not re.search(r"sine|exponential|compare", entry)

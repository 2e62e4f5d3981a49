"""optax transformations that keep the weights in their state, or ask for the objective, train as in optax' own loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import slow_after_first
from keras import layers
from optax import contrib

import research
from research.debugging import check_learner
from research.transforms import init_sharded

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6)).astype("float32")
DATA = research.from_arrays(X, X[:, :1] * X[:, 1:2], batch_size=16)
STEPS = 6
pytestmark = pytest.mark.promotes  # optax mixes dtypes
Transformation = optax.GradientTransformation


def adversary() -> Transformation:
    return optax.chain(contrib.normalize(), optax.sgd(0.05))


KEEP_WEIGHTS: dict[str, Callable[[], Transformation]] = {
    "prodigy": lambda: contrib.prodigy(1.0),
    "mechanize": lambda: contrib.mechanize(optax.sgd(1e-2)),
    "dog": lambda: contrib.dog(1.0),
    "dowg": lambda: contrib.dowg(1.0),
    "cocob": lambda: contrib.cocob(),
    "schedule-free": lambda: contrib.schedule_free_sgd(1e-2),
    "sam": lambda: contrib.sam(optax.sgd(1e-2), adversary()),
    "within another": lambda: optax.chain(optax.clip_by_global_norm(1.0), contrib.prodigy(1.0)),
}
# Each with the arguments that it takes: in optax' own loop they are the user's to pass.
ASK_FOR_OBJECTIVE: dict[str, tuple[Callable[[], Transformation], set[str]]] = {
    "backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)),
        {"value", "grad", "value_fn"},
    ),
    "zoom": (lambda: optax.chain(optax.adam(1.0), optax.scale_by_zoom_linesearch(10)), {"value", "grad", "value_fn"}),
    "lbfgs": (lambda: optax.lbfgs(), {"value", "grad", "value_fn"}),
    "lbfgs without a line search": (lambda: optax.lbfgs(0.05, linesearch=None), set()),
    "if finite": (lambda: optax.apply_if_finite(optax.lbfgs(memory_size=2), 3), {"value", "grad", "value_fn"}),
    "sam, opaque": (lambda: contrib.sam(optax.sgd(1e-2), adversary(), opaque_mode=True), {"grad_fn"}),
    "sam within another": (
        lambda: optax.chain(optax.clip(0.5), contrib.sam(optax.sgd(1e-2), adversary(), sync_period=3, opaque_mode=True)),
        {"grad_fn"},
    ),
    "sophia": (lambda: contrib.sophia(1e-2, update_interval=2), {"obj_fn"}),
    "polyak": (lambda: optax.polyak_sgd(), {"value"}),
    "momo": (lambda: contrib.momo(1.0), {"value"}),
    "plateau": (lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(patience=1)), {"value"}),
}


def network(regularizer: str | None = "l2") -> keras.Model:
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(8, "tanh", kernel_regularizer=regularizer), layers.Dropout(0.2), layers.Dense(1)]
    return keras.Sequential([keras.Input((6,)), *stack])


def optax_loop(model: keras.Model, transformation: Transformation, arguments: set[str]) -> Any:
    """Returns the weights after `STEPS` steps of a loop as optax' documentation writes it."""
    objective, metrics = research.keras_objective(model, loss="mse")
    state = research.supervised(model, loss="mse").init()

    @jax.jit
    def step(weights: Any, seeds: Any, slots: Any, batch: Any) -> Any:
        def loss(weights: Any) -> Any:
            return objective(research.State(weights, seeds, [], metrics.init()), batch, training=True)

        def value_fn(weights: Any) -> Any:
            return loss(weights)[0]

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        possible = {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        possible["grad_fn"] = jax.grad(lambda weights, _: value_fn(weights))
        updates, slots = transformation.update(grads, slots, weights, **{name: possible[name] for name in arguments})
        return optax.apply_updates(weights, updates), aux.non_trainable, slots

    weights, seeds, slots = state.trainable, state.non_trainable, transformation.init(state.trainable)
    for i in range(STEPS):
        weights, seeds, slots = step(weights, seeds, slots, DATA.batch(i))
    return weights


def assert_trains_as_in_optax_loop(transformation: Transformation, arguments: set[str]) -> None:
    learner = research.supervised(network(), loss="mse", optimizer=transformation)
    check_learner(learner, learner.init(), DATA.batch(0))
    state, _ = research.train(learner, DATA, steps=STEPS)
    for actual, expected in zip(state.trainable, optax_loop(network(), transformation, arguments), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    moved = [not np.array_equal(a, b) for a, b in zip(state.trainable, learner.init().trainable, strict=True)]
    assert all(moved)


@pytest.mark.sample(6)
@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after_first(KEEP_WEIGHTS))
def test_a_transformation_that_keeps_the_weights_in_its_state_trains(name: str) -> None:
    assert_trains_as_in_optax_loop(KEEP_WEIGHTS[name](), set())


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after_first(ASK_FOR_OBJECTIVE))
def test_a_transformation_gets_the_loss_of_the_same_batch_and_the_same_random_numbers_at_other_weights(name: str) -> None:
    transformation, arguments = ASK_FOR_OBJECTIVE[name]
    assert_trains_as_in_optax_loop(transformation(), arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_two_leaves_of_an_initial_state_share_a_buffer(compiled: bool) -> None:
    def init(weights: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return {"first": weights, "average": weights, "zeros": zeros, "the same": zeros, "key": jax.random.key(0), "count": 3}

    def build() -> research.Learner:
        transformation = optax.GradientTransformation(init, lambda updates, state, params: (updates, state))
        return research.supervised(network(), loss="mse", optimizer=transformation)

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    learner, state = init_sharded(build, device) if compiled else (build(), build().init())
    check_learner(learner, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_a_hook_that_puts_one_array_into_two_leaves_is_an_error_that_names_them() -> None:
    learner = research.supervised(network(), loss="mse", optimizer=optax.sgd(0.1))

    def share(step: int, state: Any, logs: Any) -> Any:
        return state._replace(optimizer={**state.optimizer, "iterations": state.non_trainable[0]})

    learner = learner._replace(names=learner.names._replace(optimizer={**learner.names.optimizer, "iterations": "updates"}))
    with pytest.raises(
        research.InvalidArgument, match="'seed_generator/seed_generator_state' and 'updates' share one buffer; expected an array"
    ):
        research.train(learner, DATA, steps=4, hooks=[(2, share)])


@pytest.mark.slow
def test_a_line_search_runs_in_a_learner_from_a_loss_and_under_accumulated_gradients() -> None:
    def mse(batch: Any, training: bool) -> Any:
        error = keras.ops.mean((model(batch.x, training=training) - batch.y) ** 2)
        return error, {"error": error}

    model = network(regularizer=None)
    learner = research.learner(mse, model, optax.lbfgs(), example=DATA.shapes)
    state, _ = research.train(learner, DATA, steps=STEPS)
    by_hand = optax_loop(network(regularizer=None), optax.lbfgs(), {"value", "grad", "value_fn"})
    for actual, expected in zip(state.trainable, by_hand, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

    plain = keras.Sequential([keras.Input((6,)), layers.Dense(1)])

    def fit(parts: int) -> Any:
        learner = research.supervised(
            plain, loss="mse", optimizer=optax.lbfgs(), gradient_transform=lambda gradient: research.accumulate(gradient, parts)
        )
        return research.train(learner, DATA, steps=3)[0].trainable

    for one, four in zip(fit(1), fit(4), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-5)

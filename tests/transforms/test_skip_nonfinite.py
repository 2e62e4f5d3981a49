"""The law of `skip_nonfinite`: a run with a poisoned batch equals the run without it, bit for bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import CASES, slow_after_first
from keras import layers

import research
from research.distributed import mesh, shard
from research.transforms import accumulate, ema, fuse, joint, skip_nonfinite

X = np.random.default_rng(0).normal(size=(5, 8, 4)).astype("float32")
BATCHES = [research.Batch(x, x[:, :1]) for x in X]
POISONED = 2


def supervised(dtype: str = "float32", **options: Any) -> research.Learner:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    try:
        stack = [layers.Dense(6, kernel_regularizer="l2"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *stack])
    finally:
        keras.config.set_dtype_policy("float32")
    return research.supervised(model, loss="mse", **{"optimizer": "adam", "metrics": ["mae"], **options})


def adversaries() -> research.Learner:
    keras.utils.set_random_seed(0)
    first, second = (keras.Sequential([keras.Input((4,)), layers.Dense(1)], name=name) for name in ("first", "second"))

    def loss(batch: Any, training: bool) -> Any:
        return keras.ops.mean((first(batch.x) - keras.ops.stop_gradient(second(batch.x)) - batch.y) ** 2), {}

    def opposed(batch: Any, training: bool) -> Any:
        return keras.ops.mean((first(batch.x) - second(batch.x)) ** 2), {}

    learners = {
        "first": research.learner(loss, first, "adam", example=BATCHES[0]),
        "second": ema(research.learner(opposed, second, "sgd", example=BATCHES[0]), 0.9),
    }
    return joint(learners)


def poison(batch: research.Batch) -> research.Batch:
    """Returns the batch with a NaN in one row of its first floating-point array."""
    leaves, structure = jax.tree.flatten(batch)
    position = next(i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating))
    leaves[position] = leaves[position].copy()
    leaves[position][1] = np.nan
    return jax.tree.unflatten(structure, leaves)


def assert_law(build: Callable[[], research.Learner], batches: list[Any]) -> None:
    learner = skip_nonfinite(build(), batches[0])
    plain = build()
    step, expected_step = jax.jit(learner.train), jax.jit(plain.train)
    state, expected = learner.init(), plain.init()
    for i, batch in enumerate(batches):
        if i == POISONED:
            spoiled, _ = expected_step(expected, poison(batch))
            assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(spoiled) if jnp.issubdtype(leaf.dtype, jnp.floating))
            state, logs = step(state, poison(batch))
        else:
            state, logs = step(state, batch)
            expected, expected_logs = expected_step(expected, batch)
        assert int(logs.pop("skipped")) == (i >= POISONED)
        assert_equal((state.state, logs, state.logs), (expected, expected_logs, expected_logs))


def assert_equal(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


LEARNERS: dict[str, Callable[[], research.Learner]] = {
    "supervised": supervised,
    "mixed float16": lambda: supervised("mixed_float16"),
    "optax": lambda: supervised(optimizer=optax.chain(optax.clip(1.0), optax.contrib.reduce_on_plateau(), optax.adam(1e-3))),
    "accumulated": lambda: supervised(gradient_transform=lambda gradient: accumulate(gradient, 2)),
    "ema": lambda: ema(supervised(), 0.9),
    "joint": adversaries,
}


@pytest.mark.promotes
@pytest.mark.parametrize("name", slow_after_first(LEARNERS))
def test_a_run_with_a_poisoned_batch_equals_the_run_without_it(name: str) -> None:
    assert_law(LEARNERS[name], BATCHES)


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("name", CASES)
def test_it_does_for_every_model_of_the_grid(name: str) -> None:
    case, rng = CASES[name], np.random.default_rng(0)
    batches = [research.Batch(*case.batch(rng)) for _ in range(4)]

    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        return research.supervised(case.model(), **case.compile_args(), example=batches[0])

    assert_law(build, batches)


@pytest.mark.slow
def test_fused_steps_and_steps_on_a_mesh_skip_the_same() -> None:
    batches = [poison(batch) if i == POISONED else batch for i, batch in enumerate(BATCHES)]
    learner = skip_nonfinite(supervised(optimizer="sgd"), BATCHES[0])
    state, step, all_logs = learner.init(), jax.jit(learner.train), []
    for batch in batches:
        state, logs = step(state, batch)
        all_logs.append(logs)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    fused, fused_logs = jax.jit(fuse(learner.train))(learner.init(), stacked, len(batches))
    assert_equal((state, jax.tree.map(lambda *leaves: np.stack(leaves), *all_logs)), (fused, fused_logs))
    sharded = shard(learner, mesh(jax.devices()[:4], data=2, fsdp=2))
    on_mesh, step = sharded.init(), jax.jit(sharded.train)
    for batch in batches:
        on_mesh, logs = step(on_mesh, batch)
    assert int(logs["skipped"]) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, on_mesh)


def test_after_its_limit_the_state_stays_that_before_the_bad_step() -> None:
    learner = skip_nonfinite(supervised(), BATCHES[0], limit=1)
    state, step = learner.init(), jax.jit(learner.train)
    for batch in [BATCHES[0], poison(BATCHES[1]), BATCHES[2]]:
        state, logs = step(state, batch)
    for batch in [poison(BATCHES[3]), BATCHES[4], poison(BATCHES[0])]:
        after, logs = step(state, batch)
        assert_equal(after.state, state.state)
        assert int(logs["skipped"]) == 2
        state = learner.reset(after)
        assert_equal(state.state, after.state)


def test_a_number_that_is_infinite_already_is_no_reason_to_skip() -> None:
    def train(state: Any, batch: Any) -> Any:
        return {"best": state["best"], "sum": state["sum"] + batch}, {"sum": state["sum"] + batch}

    def init() -> dict[str, Any]:
        return {"best": jnp.full((), jnp.inf), "sum": jnp.zeros(())}

    names = {"best": "best", "sum": "sum"}
    learner = research.Learner(init, lambda state: state, train, train, lambda state, batch: batch, names)
    learner = skip_nonfinite(learner, jnp.zeros(()))
    state = learner.init()
    for value, total, skipped in [(1.0, 1.0, 0), (np.inf, 1.0, 1), (2.0, 3.0, 1)]:
        state, logs = learner.train(state, jnp.asarray(value))
        assert (float(state.state["sum"]), float(logs["sum"]), int(logs["skipped"])) == (total, total, skipped)

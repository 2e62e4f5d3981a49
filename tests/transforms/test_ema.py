"""A moving average of the weights: what it is, where it is used, and that it never touches the trained weights."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import layers

import research
from research.distributed import build_sharded, mesh
from research.transforms import AveragedState, ema, fuse, with_averages

X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
BATCH = research.Batch(X, X[:, :1])


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def supervised(units: int = 6, dtype: str = "float32", **options: Any) -> research.Learner:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(dtype)
    try:
        stack = [layers.Dense(units), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *stack])
    finally:
        keras.config.set_dtype_policy("float32")
    return research.supervised(model, loss="mse", **{"optimizer": "adam", **options})


@pytest.mark.slow
def test_it_is_the_moving_average_from_the_initial_weights_on_and_training_is_unchanged() -> None:
    plain, averaged = supervised(), ema(supervised(), 0.75)
    a, b = plain.init(), averaged.init()
    expected = [np.asarray(w, np.float64) for w in a.trainable]
    for _ in range(3):
        (a, logs), (b, averaged_logs) = jax.jit(plain.train)(a, BATCH), jax.jit(averaged.train)(b, BATCH)
        assert equal((a, logs), (b.state, averaged_logs))
        expected = [0.75 * e + 0.25 * np.asarray(w, np.float64) for e, w in zip(expected, a.trainable, strict=True)]
    for average, value in zip(b.average[0], expected, strict=True):
        np.testing.assert_allclose(average, value, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_it_evaluates_and_predicts_with_the_average_and_leaves_the_trained_weights() -> None:
    plain, averaged = supervised(), ema(supervised(), 0.9)
    state, _ = averaged.train(averaged.init(), BATCH)
    inner = with_averages(state).state
    after, logs = jax.jit(averaged.evaluate)(averaged.reset(state), BATCH)
    _, expected = jax.jit(plain.evaluate)(plain.reset(inner), BATCH)
    assert equal(logs, expected)
    assert not equal(logs, plain.evaluate(plain.reset(state.state), BATCH)[1])
    assert equal((after.state.trainable, after.average), (state.state.trainable, state.average))
    assert equal(averaged.predict(state, BATCH), plain.predict(inner, BATCH))


@pytest.mark.slow
def test_it_counts_updates_and_commutes_with_accumulation() -> None:
    in_parts = {"gradient_transform": lambda gradient: research.accumulate(gradient, 4), "optimizer": "sgd"}
    a, b = ema(supervised(**in_parts), 0.5), supervised(**in_parts)
    (averaged, _), (plain, _) = a.train(a.init(), BATCH), b.train(b.init(), BATCH)
    for average, before, after in zip(averaged.average[0], b.init().trainable, plain.trainable, strict=True):
        np.testing.assert_allclose(average, (np.asarray(before) + np.asarray(after)) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_fused_steps_equal_single_steps() -> None:
    learner = ema(supervised(), 0.9)
    state = learner.init()
    fused, _ = jax.jit(fuse(learner.train))(state, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BATCH), 3)
    for _ in range(3):
        state, _ = jax.jit(learner.train)(state, BATCH)
    assert equal(fused, state)


@pytest.mark.slow
@pytest.mark.promotes
def test_averages_of_half_precision_weights_are_kept_in_float32() -> None:
    learner = ema(supervised(dtype="bfloat16", optimizer="sgd"), 0.999)
    state, _ = learner.train(learner.init(), BATCH)
    assert {average.dtype.name for average in state.average[0]} == {"float32"}
    assert {weight.dtype.name for weight in with_averages(state).state.trainable} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.promotes
def test_it_works_with_optax_and_on_eight_devices_the_average_is_split_like_the_weights() -> None:
    def build() -> research.Learner:
        return ema(supervised(512, optimizer=optax.sgd(0.1)), 0.9)

    single = build()
    sharded, state = build_sharded(build, mesh(fsdp=-1))
    assert state.average[0][0].sharding == state.state.trainable[0].sharding
    assert not state.average[0][0].sharding.is_fully_replicated
    expected, _ = jax.jit(single.train)(single.init(), BATCH)
    state, _ = jax.jit(sharded.train)(state, BATCH)
    for a, b in zip(jax.tree.leaves(state.average), jax.tree.leaves(expected.average), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_names_are_unique_and_no_two_leaves_share_a_buffer() -> None:
    learner = ema(supervised(), 0.9)
    names, state = jax.tree.leaves(learner.names), learner.init()
    assert len(names) == len(set(names))
    assert jax.tree.structure(learner.names) == jax.tree.structure(state)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(buffers) == len(set(buffers))
    trained, _ = jax.jit(learner.train, donate_argnums=0)(state, BATCH)
    assert isinstance(trained, AveragedState)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(research.InvalidArgument, match="expected a number from 0 to less than 1"):
        ema(supervised(), decay)


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_averages_of_a_keras_optimizer_are_the_weights_that_fit_ends_with(scaled: bool) -> None:
    def optimizer() -> keras.Optimizer:
        adam = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9)
        return keras.optimizers.LossScaleOptimizer(adam) if scaled else adam

    def build() -> keras.Model:
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 3)).astype("float32"), rng.normal(size=(16, 1)).astype("float32")
    expected = build()
    expected.compile(optimizer(), "mse")
    expected.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    model, own = build(), optimizer()
    data = research.from_arrays(x, y, batch_size=8, shuffle=False)
    state, _ = research.train(research.supervised(model, loss="mse", optimizer=own), data, epochs=2)
    averaged = research.transforms.with_optimizer_averages(state, own, model)
    for weight, variable in zip(averaged.trainable, expected.trainable_variables, strict=True):
        np.testing.assert_array_equal(weight, variable.value)
    assert any(not np.array_equal(a, b) for a, b in zip(averaged.trainable, state.trainable, strict=True))
    with pytest.raises(research.InvalidArgument, match="construct it with use_ema=True"):
        research.transforms.with_optimizer_averages(state, keras.optimizers.SGD(), model)

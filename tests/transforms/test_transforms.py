"""The laws of transforms: `accumulate`."""

from typing import Any

import jax
import keras
import numpy as np
import pytest
from cases import slow_after_first
from keras import layers

import research
from research.data import Resident
from research.transforms.accumulate import accumulate

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 12, (16, 5)).astype("int32") * (RNG.uniform(size=(16, 5)) < 0.6)


def masked() -> keras.Model:
    embedding = [keras.Input((5,), dtype="int32"), layers.Embedding(12, 4, mask_zero=True)]
    return keras.Sequential([*embedding, layers.SimpleRNN(6, return_sequences=True), layers.Dense(1, kernel_regularizer="l2")])


def activity_regularized() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh", activity_regularizer="l2"), layers.Dense(1)])


def kernel_regularized() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh", kernel_regularizer="l2"), layers.Dense(1)])


def train_step(model: keras.Model, batch: research.Batch, parts: int, **options: Any) -> tuple[Any, Any]:
    """Returns the state and the logs after one step over `parts` micro-batches."""
    objective, metrics = research.keras_objective(model, **{"loss": "mse", "metrics": ["mae"], **options}, example=batch)
    update = research.keras_update(keras.optimizers.SGD(0.1), model.trainable_variables)
    gradient = research.gradient(objective)
    step = research.step(accumulate(gradient, parts) if parts > 1 else gradient, update, metrics, research.num_examples)
    trainable = [np.array(v) for v in model.trainable_variables]
    non_trainable = [np.array(v) for v in model.non_trainable_variables]
    state = research.State(trainable, non_trainable, update.init(trainable), metrics.init())
    return jax.jit(step)(state, batch)


CASES = {
    "activity regularizer": (
        activity_regularized,
        research.Batch(RNG.normal(size=(16, 5)).astype("float32"), RNG.normal(size=(16, 1)).astype("float32")),
        {},
    ),
    "masked": (masked, research.Batch(TOKENS.astype("int32"), RNG.normal(size=(16, 5, 1)).astype("float32")), {}),
    "weighted": (
        kernel_regularized,
        research.Batch(*(RNG.uniform(size=shape).astype("float32") for shape in ((16, 5), (16, 1), (16,)))),
        {"loss": keras.losses.MeanSquaredError("mean_with_sample_weight")},
    ),
}


@pytest.mark.slow
@pytest.mark.promotes
@pytest.mark.parametrize("parts", slow_after_first([2, 4]))
@pytest.mark.parametrize("name", slow_after_first(CASES))
def test_accumulating_micro_batches_equals_the_complete_batch_to_1e6(name: str, parts: int) -> None:
    build, batch, options = CASES[name]
    model = build()
    expected = train_step(model, batch, 1, **options)
    accumulated = train_step(model, batch, parts, **options)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(accumulated), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_micro_batches_with_padding_train_in_the_loop_as_without_the_padding() -> None:
    x = np.repeat(RNG.normal(size=(6, 5)).astype("float32"), 2, 0)  # accumulate deals rows out: each part has one of a pair
    valid = np.arange(12) < 8
    rows = research.Batch(x, x[:, :1], None, valid)

    def train(batch: research.Batch, parts: int) -> Any:
        keras.utils.set_random_seed(0)
        options = {"loss": "mse", "metrics": ["mae"], "optimizer": keras.optimizers.SGD(0.1)}
        learner = research.supervised(
            kernel_regularized(), gradient_transform=lambda gradient: accumulate(gradient, parts), **options
        )
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
        resident = Resident(lambda: batch, lambda step, steps: np.tile(np.arange(len(batch.x), dtype=np.int32), steps))
        data = research.Batches(lambda step: batch, shapes, steps_per_epoch=5, examples=5 * len(batch.x), resident=resident)
        return research.train(learner, data, steps=5)

    state, logs = train(rows, 2)
    expected, expected_logs = train(jax.tree.map(lambda leaf: leaf[:8], rows._replace(valid=None)), 1)
    for a, b in zip(jax.tree.leaves((state, logs)), jax.tree.leaves((expected, expected_logs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_split_is_refused_in_one_line() -> None:
    build, batch, _ = CASES["activity regularizer"]
    with pytest.raises(
        research.InvalidArgument, match="16 examples cannot be split into 3 equal micro-batches: choose a divisor"
    ):
        train_step(build(), batch, 3)

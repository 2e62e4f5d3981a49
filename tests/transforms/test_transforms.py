"""The laws of what makes one pure function of another."""

from typing import Any

import jax
import keras
import numpy as np
import pytest
from cases import first_quick
from keras import layers

import research
from research.transforms import accumulate

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 12, (16, 5)).astype("int32") * (RNG.uniform(size=(16, 5)) < 0.6)


def masked() -> keras.Model:
    embedded = [keras.Input((5,), dtype="int32"), layers.Embedding(12, 4, mask_zero=True)]
    return keras.Sequential([*embedded, layers.SimpleRNN(6, return_sequences=True), layers.Dense(1, kernel_regularizer="l2")])


def plain() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh", activity_regularizer="l2"), layers.Dense(1)])


def update_of(model: keras.Model, batch: research.Batch, parts: int, **options: Any) -> tuple[Any, Any]:
    objective, measures = research.keras_objective(model, **{"loss": "mse", "metrics": ["mae"], **options}, example=batch)
    update = research.keras_update(keras.optimizers.SGD(0.1), model.trainable_variables)
    gradient = research.gradient(objective)
    step = research.step(accumulate(gradient, parts) if parts > 1 else gradient, update, measures, research.examples)
    trainable = [np.array(v) for v in model.trainable_variables]
    state = research.State(
        trainable, [np.array(v) for v in model.non_trainable_variables], update.init(trainable), measures.init()
    )
    return jax.jit(step)(state, batch)


def decayed() -> keras.Model:
    return keras.Sequential([keras.Input((5,)), layers.Dense(8, "tanh", kernel_regularizer="l2"), layers.Dense(1)])


CASES = {
    "plain": (plain, research.Batch(RNG.normal(size=(16, 5)).astype("float32"), RNG.normal(size=(16, 1)).astype("float32")), {}),
    "masked": (masked, research.Batch(TOKENS.astype("int32"), RNG.normal(size=(16, 5, 1)).astype("float32")), {}),
    "weighted": (
        decayed,
        research.Batch(*(RNG.uniform(size=shape).astype("float32") for shape in ((16, 5), (16, 1), (16,)))),
        {"loss": keras.losses.MeanSquaredError("mean_with_sample_weight")},
    ),
}


@pytest.mark.promotes
@pytest.mark.parametrize("parts", first_quick([2, 4]))
@pytest.mark.parametrize("name", first_quick(CASES))
def test_accumulating_over_parts_equals_the_whole_batch_to_1e6(name: str, parts: int) -> None:
    model, batch, options = CASES[name]
    built = model()
    whole, logs = update_of(built, batch, 1, **options)
    cut, cut_logs = update_of(built, batch, parts, **options)
    for a, b in zip(jax.tree.leaves((whole, logs)), jax.tree.leaves((cut, cut_logs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_a_batch_that_cannot_be_cut_is_refused_in_a_line() -> None:
    model, batch, _ = CASES["plain"]
    with pytest.raises(research.Refused, match="16 examples can't be cut into 3"):
        update_of(model(), batch, 3)

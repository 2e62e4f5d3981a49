"""A batch padded with rows that `Batch.valid` excludes gives the loss, metrics and gradients of the batch without padding."""

from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

import research


def metrics() -> list[Any]:
    return [
        "accuracy",
        keras.metrics.SparseTopKCategoricalAccuracy(2),
        keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
    ]


def pad_batch(batch: research.Batch, rows: int) -> research.Batch:
    def pad(leaf: Any) -> np.ndarray:
        return np.concatenate([leaf, np.repeat(leaf[-1:], rows, 0)])

    size = len(jax.tree.leaves(batch.x)[0])
    valid = np.arange(size + rows) < size
    return research.Batch(*jax.tree.map(pad, batch[:3]), valid)


def classifier() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, kernel_regularizer="l2")])


def two_outputs() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, {"a": layers.Dense(1, name="a")(x), "b": layers.Dense(3, name="b")(x)})


def masked() -> keras.Model:
    return keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(9, 4, mask_zero=True), layers.LSTM(3, return_sequences=True)]
    )


RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4)).astype("float32")
LABELS = RNG.integers(0, 3, 5).astype("int32")
WEIGHTS = RNG.uniform(0.5, 2, 5).astype("float32")
XENT = keras.losses.SparseCategoricalCrossentropy


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("model", "compile_args", "batch"),
    [
        (classifier, lambda: {"loss": XENT, "metrics": metrics(), "weighted_metrics": metrics()}, (X, LABELS)),
        (
            two_outputs,
            lambda: {
                "loss": {"a": keras.losses.MeanSquaredError, "b": XENT},
                "metrics": {"a": ["mae"]},
                "weighted_metrics": {"b": metrics()},
            },
            (X, {"a": X[:, :1], "b": LABELS}),
        ),
        (
            masked,
            lambda: {"loss": keras.losses.MeanAbsoluteError, "metrics": ["mse"]},
            (RNG.integers(0, 9, (5, 5)).astype("int32"), RNG.normal(size=(5, 5, 3)).astype("float32")),
        ),
    ],
    ids=["classifier", "two-outputs", "masked"],
)
def test_padding_changes_neither_loss_nor_metrics_nor_gradients(
    model: Any, compile_args: Any, batch: Any, weights: Any, reduction: str
) -> None:
    def with_reduction(cls: Any) -> Any:
        return cls(from_logits=True, reduction=reduction) if cls is XENT else cls(reduction=reduction)

    if weights is not None and model is not classifier:
        weights = {"a": weights, "b": weights} if model is two_outputs else None
    batch = research.Batch(*batch, weights)
    options = compile_args()
    options["loss"] = keras.tree.map_structure(with_reduction, options["loss"])
    learner = research.supervised(model(), optimizer=keras.optimizers.SGD(0.1), example=batch, **options)
    for step in (learner.train, learner.evaluate):
        state, logs = step(learner.init(), batch)
        padded_state, padded_logs = step(learner.init(), pad_batch(batch, 3))
        assert sorted(logs) == sorted(padded_logs)
        for name, value in logs.items():
            np.testing.assert_allclose(padded_logs[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
        for actual, expected in zip(jax.tree.leaves(padded_state), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_running_means_weight_a_padded_batch_by_its_valid_rows() -> None:
    learner = research.supervised(classifier(), loss=XENT(from_logits=True), metrics=["accuracy"])
    first, second = research.Batch(X, LABELS), research.Batch(X[:2], LABELS[:2])
    state, _ = learner.evaluate(learner.init(), first)
    _, expected = learner.evaluate(state, second)
    _, actual = learner.evaluate(state, pad_batch(second, 3))
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6)


def test_from_keras_refuses_padding() -> None:
    model = classifier()
    model.compile(loss=XENT(from_logits=True))
    learner = research.from_keras(model)
    with pytest.raises(research.InvalidArgument, match="valid"):
        learner.evaluate(learner.init(), pad_batch(research.Batch(X, LABELS), 1))

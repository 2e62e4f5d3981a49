"""The grid of models, targets and weights that laws are tested over; Keras' own trainer handles all of them correctly."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import layers

SIZE = 8


class Case(NamedTuple):
    """Builds a model, the arguments to compile it with, and a random batch (x, y, sample_weight)."""

    model: Callable[[], keras.Model]
    compile_args: Callable[[], dict[str, Any]]
    batch: Callable[[np.random.Generator], tuple[Any, Any, Any]]


def _features(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=(SIZE, *shape)).astype("float32")


def _batch_norm() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-2)),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(3, bias_regularizer="l1"),
        ]
    )


def _two_outputs() -> keras.Model:
    x = keras.Input((6,))
    h = layers.Dropout(0.3)(layers.Dense(8, activation="tanh")(x))
    return keras.Model(x, {"score": layers.Dense(1, name="score")(h), "class": layers.Dense(3, name="class")(h)})


def _two_outputs_in_a_list() -> keras.Model:
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    h = layers.Dense(8, kernel_constraint=keras.constraints.MaxNorm(0.5))(layers.Concatenate()([a, b]))
    return keras.Model([a, b], [layers.Dense(1, name="score")(h), layers.Dense(3, name="class")(h)])


def _subclassed() -> keras.Model:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(8, activity_regularizer="l2")
            self.drop = layers.Dropout(0.5)
            self.head = layers.Dense(3)

        def build(self, shape: tuple[int, ...]) -> None:
            self.dense.build(shape)
            self.head.build((None, 8))

        def call(self, x: Any, training: bool = False) -> Any:
            h = self.drop(self.dense(x), training=training)
            self.add_loss(0.1 * keras.ops.mean(h**2))
            return self.head(h)

    net = Net()
    net.build((None, 6))
    return net


def _sequence() -> keras.Model:
    return keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(20, 4, mask_zero=True), layers.LSTM(6), layers.Dense(1)]
    )


def _labels(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 3, SIZE).astype("int32")


def _labelled(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _features(rng, 6), _labels(rng), None


def _labelled_with_weights(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _features(rng, 6), _labels(rng), rng.uniform(size=SIZE).astype("float32")


def _two_targets(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _features(rng, 6), {"score": _features(rng, 1), "class": _labels(rng)}, None


def _two_targets_weighted(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    x, y, _ = _two_targets(rng)
    return x, y, {name: rng.uniform(size=SIZE).astype("float32") for name in y}


def _two_targets_in_a_list(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    weights = [rng.uniform(size=SIZE).astype("float32") for _ in range(2)]
    return [_features(rng, 6), _features(rng, 6)], [_features(rng, 1), _labels(rng)], weights


def _tokens(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return rng.integers(0, 20, (SIZE, 5)).astype("int32"), _features(rng, 1), None


_CLASSIFICATION = {
    "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": ["accuracy"],
}
_TWO_OUTPUTS = {"loss": {"score": "mse", "class": _CLASSIFICATION["loss"]}, "loss_weights": {"score": 2.0, "class": 0.5}}
_TWO_OUTPUTS_METRICS = {"score": ["mae"], "class": ["accuracy"]}


def schedule() -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=5)


CASES = {
    "norm-adam": Case(_batch_norm, lambda: {**_CLASSIFICATION, "optimizer": "adam"}, _labelled),
    "norm-momentum": Case(
        _batch_norm, lambda: {**_CLASSIFICATION, "optimizer": keras.optimizers.SGD(1e-2, momentum=0.9, nesterov=True)}, _labelled
    ),
    "norm-adamw-schedule": Case(
        _batch_norm,
        lambda: {
            **_CLASSIFICATION,
            "weighted_metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
            "optimizer": keras.optimizers.AdamW(schedule(), weight_decay=1e-2, global_clipnorm=0.5),
        },
        _labelled_with_weights,
    ),
    "norm-ema": Case(
        _batch_norm,
        lambda: {
            **_CLASSIFICATION,
            "optimizer": keras.optimizers.Adam(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
        },
        _labelled,
    ),
    "norm-scaled": Case(
        _batch_norm,
        lambda: {**_CLASSIFICATION, "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())},
        _labelled,
    ),
    "two-outputs": Case(
        _two_outputs,
        lambda: {**_TWO_OUTPUTS, "metrics": _TWO_OUTPUTS_METRICS, "optimizer": keras.optimizers.RMSprop(1e-3)},
        _two_targets,
    ),
    "two-outputs-weighted": Case(
        _two_outputs,
        lambda: {**_TWO_OUTPUTS, "metrics": _TWO_OUTPUTS_METRICS, "weighted_metrics": _TWO_OUTPUTS_METRICS, "optimizer": "adam"},
        _two_targets_weighted,
    ),
    "two-outputs-one-loss": Case(
        _two_outputs, lambda: {"loss": {"score": "mse", "class": None}, "optimizer": "sgd"}, _two_targets
    ),
    "two-outputs-in-a-list": Case(
        _two_outputs_in_a_list,
        lambda: {
            "loss": ["mse", _CLASSIFICATION["loss"]],
            "loss_weights": [0.3, 1.0],
            "metrics": [["mae"], ["accuracy"]],
            "weighted_metrics": [["mse"], None],
            "optimizer": keras.optimizers.Adam(clipvalue=0.1),
        },
        _two_targets_in_a_list,
    ),
    "subclassed-add-loss": Case(_subclassed, lambda: {**_CLASSIFICATION, "optimizer": "adam"}, _labelled_with_weights),
    "sequence-masked": Case(_sequence, lambda: {"loss": "mse", "metrics": ["mae"], "optimizer": "adam"}, _tokens),
}


def slow_after_first(values: Iterable[Any]) -> list[Any]:
    """Returns test parameters of which all but the first are marked slow."""
    first, *rest = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]

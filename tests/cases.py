"""The grid that laws are tested over: models, targets and weights that Keras' own trainer gets right."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import layers

SIZE = 8


class Case(NamedTuple):
    """A model to build afresh, what to compile it with, and a batch for each step."""

    model: Callable[[], keras.Model]
    compiled: Callable[[], dict[str, Any]]
    batch: Callable[[np.random.Generator], tuple[Any, Any, Any]]


def _x(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=(SIZE, *shape)).astype("float32")


def _norm() -> keras.Model:
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
    return keras.Model(x, {"score": layers.Dense(1, name="score")(h), "kind": layers.Dense(3, name="kind")(h)})


def _two_in_a_list() -> keras.Model:
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    h = layers.Dense(8, kernel_constraint=keras.constraints.MaxNorm(0.5))(layers.Concatenate()([a, b]))
    return keras.Model([a, b], [layers.Dense(1, name="score")(h), layers.Dense(3, name="kind")(h)])


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


def _classified(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _x(rng, 6), _labels(rng), None


def _weighted(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _x(rng, 6), _labels(rng), rng.uniform(size=SIZE).astype("float32")


def _both(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return _x(rng, 6), {"score": _x(rng, 1), "kind": _labels(rng)}, None


def _both_weighted(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    x, y, _ = _both(rng)
    return x, y, {name: rng.uniform(size=SIZE).astype("float32") for name in y}


def _two_listed(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    weights = [rng.uniform(size=SIZE).astype("float32") for _ in range(2)]
    return [_x(rng, 6), _x(rng, 6)], [_x(rng, 1), _labels(rng)], weights


def _tokens(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    return rng.integers(0, 20, (SIZE, 5)).astype("int32"), _x(rng, 1), None


_CLASSES = {
    "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "metrics": ["accuracy"],
}
_TWO = {"loss": {"score": "mse", "kind": _CLASSES["loss"]}, "loss_weights": {"score": 2.0, "kind": 0.5}}
_TWO_METRICS = {"score": ["mae"], "kind": ["accuracy"]}


def schedule() -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=5)


CASES = {
    "norm-adam": Case(_norm, lambda: {**_CLASSES, "optimizer": "adam"}, _classified),
    "norm-momentum": Case(
        _norm, lambda: {**_CLASSES, "optimizer": keras.optimizers.SGD(1e-2, momentum=0.9, nesterov=True)}, _classified
    ),
    "norm-adamw-schedule": Case(
        _norm,
        lambda: {
            **_CLASSES,
            "weighted_metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")],
            "optimizer": keras.optimizers.AdamW(schedule(), weight_decay=1e-2, global_clipnorm=0.5),
        },
        _weighted,
    ),
    "norm-ema": Case(
        _norm,
        lambda: {
            **_CLASSES,
            "optimizer": keras.optimizers.Adam(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3),
        },
        _classified,
    ),
    "norm-scaled": Case(
        _norm,
        lambda: {**_CLASSES, "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())},
        _classified,
    ),
    "two-outputs": Case(
        _two_outputs, lambda: {**_TWO, "metrics": _TWO_METRICS, "optimizer": keras.optimizers.RMSprop(1e-3)}, _both
    ),
    "two-outputs-weighted": Case(
        _two_outputs,
        lambda: {**_TWO, "metrics": _TWO_METRICS, "weighted_metrics": _TWO_METRICS, "optimizer": "adam"},
        _both_weighted,
    ),
    "two-outputs-one-loss": Case(_two_outputs, lambda: {"loss": {"score": "mse", "kind": None}, "optimizer": "sgd"}, _both),
    "two-outputs-in-a-list": Case(
        _two_in_a_list,
        lambda: {
            "loss": ["mse", _CLASSES["loss"]],
            "loss_weights": [0.3, 1.0],
            "metrics": [["mae"], ["accuracy"]],
            "weighted_metrics": [["mse"], None],
            "optimizer": keras.optimizers.Adam(clipvalue=0.1),
        },
        _two_listed,
    ),
    "subclassed-add-loss": Case(_subclassed, lambda: {**_CLASSES, "optimizer": "adam"}, _weighted),
    "sequence-masked": Case(_sequence, lambda: {"loss": "mse", "metrics": ["mae"], "optimizer": "adam"}, _tokens),
}


def first_quick(values: Iterable[Any]) -> list[Any]:
    """Values to test with, of which only the first is for the quick tests."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]

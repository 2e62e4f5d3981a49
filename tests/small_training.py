"""A small classifier, its data and a comparison of states, for tests of the training loop."""

from typing import Any

import jax
import keras
import numpy as np
from keras import layers

import research

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")
Y = RNG.integers(0, 3, 40).astype("int32")


def learner(**options: Any) -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return research.supervised(model, **{"loss": loss, "optimizer": "adam", "metrics": ["accuracy"], **options})


def data(**options: Any) -> research.Batches:
    return research.from_arrays(X, Y, **{"batch_size": 8, "seed": 1, **options})


def weights(state: Any) -> list[np.ndarray]:
    """Returns copies of the state's arrays except the metrics'."""
    return [np.array(leaf) for leaf in jax.tree.leaves((state.trainable, state.non_trainable, state.optimizer))]


def assert_same_weights(first: Any, second: Any) -> None:
    for a, b in zip(weights(first), weights(second), strict=True):
        np.testing.assert_array_equal(a, b)

"""Models, data and comparisons that the tests of `research.fit` share."""

from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np
from cases import SIZE, Case
from keras import layers

import research


def compiled_model(case: Case, **options: Any) -> keras.Model:
    """Returns a case's model, compiled; `options` override the case's."""
    keras.utils.set_random_seed(0)
    model = case.model()
    model.compile(**{**case.compile_args(), **options})
    return model


def examples(case: Case, num_batches: int) -> tuple[Any, Any, Any]:
    """Returns the examples of `num_batches` batches, less three: the last batch is shorter."""
    rng = np.random.default_rng(0)
    batches = [case.batch(rng) for _ in range(num_batches)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: num_batches * SIZE - 3], *batches)


def small_model(**options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dropout(0.2), layers.Dense(1)])
    model.compile(**{"optimizer": keras.optimizers.Adam(1e-2), "loss": "mse", "metrics": ["mae"], **options})
    return model


def linear_data(n: int = 70) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).normal(size=(n, 4)).astype("float32")
    return x, x.sum(-1, keepdims=True)


def keras_fit(model: keras.Model, *args: Any, **kwargs: Any) -> Any:
    """Keras' `fit` with the signature of `research.fit`."""
    return model.fit(*args, **kwargs)


FITS: tuple[Callable[..., Any], Callable[..., Any]] = (research.fit, keras_fit)


def trees_equal(a: Any, b: Any) -> bool:
    """Whether all leaves are equal bit for bit; NaN equals NaN."""
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b))


def all_values(model: keras.Model) -> list[np.ndarray]:
    """Returns the values of all variables of a model and its optimizer."""
    return [np.array(v) for v in [*model.variables, *model.optimizer.variables]]


class BatchCallback(keras.callbacks.Callback):
    """Has a batch hook, which prevents fusing, and does not read the logs."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        pass

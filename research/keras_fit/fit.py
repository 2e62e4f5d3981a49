"""Keras' `fit`, `evaluate`, `predict` and their kin, with our programs inside.

Keras' own methods stay in charge of data, callbacks, validation and messages. What runs a step is replaced: many steps run as one
program wherever nobody looks at single ones, callbacks get logs that are read off the device only when they look, and the model
is whole after Ctrl-C or an exception.
"""

from typing import Any

import keras
import numpy as np  # noqa: F401  (for the examples in docstrings)

from research.callbacks import watched
from research.programs import Programs


def fit(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Any = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: Any = True,
    class_weight: Any = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: Any = 1,
) -> keras.callbacks.History:
    """Trains a compiled model as `model.fit` does: the same arguments, numbers, callbacks and messages. Returns the `History`.

    A model's own `train_step`, `test_step`, `compute_loss` and the like are used as they are. Steps are fused wherever no
    callback has a batch hook. After an exception or Ctrl-C the model has the weights of the last step that was done.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = fit(model, np.ones((64, 1)), np.ones((64, 1)), epochs=3, verbose=0)
    >>> len(history.history["loss"]), int(model.optimizer.iterations)
    (3, 6)
    """
    with Programs(model).running() as programs:
        return model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=watched(callbacks, programs, verbose, validation_steps),
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )


def evaluate(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: Any = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
    **kwargs: Any,
) -> Any:
    """The loss and metrics of a compiled model, as `model.evaluate` gives them.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse", metrics=["mae"])
    >>> evaluate(model, np.ones((5, 1)), np.full((5, 1), 3.0), batch_size=2, verbose=0, return_dict=True)
    {'loss': 9.0, 'mae': 3.0}
    """
    with Programs(model).running() as programs:
        return model.evaluate(
            x,
            y,
            batch_size=batch_size,
            verbose=verbose,
            sample_weight=sample_weight,
            steps=steps,
            callbacks=watched(callbacks, programs, verbose),
            return_dict=return_dict,
            **kwargs,
        )


def predict(
    model: keras.Model,
    x: Any,
    batch_size: int | None = None,
    verbose: Any = "auto",
    steps: int | None = None,
    callbacks: Any = None,
) -> Any:
    """The outputs of a model for every example, as `model.predict` gives them: NumPy arrays.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict(model, np.arange(3.0)[:, None], verbose=0).tolist()
    [[0.0], [1.0], [2.0]]
    """
    with Programs(model).running():
        return model.predict(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks)


def train_on_batch(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Any = None,
    return_dict: bool = False,
) -> Any:
    """One update on one batch, as `model.train_on_batch` does it; returns the batch's loss and metrics.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile("sgd", "mse")
    >>> train_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with Programs(model).running():
        return model.train_on_batch(x, y, sample_weight=sample_weight, class_weight=class_weight, return_dict=return_dict)


def test_on_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
    """One batch's loss and metrics, as `model.test_on_batch` gives them.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse")
    >>> test_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with Programs(model).running():
        return model.test_on_batch(x, y, sample_weight=sample_weight, return_dict=return_dict)


test_on_batch.__test__ = False  # type: ignore[attr-defined]  # or pytest takes it for a test wherever it is imported


def predict_on_batch(model: keras.Model, x: Any) -> Any:
    """One batch's outputs, as `model.predict_on_batch` gives them: NumPy arrays.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict_on_batch(model, np.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    with Programs(model).running():
        return model.predict_on_batch(x)

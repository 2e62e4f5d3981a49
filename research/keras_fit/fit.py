"""Keras' `fit`, `evaluate`, `predict` and the `_on_batch` methods, with the compiled programs of this library inside.

Keras' own methods stay in charge of data, callbacks, validation and messages. Only what runs a step is replaced. Many steps run
as one program where no callback has a batch hook. Callbacks get logs that are read off the device at first access. After Ctrl-C
or an exception the model has all its weights.
"""

from typing import Any

import keras
import numpy as np  # noqa: F401  (for the examples in docstrings)

from research.core.learner import Learner
from research.core.state import InvalidArgument, type_name
from research.keras_fit.callbacks import wrap_callbacks
from research.keras_fit.programs import ModelFunctions


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

    A model's own `train_step`, `test_step`, `compute_loss` and the like run unchanged. Steps are fused where no callback has a
    batch hook. After an exception or Ctrl-C the model has the weights of the last completed step.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = fit(model, np.ones((64, 1)), np.ones((64, 1)), epochs=3, verbose=0)
    >>> len(history.history["loss"]), int(model.optimizer.iterations)
    (3, 6)
    """
    with _functions("fit", model).installed() as functions:
        return model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=wrap_callbacks(callbacks, functions, verbose, validation_steps),
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
    """Returns the loss and metrics of a compiled model, as `model.evaluate` does.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse", metrics=["mae"])
    >>> evaluate(model, np.ones((5, 1)), np.full((5, 1), 3.0), batch_size=2, verbose=0, return_dict=True)
    {'loss': 9.0, 'mae': 3.0}
    """
    with _functions("evaluate", model).installed() as functions:
        return model.evaluate(
            x,
            y,
            batch_size=batch_size,
            verbose=verbose,
            sample_weight=sample_weight,
            steps=steps,
            callbacks=wrap_callbacks(callbacks, functions, verbose),
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
    """Returns the outputs of a model for every example as NumPy arrays, as `model.predict` does.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict(model, np.arange(3.0)[:, None], verbose=0).tolist()
    [[0.0], [1.0], [2.0]]
    """
    with _functions("predict", model).installed():
        return model.predict(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks)


def train_on_batch(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Any = None,
    return_dict: bool = False,
) -> Any:
    """Makes one update on one batch, as `model.train_on_batch` does; returns the batch's loss and metrics.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile("sgd", "mse")
    >>> train_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with _functions("train_on_batch", model).installed():
        return model.train_on_batch(x, y, sample_weight=sample_weight, class_weight=class_weight, return_dict=return_dict)


def test_on_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
    """Returns one batch's loss and metrics, as `model.test_on_batch` does.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse")
    >>> test_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with _functions("test_on_batch", model).installed():
        return model.test_on_batch(x, y, sample_weight=sample_weight, return_dict=return_dict)


test_on_batch.__test__ = False  # type: ignore[attr-defined]  # or pytest collects it as a test wherever it is imported


def predict_on_batch(model: keras.Model, x: Any) -> Any:
    """Returns one batch's outputs as NumPy arrays, as `model.predict_on_batch` does.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict_on_batch(model, np.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    with _functions("predict_on_batch", model).installed():
        return model.predict_on_batch(x)


def _functions(caller: str, model: Any) -> ModelFunctions:
    """Returns the functions to install. Raises `InvalidArgument` for what has no `fit`."""
    if not hasattr(model, "make_train_function"):
        hint = ": call research.train(learner, data, epochs=...)." if isinstance(model, Learner) else "."
        raise InvalidArgument(f"{caller}: the model is {type_name(model)}, expected a compiled keras.Model{hint}")
    return ModelFunctions(model)

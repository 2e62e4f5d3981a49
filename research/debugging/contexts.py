"""Contexts in which layers add other losses, or what JAX compiles is recorded."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import keras


@contextmanager
def adding_losses(change: Callable[[Any], Any]) -> Iterator[None]:
    """Changes each loss that a layer adds within the context.

    >>> layer = keras.layers.Dense(1, activity_regularizer="l1", kernel_initializer="ones")
    >>> with adding_losses(lambda loss: 10 * loss):
    ...     _ = layer(keras.ops.ones((1, 2)))
    >>> [round(float(loss), 3) for loss in layer.losses]
    [0.2]
    """
    add_loss = keras.Layer.add_loss

    def add(layer: keras.Layer, loss: Any) -> None:
        add_loss(layer, keras.tree.map_structure(change, loss))

    keras.Layer.add_loss = add
    try:
        yield
    finally:
        keras.Layer.add_loss = add_loss


class _Larger(keras.regularizers.Regularizer):
    """Another regularizer, and a constant more."""

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = regularizer

    def __call__(self, x: Any) -> Any:
        return self.regularizer(x) * 2 + 1


@contextmanager
def _regularizing(models: Sequence[keras.Layer]) -> Iterator[None]:
    """Makes the regularizers of all weights stronger within the context."""
    variables = {id(v): v for model in models for v in model.trainable_variables if v.regularizer is not None}.values()
    before = [v.regularizer for v in variables]
    for variable in variables:
        variable.regularizer = _Larger(variable.regularizer)
    try:
        yield
    finally:
        for variable, regularizer in zip(variables, before, strict=True):
            variable.regularizer = regularizer


def layer_losses(models: Sequence[keras.Layer]) -> dict[str, Callable[[], Any]]:
    """Returns contexts in which the losses of layers are larger: those of regularizers, and those that layers add.

    >>> layer = keras.layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.5), kernel_initializer="ones")
    >>> layer.build((1, 2))
    >>> with layer_losses([layer])["regularizers"]():
    ...     [float(loss) for loss in layer.losses]
    [3.0]
    >>> [float(loss) for loss in layer.losses]
    [1.0]
    """
    return {
        "regularizers": lambda: _regularizing(models),
        "losses of add_loss or of activity regularizers": lambda: adding_losses(lambda loss: loss * 2 + 1),
    }


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that gets the name of each program that JAX compiles within the context.

    >>> with compilations() as names:
    ...     _ = jax.jit(lambda x: x + 17)(1.0)
    >>> names
    ['jit(<lambda>)']
    """
    names: list[str] = []

    class Names(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            name = re.match(r"Compiling (\S+)", record.getMessage())
            if name is not None:
                names.append(name[1])

    logger, handler = logging.getLogger("jax"), Names()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate

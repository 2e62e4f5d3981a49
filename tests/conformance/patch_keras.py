"""A pytest plugin for Keras' own tests: with PATCH_KERAS set, functions of `research` replace the methods of `keras.Model`."""

import functools
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import research  # before keras: it selects the backend
from research.keras_fit import fit

import keras  # isort: skip
import pytest

METHODS = {
    "fit": research.fit,
    "evaluate": fit.evaluate,
    "predict": fit.predict,
    "train_on_batch": fit.train_on_batch,
    "test_on_batch": fit.test_on_batch,
    "predict_on_batch": fit.predict_on_batch,
}


def patched(
    name: str, original: Callable[..., Any], function: Callable[..., Any], running: threading.local
) -> Callable[..., Any]:
    """Returns a method that calls `function`, and Keras' original where `function` itself calls the method."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = running.__dict__.setdefault("calls", set())
        if (id(self), name) in calls:
            return original(self, *args, **kwargs)
        calls.add((id(self), name))
        try:
            return function(self, *args, **kwargs)
        finally:
            calls.discard((id(self), name))

    return method


def pytest_configure(config: Any) -> None:
    """Adds what Keras' tests expect of the `conftest.py` that the wheel lacks, and patches the methods."""
    for name in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{name}: defined by Keras")
    conftest: Any = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(keras.config.backend() == backend, reason=reason)
    sys.modules.setdefault("conftest", conftest)
    if os.environ.get("PATCH_KERAS"):
        trainer = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))  # subclasses in the tests inherit from it too
        running = threading.local()
        for name, function in METHODS.items():
            setattr(trainer, name, patched(name, getattr(trainer, name), function, running))

"""A pytest plugin for Keras' own tests, which its wheel ships: with RESEARCH_BOUND set, our functions are its methods."""

import functools
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import research  # noqa: F401  (before keras: it chooses the backend)

import keras  # isort: skip
import pytest

fitting: Any = sys.modules["research.fit"]
METHODS = {
    "fit": fitting.fit,
    "evaluate": fitting.evaluate,
    "predict": fitting.predict,
    "train_on_batch": fitting.train_on_batch,
    "test_on_batch": fitting.test_on_batch,
    "predict_on_batch": fitting.predict_on_batch,
}


def bound(name: str, original: Callable[..., Any], ours: Callable[..., Any], running: threading.local) -> Callable[..., Any]:
    """A method that is ours, and Keras' own where ours calls it."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = running.__dict__.setdefault("calls", set())
        if (id(self), name) in calls:
            return original(self, *args, **kwargs)
        calls.add((id(self), name))
        try:
            return ours(self, *args, **kwargs)
        finally:
            calls.discard((id(self), name))

    return method


def pytest_configure(config: Any) -> None:
    """Gives Keras' tests what they expect of the `conftest.py` that the wheel leaves out, and binds."""
    for name in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{name}: Keras' own")
    conftest: Any = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(keras.config.backend() == backend, reason=reason)
    sys.modules.setdefault("conftest", conftest)
    if os.environ.get("RESEARCH_BOUND"):
        owner = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))  # the tests' own classes have it from there too
        running = threading.local()
        for name, ours in METHODS.items():
            setattr(owner, name, bound(name, getattr(owner, name), ours, running))

"""A pytest plugin for Keras' own tests.

With PATCH_KERAS set, functions of `research` replace the methods of `keras.Model`. With RECORD_CALLS=FOLDER, the tests that call
one of the methods are written to files there. With SELECTED_TESTS=FILE, only the tests that the file names are run.
"""

import functools
import os
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
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


def recorded(original: Callable[..., Any], file: Path) -> Callable[..., Any]:
    """Returns Keras' method, made to write the name of the running test to a file."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        test, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
        with file.open("a") as stream:
            stream.write(junit_name(test) + "\n")
        return original(self, *args, **kwargs)

    return method


def junit_name(node: str) -> str:
    """Returns the name of a test in a JUnit file, CLASS::TEST, from its pytest node id; addresses of objects are left out.

    >>> junit_name("layers/core/dense_test.py::DenseTest::test_dense[a::b at 0x7f4f]")
    'layers.core.dense_test.DenseTest::test_dense[a::b at 0x]'
    """
    names, bracket, parameters = node.partition("[")
    path, *inner, test = names.split("::")
    name = ".".join([path.removesuffix(".py").replace("/", "."), *inner]) + f"::{test}{bracket}{parameters}"
    return re.sub("0x[0-9a-f]+", "0x", name)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselects the tests that Keras expects to fail, some of which pass now and then, and those not named in SELECTED_TESTS."""
    selected = [item for item in items if item.get_closest_marker("xfail") is None]
    if path := os.environ.get("SELECTED_TESTS"):
        names = set(Path(path).read_text().splitlines())
        selected = [item for item in selected if junit_name(item.nodeid) in names]
    config.hook.pytest_deselected(items=list(set(items) - set(selected)))
    items[:] = selected


def pytest_configure(config: Any) -> None:
    """Adds what Keras' tests expect of the `conftest.py` that the wheel lacks, and patches the methods."""
    for name in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{name}: defined by Keras")
    conftest: Any = types.ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(keras.config.backend() == backend, reason=reason)
    sys.modules.setdefault("conftest", conftest)
    trainer = next(cls for cls in keras.Model.__mro__ if "fit" in vars(cls))  # subclasses in the tests inherit from it too
    if folder := os.environ.get("RECORD_CALLS"):
        file = Path(folder) / f"calls-{os.getpid()}.txt"
        for name in METHODS:
            setattr(trainer, name, recorded(getattr(trainer, name), file))
    if os.environ.get("PATCH_KERAS"):
        running = threading.local()
        for name, function in METHODS.items():
            setattr(trainer, name, patched(name, getattr(trainer, name), function, running))

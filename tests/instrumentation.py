"""Context managers that count compilations and device-to-host reads."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@contextmanager
def count_compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], int]]:
    """Yields a function from a jitted function's name to the number of times it was compiled in the context."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        caplog.clear()
        yield lambda name: sum(f"Finished XLA compilation of jit({name})" in r.getMessage() for r in caplog.records)


@contextmanager
def device_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields a list to which the shape of each array that Python reads from a device is appended."""
    array_type = type(jnp.zeros(()))
    value, shapes = array_type._value, []  # type: ignore[attr-defined]

    def read(array: Any) -> Any:
        shapes.append(str(array.shape))
        return value.fget(array)

    def recorded(function: Any) -> Any:
        # NumPy reads CPU arrays through the buffer protocol, without `_value`.
        def call(array: Any, *args: Any, **options: Any) -> Any:
            if type(array) is array_type:
                shapes.append(str(array.shape))
            return function(array, *args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(array_type, "_value", property(read))
        for name in ("asarray", "array"):
            patch.setattr(np, name, recorded(getattr(np, name)))
        yield shapes

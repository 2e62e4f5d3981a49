"""What tests watch for: programs compiled, and values read off a device."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@contextmanager
def compiled(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], int]]:
    """Counts the programs compiled under a name."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        caplog.clear()
        yield lambda name: sum(f"Finished XLA compilation of jit({name})" in r.getMessage() for r in caplog.records)


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes each value that Python reads off a device."""
    concrete = type(jnp.zeros(()))
    value, seen = concrete._value, []  # type: ignore[attr-defined]

    def counting(array: Any) -> Any:
        seen.append(str(array.shape))
        return value.fget(array)

    def noticing(function: Any) -> Any:
        # NumPy reads a CPU array through the buffer protocol, past `_value`.
        def noticed(given: Any, *args: Any, **options: Any) -> Any:
            if type(given) is concrete:
                seen.append(str(given.shape))
            return function(given, *args, **options)

        return noticed

    with monkeypatch.context() as patch:
        patch.setattr(concrete, "_value", property(counting))
        for name in ("asarray", "array"):
            patch.setattr(np, name, noticing(getattr(np, name)))
        yield seen

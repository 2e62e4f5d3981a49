"""What several tests of plans share: shapes, the command in a process of its own, and a module of Keras models."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from research.cli import plan as command
from research.planning import compiler

ROOT = Path(__file__).parents[2]
LIBTPU = Path(sys.prefix) / "libtpu"
needs_libtpu = pytest.mark.skipif(
    not LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed: `just test` and `just plan` install it",
)

MODELS = """
import research, keras
def compiled():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(8)])
    model.compile(optimizer="adam", loss="mse")
    return model
def plain():
    x = keras.Input((None,), dtype="int32")
    return keras.Model(x, keras.layers.Dense(50)(keras.layers.Embedding(50, 64)(x)))
def number():
    return 3
def broken():
    raise RuntimeError("out of luck")
"""


def shape(*sizes: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `research plan` as a user does, in an environment without the settings of these tests."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_FLAGS", "TPU_", "JAX_"))}
    line = [sys.executable, "-P", "-m", "research", "plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `research plan` in this process, and leaves its environment and JAX's options alone."""
    monkeypatch.setattr(compiler, "configure_libtpu", lambda topology: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return command.main([*arguments])

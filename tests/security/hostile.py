"""Files as a stranger makes them on purpose: their checksums are right, what they claim is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from research.training import checkpoint, manifest

STATE = {"w": np.arange(6, dtype=np.float32), "count": np.int32(3)}
NAMES = {"w": "dense/kernel", "count": "iterations"}


def save(directory: Path, step: int = 6, **state: Any) -> Path:
    """Writes a checkpoint. Its leaves are `iterations`, 0, and `dense/kernel`, 1."""
    return checkpoint.save(directory, step, {**STATE, **state}, NAMES, {"loss": 0.5}, keep=9)


def sign(path: Path, change: Callable[[dict[str, Any]], Any] = lambda contents: None) -> None:
    """Lists all files in a checkpoint's manifest, changes it, and writes it with the checksum that it then has."""
    contents = json.loads((path / manifest.MANIFEST).read_text())
    del contents["checksum"]
    contents["files"] = {
        file.relative_to(path).as_posix(): manifest._fingerprint(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != manifest.MANIFEST
    }
    change(contents)
    text = json.dumps({**contents, "checksum": manifest._checksum(contents)})
    (path / manifest.MANIFEST).write_text(text)


def store(path: Path, leaf: int, array: np.ndarray | None = None, **metadata: Any) -> None:
    """Replaces the array of a leaf in a checkpoint's files by another one, or by one that its description alone is of."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{path}/state/", "path": f"{leaf:05d}/"},
        "metadata": {"compressor": None, **metadata},
    }
    opened = ts.open(spec, create=True, delete_existing=True).result()
    if array is not None:
        opened.write(array).result()

"""Files of weights as a stranger makes them: read in bounded time and memory, or one line about what is wrong."""

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import research
from research.training.weight_files import open_weights


@pytest.fixture(scope="module")
def learner() -> research.Learner:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")], name="model")
    return research.supervised(model, loss="mse")


def safetensors(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def hdf5(fill: Callable[[Any], Any]) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def many_paths(file: Any) -> None:
    """Forty levels of groups, each of which holds the next one under two names: a million times a million paths."""
    group = file
    for _ in range(40):
        inner = group.create_group("a")
        group["b"] = inner
        group = inner
    group.create_dataset("vars/0", data=np.ones(2, "f4"))


def deep(file: Any) -> None:
    group = file
    for _ in range(3000):
        group = group.create_group("a")


def keras_archive(weights: bytes, change: Callable[[bytearray], Any] = lambda data: None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.weights.h5", weights)
    data = bytearray(buffer.getvalue())
    change(data)
    return bytes(data)


def entry(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dense/kernel": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def central(data: bytearray, offset: int, value: bytes) -> None:
    """Overwrites a field of an archive's first entry in its central directory."""
    start = data.rindex(b"PK\1\2") + offset
    data[start : start + len(value)] = value


SIZED = {"chunks": (1024,), "maxshape": (None,)}
FILES: dict[str, tuple[str, bytes]] = {
    "a dtype that NumPy lacks": ("a.safetensors", safetensors(entry("F8_E8M0", [3, 2], 6), bytes(6))),
    "a dtype of half a byte": ("a.safetensors", safetensors(entry("F4", [3, 2], 3), bytes(3))),
    "no dtype of any": ("a.safetensors", safetensors(entry("O", [3, 2], 24), bytes(24))),
    "a product beyond 64 bits": ("a.safetensors", safetensors(entry("F32", [2**33, 2**33], 24), bytes(24))),
    "a shape of zeros": ("a.safetensors", safetensors(entry("F32", [0, 2**60], 0))),
    "control characters": ("a.safetensors", safetensors({"\x1b[2J\n\x00": entry("F32", [1], 4)["dense/kernel"]}, bytes(4))),
    "brackets": ("a.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a million paths": ("a.weights.h5", hdf5(many_paths)),
    "thousands of levels": ("a.weights.h5", hdf5(deep)),
    "a sparse petabyte": ("a.weights.h5", hdf5(lambda f: f.create_dataset("layers/dense/vars/0", (2**48,), "f4", **SIZED))),
    "a compressed gigabyte": (
        "a.weights.h5",
        hdf5(lambda f: f.create_dataset("layers/dense/vars/0", data=np.zeros((3000, 2000), "f4"), compression=9)),
    ),
    "an entry before the file": ("a.keras", keras_archive(hdf5(many_paths), lambda data: central(data, 42, b"\xff\xff\xff\xf0"))),
    "an entry longer than the file": ("a.keras", keras_archive(hdf5(many_paths), lambda d: central(d, 24, b"\xff\xff\xff\x7f"))),
    "an entry of other weights": ("a.keras", keras_archive(b"text")),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_line(name: str, learner: research.Learner, tmp_path: Path) -> None:
    file, data = FILES[name]
    (tmp_path / file).write_bytes(data)
    started = time.monotonic()
    with pytest.raises(research.InvalidArgument) as error:
        research.restore(learner, tmp_path / file, partial=True)
    assert time.monotonic() - started < 5
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_keras_file_with_code_in_it_gives_its_weights_and_runs_nothing(learner: research.Learner, tmp_path: Path) -> None:
    ran: list[int] = []
    keras.utils.get_custom_objects()["ran"] = lambda x: ran.append(1) or x
    layers = [keras.Input((3,)), keras.layers.Dense(2, name="dense"), keras.layers.Lambda(lambda x: ran.append(1) or x)]
    keras.Sequential(layers, name="model").save(tmp_path / "a.keras")
    ran.clear()
    with pytest.raises(ValueError, match=r"safe_mode|unsafe"):
        keras.saving.load_model(tmp_path / "a.keras")
    _, report = research.restore(learner, tmp_path / "a.keras")
    assert report.missing == []
    assert not ran
    keras.utils.get_custom_objects().pop("ran")


def test_an_index_and_a_folder_lead_nowhere_else(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        "[" * 100_000,
        '{"weight_map": ' + "[" * 100_000,
        "NaN",
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": {}}}',
    ):
        index.write_text(text)
        with pytest.raises(research.InvalidArgument) as error, ExitStack() as stack:
            stack.enter_context(open_weights(tmp_path, print))
        assert "\n" not in str(error.value)
    with index.open("r+b") as file:
        file.truncate(10**13)
    with pytest.raises(research.InvalidArgument, match="more than an index may have"), open_weights(tmp_path, print):
        pass

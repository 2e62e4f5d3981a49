"""A checkpoint whose manifest a stranger wrote to fit: it is read as what it says, or not at all, and nothing outside of it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from research.training import checkpoint, manifest, weight_files

HUGE = {"shape": [10**13], "chunks": [6], "dtype": "<f4"}
STORED: dict[str, Callable[[Path], Any]] = {
    "more elements": lambda path: hostile.store(path, 1, np.zeros(7, "f4"), shape=[7], chunks=[7], dtype="<f4"),
    "fewer elements": lambda path: hostile.store(path, 1, np.zeros(5, "f4"), shape=[5], chunks=[5], dtype="<f4"),
    "another axis": lambda path: hostile.store(path, 1, np.zeros((6, 1), "f4"), shape=[6, 1], chunks=[6, 1], dtype="<f4"),
    "another dtype": lambda path: hostile.store(path, 1, np.zeros(6, "i4"), shape=[6], chunks=[6], dtype="<i4"),
    "40 terabytes": lambda path: hostile.store(path, 1, None, **HUGE),
    "a part of 40 terabytes": lambda path: hostile.store(path, 1, None, **{**HUGE, "shape": [6], "chunks": [10**13]}),
    "no such leaf": lambda path: hostile.store(path, 1, None, shape=[6], chunks=[6], dtype="|S9"),
    "no files": lambda path: [file.unlink() for file in (path / "state").rglob("*") if file.is_file()],
}
LIKE: dict[str, Any] = {
    "arrays": {"w": jnp.zeros(6), "count": jnp.zeros((), jnp.int32)},
    "shapes": {"w": jax.ShapeDtypeStruct((6,), np.float32), "count": jax.ShapeDtypeStruct((), np.int32)},
    "NumPy": hostile.STATE,
}


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("stored", STORED)
def test_arrays_of_other_shapes_than_the_manifest_says_are_not_read(stored: str, like: str, tmp_path: Path) -> None:
    path = hostile.save(tmp_path / "checkpoints")
    STORED[stored](path)
    hostile.sign(path)
    with pytest.raises(research.InvalidArgument, match="its state can't be read") as error:
        checkpoint.restore(path, LIKE[like], hostile.NAMES)
    assert "\n" not in str(error.value)
    with weight_files.open_weights(path, print) as weights, pytest.raises(weight_files.FileError, match="can't be read"):
        weights.arrays["dense/kernel"].read((slice(None),))


FIELDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a negative step": lambda m: m.update(step=-1),
    "a boolean step": lambda m: m.update(step=True),
    "a step that no file can have": lambda m: m.update(step=10**400),
    "format 0": lambda m: m.update(format=0),
    "a number as run": lambda m: m.update(run=3),
    "a list as config": lambda m: m.update(config=["3"]),
    "leaves as numbers": lambda m: m.update(leaves=[1, 2]),
    "a length as text": lambda m: m["leaves"][1].__setitem__(1, ["6"]),
    "a boolean length": lambda m: m["leaves"][1].__setitem__(1, [True]),
    "a negative length": lambda m: m["leaves"][1].__setitem__(1, [-6]),
    "a length beyond all memory": lambda m: m["leaves"][1].__setitem__(1, [10**30]),
    "hundreds of axes": lambda m: m["leaves"][1].__setitem__(1, [1] * 500),
    "a dtype of objects": lambda m: m["leaves"][1].__setitem__(2, "O"),
    "a dtype that is none": lambda m: m["leaves"][1].__setitem__(2, "float33"),
    "a number as dtype": lambda m: m["leaves"][1].__setitem__(2, 3),
    "a text as weak type": lambda m: m.update(weak_types=["0"]),
    "a text as log": lambda m: m["logs"].update(loss="0.5"),
    "an object as log": lambda m: m["logs"].update(loss={}),
    "rows of different lengths as log": lambda m: m["logs"].update(loss=[[1], [1, 2]]),
    "a log beyond all floats": lambda m: m["logs"].update(loss=10**400),
    "deep lists as log": lambda m: m["logs"].update(loss=eval("[" * 80 + "]" * 80)),
    "a text as checksum": lambda m: m["files"].update({"state/_METADATA": "3f2a"}),
    "a long checksum": lambda m: m["files"].update({"state/_METADATA": [1, 2, 3]}),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_manifest_with_a_right_checksum_and_a_wrong_field_is_damaged(field: str, tmp_path: Path) -> None:
    path = hostile.save(tmp_path / "checkpoints")
    hostile.sign(path, FIELDS[field])
    assert manifest.verify(path) == "its manifest.json can't be read"
    message = r"its manifest\.json can't be read"
    with pytest.raises(research.InvalidArgument, match=message), weight_files.open_weights(path, print):
        pass


PLACES: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a directory": Path.mkdir,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [manifest.MANIFEST, "state/_METADATA", "state/manifest.ocdbt"])
def test_what_is_no_regular_file_in_a_checkpoint_is_not_opened(name: str, place: str, tmp_path: Path) -> None:
    earlier, path = hostile.save(tmp_path / "checkpoints", 3), hostile.save(tmp_path / "checkpoints")
    contents = (path / name).read_bytes()
    (path / name).unlink()
    (path / name).with_name("elsewhere").write_bytes(contents)
    PLACES[place](path / name)
    if name != manifest.MANIFEST:
        hostile.sign(path, lambda m: m["files"].update({name: [0, 0]} if place != "a link" else {}))
    reports: list[str] = []
    started = time.monotonic()
    assert checkpoint.latest(tmp_path / "checkpoints", reports.append) == earlier
    assert time.monotonic() - started < 5
    (line,) = reports
    assert line.startswith(f"checkpoint {path} is damaged (")


def test_a_manifest_names_no_file_outside_of_its_checkpoint(tmp_path: Path) -> None:
    path = hostile.save(tmp_path / "checkpoints")
    outside = tmp_path / "outside"
    outside.write_text("text")
    for name in ("../../outside", str(outside), "state/../../../outside"):
        hostile.sign(path, lambda m, name=name: m["files"].update({name: manifest._fingerprint(outside)}))
        assert manifest.verify(path) == f"{name} is missing or can't be read"


def test_a_manifest_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = hostile.save(tmp_path / "checkpoints")
    with (path / manifest.MANIFEST).open("r+b") as file:
        file.truncate(10**13)  # takes no room on the disk
    assert manifest.verify(path) == "its manifest.json has 10,000,000,000,000 bytes, more than one may have"


def test_removing_and_writing_checkpoints_follows_no_link(tmp_path: Path) -> None:
    directory, outside = tmp_path / "checkpoints", tmp_path / "outside"
    hostile.save(directory, 1)
    (outside / "000000002").mkdir(parents=True)
    (outside / "000000002" / "file").write_text("text")
    (directory / "000000002").symlink_to(outside / "000000002")
    (tmp_path / ".checkpoints.partial").symlink_to(outside)
    checkpoint.save(directory, 2, hostile.STATE, hostile.NAMES, keep=1)
    (directory / "000000003").symlink_to(outside / "000000002")
    checkpoint.save(directory, 4, hostile.STATE, hostile.NAMES, keep=1)
    assert [path.name for path in directory.iterdir()] == ["000000004"]
    assert [path.relative_to(outside).as_posix() for path in outside.rglob("*")] == ["000000002", "000000002/file"]

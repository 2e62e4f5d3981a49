"""Every file of the newest checkpoint, damaged in many ways, and what becomes of it. RELIABILITY.md counts it."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import research
from research.training import checkpoint
from research.training.manifest import MANIFEST, Origin

NAMES = {"w": "dense/kernel", "scale": "dense/scale", "count": "iterations"}
ORIGIN = Origin("11" * 16, "22" * 16)
Damage = Callable[[Path], Any]
BEFORE, SAME, ERROR = "goes on from the one before, one line", "the same bits: it is not damaged", "one line, and ends"


def state(step: int) -> dict[str, Any]:
    return {"w": np.arange(300, dtype=np.float32) * step, "scale": np.full(7, step, np.float16), "count": np.int32(step)}


def flip(position: float) -> Damage:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


def changed(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def replaced(make: Damage) -> Damage:
    """Puts something else in the place of a file, which is moved out of the checkpoint, to `outside`."""

    def damage(path: Path) -> None:
        path.rename(outside(path))
        make(path)

    return damage


def outside(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "checkpoints").with_name("outside")


def swap(path: Path) -> None:
    """Exchanges a file with another one of its checkpoint."""
    root = next(parent for parent in path.parents if parent.name.isdigit())
    other = next(file for file in sorted(root.rglob("*")) if file.is_file() and file != path)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def chosen(root: Path) -> list[Path]:
    """Returns the files that are damaged. Of those with the data of arrays, whose number varies, it is the largest one."""
    files = {file.name: file for file in root.rglob("*") if file.is_file()}
    named = [files.pop(name) for name in (MANIFEST, "_METADATA", "manifest.ocdbt")]
    return [*named, max(files.values(), key=lambda file: (file.stat().st_size, file.name))]


def take_that_of_the_one_before(path: Path) -> None:
    """Takes the file of the same name, or of the same place in the order of names, from the checkpoint before."""
    root = next(parent for parent in path.parents if parent.name.isdigit())
    older = root.with_name(f"{3:09d}")
    shutil.copyfile(chosen(older)[chosen(root).index(path)], path)


OF_A_FILE: dict[str, Damage] = {
    "one bit flipped in the first byte": flip(0),
    "one bit flipped in the middle": flip(0.5),
    "one bit flipped in the last byte": flip(1),
    "its last byte lost": changed(lambda data: data[:-1]),
    "its second half lost": changed(lambda data: data[: len(data) // 2]),
    "emptied": changed(lambda data: b""),
    "zeros of the same length": changed(lambda data: bytes(len(data))),
    "a byte appended": changed(lambda data: data + b"\0"),
    "4 kB appended": changed(lambda data: data + bytes(4096)),
    "removed": Path.unlink,
    "exchanged with another file": swap,
    "that of an older checkpoint": take_that_of_the_one_before,
    "a directory": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a link to the same bytes": replaced(lambda path: path.symlink_to(outside(path))),
    "a link to nothing": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to an endless device": replaced(lambda path: path.symlink_to("/dev/zero")),
}


def field(name: str, change: Callable[[Any], Any]) -> Damage:
    """Changes a field of a manifest, and leaves its checksum as it is."""

    def damage(path: Path) -> None:
        contents = json.loads((path / MANIFEST).read_text())
        contents[name] = change(contents.get(name))
        (path / MANIFEST).write_text(json.dumps(contents))

    return damage


def without(name: str) -> Damage:
    def damage(path: Path) -> None:
        contents = json.loads((path / MANIFEST).read_text())
        del contents[name]
        (path / MANIFEST).write_text(json.dumps(contents))

    return damage


FIELDS: dict[str, Callable[[Any], Any]] = {
    "format": lambda value: value - 1, "step": lambda value: value + 1, "run": lambda value: "33" * 16,
    "config": lambda value: "33" * 16, "leaves": lambda value: value[::-1], "weak_types": lambda value: [0],
    "logs": lambda value: {"loss": 0.25}, "files": lambda value: {}, "checksum": lambda value: "0" * 64, "more": lambda value: 1,
}  # fmt: skip
OF_THE_MANIFEST: dict[str, Damage] = {
    **{f"{name} changed": field(name, change) for name, change in FIELDS.items()},
    **{f"{name} of another type": field(name, lambda value: {"a": [None]}) for name in FIELDS if name != "more"},
    **{f"{name} missing": without(name) for name in FIELDS if name != "more"},
    "written with other spaces": lambda path: (path / MANIFEST).write_text(
        json.dumps(json.loads((path / MANIFEST).read_text()), indent=3)
    ),
}


def emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def put(make: Damage) -> Damage:
    """Puts something else in the place of a checkpoint."""
    return lambda path: [shutil.rmtree(path), make(path)]


OF_ALL: dict[str, Damage] = {
    "an empty directory": emptied,
    "a file in its place": put(Path.touch),
    "a pipe in its place": put(os.mkfifo),
    "a link to nothing in its place": put(lambda path: path.symlink_to("nowhere")),
    "a link to itself in its place": put(lambda path: path.symlink_to(path.name)),
    "a link to the one before in its place": put(lambda path: path.symlink_to(f"{3:09d}")),
    "a copy of the one before": put(lambda path: shutil.copytree(path.with_name(f"{3:09d}"), path)),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "the state of the one before": lambda path: [
        shutil.rmtree(path / "state"), shutil.copytree(path.with_name(f"{3:09d}") / "state", path / "state"),
    ],
    "a file more": lambda path: (path / "state" / "more").touch(),
    "renamed to a later step": lambda path: path.rename(path.with_name(f"{9:09d}")),
}  # fmt: skip


def damages(path: Path) -> Iterator[tuple[str, str, Damage]]:
    """Yields kind, name and function of each damage to a checkpoint like this one."""
    for file in (file.relative_to(path) for file in chosen(path)):
        kind = "manifest.json" if file.name == MANIFEST else "_METADATA" if file.name == "_METADATA" else "a file of arrays"
        for name, damage in OF_A_FILE.items():
            yield kind, f"{file.name}: {name}", lambda root, file=file, damage=damage: damage(root / file)
    yield from (("a field of the manifest", name, damage) for name, damage in OF_THE_MANIFEST.items())
    yield from (("the complete checkpoint", name, damage) for name, damage in OF_ALL.items())


def outcome(directory: Path, expected: dict[int, dict[str, Any]]) -> str:
    """Restores the latest checkpoint, and returns what became of it. Fails for other weights than saved, and for more lines."""
    lines: list[str] = []
    if len(os.listdir(directory)) == 1 and checkpoint.verify(next(directory.iterdir()), ORIGIN) is not None:
        with pytest.raises(research.InvalidArgument, match=r"^[^\n]*: no intact checkpoint is left \([^\n]*\); [^\n]*$"):
            checkpoint.restore_latest(directory, state(0), NAMES, lines.append, ORIGIN)
        return ERROR
    restored = checkpoint.restore_latest(directory, state(0), NAMES, lines.append, ORIGIN)
    assert restored is not None
    for name, value in expected[restored.step].items():
        np.testing.assert_array_equal(restored.state[name], value, strict=True)
    assert len(lines) == (restored.step != 6)
    assert all("\n" not in line and line.startswith(f"checkpoint {directory}") for line in lines)
    return SAME if restored.step == 6 else BEFORE


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counter[str]]:
    """What became of each kind of damage, with an older checkpoint and without."""
    root = tmp_path_factory.mktemp("damaged")
    for step in (3, 6):
        checkpoint.save(root / "checkpoints", step, state(step), NAMES, {"loss": 0.5}, keep=9, origin=ORIGIN)
    expected = {step: state(step) for step in (3, 6)}
    counts: dict[str, Counter[str]] = {}
    (root / "checkpoints").rename(root / "original")
    for kind, name, damage in damages(root / "original" / f"{6:09d}"):
        shutil.copytree(root / "original", root / "checkpoints")
        damage(root / "checkpoints" / f"{6:09d}")
        found = outcome(root / "checkpoints", expected)
        counts.setdefault(kind, Counter())[found] += 1
        shutil.rmtree(root / "checkpoints" / f"{3:09d}")
        alone = outcome(root / "checkpoints", expected)
        assert (found, alone) in ((BEFORE, ERROR), (SAME, SAME)), name
        shutil.rmtree(root / "checkpoints")
        (root / "outside").unlink(missing_ok=True)
    return counts


def table(counts: dict[str, Counter[str]]) -> str:
    """Returns the rows of RELIABILITY.md."""
    rows = [f"| {kind} | {count.total()} | {count[BEFORE]} | {count[SAME]} |" for kind, count in counts.items()]
    total = sum(counts.values(), Counter())
    return "\n".join([*rows, f"| all | {total.total()} | {total[BEFORE]} | {total[SAME]} |"])


def test_no_damaged_checkpoint_gives_other_weights_a_traceback_or_a_silent_start(counts: dict[str, Counter[str]]) -> None:
    total = sum(counts.values(), Counter())
    assert total.total() >= 100
    assert total[SAME] == 2  # equal bytes from the one before, and a manifest with other spaces


def test_reliability_md_counts_the_damages(counts: dict[str, Counter[str]]) -> None:
    assert table(counts) in (Path(__file__).parents[2] / "RELIABILITY.md").read_text(), table(counts)

"""A checkpoint is restored only if it is what was written, where it was written; it is on the disk before it counts."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import research
from research.training import checkpoint, manifest
from research.training.manifest import Origin, config_digest

STATE = {"w": np.arange(300, dtype=np.float32), "count": np.int32(3)}
NAMES = {"w": "dense/kernel", "count": "iterations"}
ORIGIN = Origin("11" * 16, config_digest({"seed": 0}))
FORMAT_1 = ("step", "leaves", "logs", "files")


def save(directory: Path, step: int, origin: Origin = ORIGIN, **state: Any) -> Path:
    return checkpoint.save(directory, step, {**STATE, **state}, NAMES, {"loss": 0.5}, keep=9, origin=origin)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest as an editor does."""
    contents = json.loads((path / "manifest.json").read_text())
    change(contents)
    (path / "manifest.json").write_text(json.dumps(contents))


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest as a program does that knows its checksum."""

    def with_checksum(contents: dict[str, Any]) -> None:
        del contents["checksum"]
        change(contents)
        contents["checksum"] = manifest._checksum(contents)

    edit(path, with_checksum)


def data_file(path: Path) -> Path:
    return max((file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(path: Path) -> None:
    content = bytearray(data_file(path).read_bytes())
    content[len(content) // 2] ^= 1
    data_file(path).write_bytes(content)


def flip_bit_and_forget_the_file(path: Path) -> None:
    flip_bit(path)
    edit(path, lambda m: m["files"].pop(data_file(path).relative_to(path).as_posix()))


def flip_bit_and_record_it(path: Path) -> None:
    flip_bit(path)
    edit(
        path, lambda m: m["files"].update({data_file(path).relative_to(path).as_posix(): manifest._fingerprint(data_file(path))})
    )


def replace_by_directory(path: Path) -> None:
    file = data_file(path)
    file.unlink()
    file.mkdir()


def take_state_of_another(path: Path) -> None:
    other = save(path.parents[1] / "other", 6, w=np.zeros(300, np.float32))
    shutil.rmtree(path / "state")
    shutil.copytree(other / "state", path / "state")


def take_that_of_another_run(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(save(path.parents[1] / "other", 6, ORIGIN._replace(run="22" * 16)), path)


def write_manifest(data: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / "manifest.json").write_bytes(data)


def manifest_directory(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


WRONG = r"its manifest\.json has the wrong checksum"
UNREADABLE = r"its manifest\.json can't be read"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another step": (lambda path: edit(path, lambda m: m.update(step=7)), WRONG),
    "other logs": (lambda path: edit(path, lambda m: m["logs"].update(loss=0.25)), WRONG),
    "a log added": (lambda path: edit(path, lambda m: m["logs"].update(accuracy=1.0)), WRONG),
    "a leaf renamed": (lambda path: edit(path, lambda m: m["leaves"][0].__setitem__(0, "iterations/0")), WRONG),
    "leaves in another order": (lambda path: edit(path, lambda m: m["leaves"].reverse()), WRONG),
    "another run": (lambda path: edit(path, lambda m: m.update(run="22" * 16)), WRONG),
    "another config": (lambda path: edit(path, lambda m: m.update(config=config_digest({"seed": 1}))), WRONG),
    "another format": (lambda path: edit(path, lambda m: m.update(format=3)), WRONG),
    "no format": (lambda path: edit(path, lambda m: m.pop("format")), WRONG),
    "no checksum": (lambda path: edit(path, lambda m: m.pop("checksum")), WRONG),
    "neither": (lambda path: edit(path, lambda m: [m.pop("format"), m.pop("checksum")]), WRONG),
    "null checksum": (lambda path: edit(path, lambda m: m.update(checksum=None)), WRONG),
    "checksum of another": (lambda path: edit(path, lambda m: m.update(checksum="0" * 64)), WRONG),
    "an unknown field": (lambda path: edit(path, lambda m: m.update(note="mine")), WRONG),
    "a file not listed": (lambda path: edit(path, lambda m: m["files"].popitem()), WRONG),
    "no file listed": (lambda path: edit(path, lambda m: m.update(files={})), WRONG),
    "a file listed that is not there": (lambda path: edit(path, lambda m: m["files"].update(more=[0, 0])), WRONG),
    "a flipped bit": (flip_bit, r"state/.* has the wrong checksum"),
    "a flipped bit in a file not listed": (flip_bit_and_forget_the_file, WRONG),
    "a flipped bit with its checksum": (flip_bit_and_record_it, WRONG),
    "state of another": (take_state_of_another, r"state/.* is not listed in its manifest\.json"),
    "a file added": (lambda path: (path / "state" / "more").write_text("more"), "state/more is not listed in its manifest"),
    "an empty file added": (lambda path: (path / "more").touch(), "more is not listed in its manifest"),
    "a link added": (lambda path: (path / "more").symlink_to("state"), "more is not listed in its manifest"),
    "a directory for a file": (replace_by_directory, r"state/.* is missing or can't be read"),
    "an empty manifest": (write_manifest(b""), UNREADABLE),
    "zeros": (write_manifest(bytes(500)), UNREADABLE),
    "not UTF-8": (write_manifest(b"\xff\xfe{}"), UNREADABLE),
    "a list": (write_manifest(b"[]"), UNREADABLE),
    "an empty object": (write_manifest(b"{}"), WRONG),
    "NaN": (write_manifest(b'{"step": NaN, "checksum": "0"}'), UNREADABLE),
    "brackets": (write_manifest(b"[" * 100_000), UNREADABLE),
    "a directory": (manifest_directory, r"its manifest\.json is not a regular file"),
    "format 1 of other types": (
        write_manifest(json.dumps({"step": 6, "leaves": [], "logs": {}, "files": []}).encode()), UNREADABLE,
    ),
    "format 1 with a step as text": (
        write_manifest(json.dumps({"step": "6", "leaves": [], "logs": {}, "files": {}}).encode()), UNREADABLE,
    ),
}  # fmt: skip
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "renamed to a later step": (lambda path: path.rename(path.with_name("000000900")), "it is of step 6, expected 900"),
    "renamed over the latest": (
        lambda path: [shutil.rmtree(path), shutil.copytree(path.with_name("000000003"), path)],
        "it is of step 3, expected 6",
    ),
    "of another run": (
        take_that_of_another_run,
        "its run is '222222222222', expected '111111111111'",
    ),
    "of another config": (
        lambda path: rewrite(path, lambda m: m.update(config="3" * 64)),
        f"its config is '333333333333', expected '{config_digest({'seed': 0})[:12]}'",
    ),
    "of no known run": (lambda path: rewrite(path, lambda m: m.update(run=None)), "its run is unknown, expected '111111111111'"),
    "of a later version": (lambda path: rewrite(path, lambda m: m.update(format=3)), "it has format 3, expected at most 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGES, *FOREIGN])
def test_a_checkpoint_that_is_not_what_was_written_there_is_named_and_the_one_before_it_is_used(
    name: str, tmp_path: Path
) -> None:
    change, reason = {**DAMAGES, **FOREIGN}[name]
    directory = tmp_path / "checkpoints"
    older, path = save(directory, 3), save(directory, 6)
    change(path)
    path = max(directory.iterdir())
    lines: list[str] = []
    assert checkpoint.latest(directory, lines.append, ORIGIN) == older
    (line,) = lines
    verdict = "does not belong here" if name in FOREIGN else "is damaged"
    assert line.startswith(f"checkpoint {path} {verdict} ("), line
    problem = checkpoint.verify(path, ORIGIN)
    assert problem is not None
    assert re.match(reason, problem), problem
    with pytest.raises(research.InvalidArgument, match=rf"^checkpoint {path} can't be restored: {reason}") as error:
        checkpoint.restore(path, STATE, NAMES, ORIGIN)
    assert "\n" not in str(error.value)
    restored = checkpoint.restore_latest(directory, STATE, NAMES, lines.append, ORIGIN)
    assert restored is not None
    assert restored.step == 3
    shutil.rmtree(older)
    with pytest.raises(research.InvalidArgument, match="no intact checkpoint is left"):
        checkpoint.latest(directory, lines.append, ORIGIN)
    save(directory, 6)  # takes its place
    assert checkpoint.verify(directory / "000000006", ORIGIN) is None


def test_what_is_given_is_checked_and_what_is_not_given_is_not(tmp_path: Path) -> None:
    of_both, of_none = save(tmp_path / "both", 3), save(tmp_path / "none", 3, Origin())
    for origin in (Origin(), Origin(run=ORIGIN.run), Origin(config=ORIGIN.config), ORIGIN):
        assert checkpoint.restore(of_both, STATE, NAMES, origin).step == 3
    assert checkpoint.restore(of_none, STATE, NAMES).step == 3
    for origin in (Origin(run=ORIGIN.run), Origin(config=ORIGIN.config)):
        with pytest.raises(research.InvalidArgument, match="is unknown, expected"):
            checkpoint.restore(of_none, STATE, NAMES, origin)


def test_checkpoints_that_do_not_belong_here_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    foreign = save(tmp_path, 4, ORIGIN._replace(run="22" * 16))
    save(tmp_path, 7).rename(tmp_path / "000000008")
    for step in (3, 6, 9):
        checkpoint.save(tmp_path, step, STATE, NAMES, keep=2, origin=ORIGIN)
    assert checkpoint.steps(tmp_path) == [4, 6, 8, 9]
    assert checkpoint.verify(foreign, ORIGIN._replace(run="22" * 16)) is None
    assert checkpoint.latest(tmp_path, print, ORIGIN) == tmp_path / "000000009"


def test_a_copy_of_a_checkpoint_under_another_name_than_a_step_is_restored(tmp_path: Path) -> None:
    copy = shutil.copytree(save(tmp_path / "checkpoints", 3), tmp_path / "best")
    assert checkpoint.restore(copy, STATE, NAMES, ORIGIN).step == 3


def test_other_names_in_the_directory_are_no_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for name in ("3", "12", "000000004.old", "1\u00b2", "0000000005", "best", ".000000009"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / "000000007").write_text("a file")
    lines: list[str] = []
    assert checkpoint.steps(tmp_path) == [3, 7]
    assert checkpoint.latest(tmp_path, lines.append) == path
    assert lines == [f"checkpoint {tmp_path / '000000007'} is damaged (its manifest.json can't be read) and skipped"]


def test_a_checkpoint_of_version_0_1_is_restored_with_a_note(tmp_path: Path) -> None:
    path = save(tmp_path, 3, Origin())
    edit(path, lambda m: [m.pop(name) for name in [*m] if name not in FORMAT_1])
    lines: list[str] = []
    restored = checkpoint.restore_latest(tmp_path, STATE, NAMES, lines.append, ORIGIN)
    assert restored is not None
    assert restored.step == 3
    assert lines == [f"checkpoint {path} was written by version 0.1: its step, logs and run can't be verified"]
    flip_bit(path)
    assert checkpoint.verify(path, ORIGIN) is not None


def test_the_digest_of_a_config_depends_on_its_values_alone() -> None:
    digest = config_digest({"rate": 0.1, "sizes": (3, 4), "epochs": 3, "text": None})
    assert digest == config_digest({"epochs": 3.0, "text": None, "sizes": [3, 4], "rate": 0.1})
    others = [{"rate": 0.2}, {"sizes": [4, 3]}, {"epochs": 4}, {"text": ""}, {"more": 1}]
    base = {"rate": 0.1, "sizes": [3, 4], "epochs": 3, "text": None}
    assert len({digest, *(config_digest({**base, **other}) for other in others)}) == 6


@pytest.mark.parametrize("new_directory", [True, False])
def test_everything_is_flushed_in_the_saving_thread_before_the_checkpoint_counts(
    new_directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, logs = tmp_path / "run" / "checkpoints", tmp_path / "metrics.jsonl"
    logs.write_text("{}")
    if not new_directory:
        save(directory, 3)
        save(directory, 6)
    events: list[tuple[str, Path]] = []
    sync, rename, remove = os.fsync, Path.rename, shutil.rmtree

    def recorded_sync(descriptor: int) -> None:
        assert threading.current_thread().name.startswith("checkpoint")
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path))
        return rename(path, target)

    def recorded_remove(path: Path, **options: Any) -> None:
        events.append(("remove", Path(path)))
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    monkeypatch.setattr(shutil, "rmtree", recorded_remove)
    with checkpoint.async_saver(directory, NAMES, origin=ORIGIN, flush=[logs]) as hook:
        hook(9, jax.tree.map(jax.numpy.asarray, STATE), {})
    path = directory / "000000009"
    partial = directory.with_name(".checkpoints.partial")
    renames = [i for i, (event, _) in enumerate(events) if event == "rename"]
    assert [events[i] for i in renames] == [("rename", partial if new_directory else partial / path.name)]
    before = {file for event, file in events[: renames[0]] if event == "sync"}
    written = {path, *path.rglob("*")}
    assert before == {partial, logs, *(partial / file.relative_to(directory) for file in written)}
    after = [file for event, file in events[renames[0] :] if event == "sync"]
    if new_directory:
        assert after[0] == directory.parent
        assert tmp_path in after
    else:
        assert after == [directory]
        assert events.index(("remove", directory / "000000003")) > events.index(("sync", directory), renames[0])


def test_a_disk_that_fails_while_flushing_is_an_error_and_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 3)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"checkpoint of step 6 can't be written to .*Input/output error"):
        save(tmp_path, 6)
    assert checkpoint.latest(tmp_path, print, ORIGIN) == path
    assert checkpoint.steps(tmp_path) == [3]

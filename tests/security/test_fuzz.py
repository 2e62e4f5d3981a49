"""Readers of what may come from strangers: a valid value, or the project's error in one line; nothing is run or written."""

import dataclasses
import html.parser
import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any, Literal

import hostile
import mutations
import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import save

import research
from research.cli.fields import Interval, restore_config
from research.cli.options import Options
from research.debugging import history
from research.reporting import record, report, run_files
from research.training import checkpoint, manifest
from research.training.keras_files import FileError
from research.training.weight_files import open_weights


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 2
    steps: int | None = None
    rate: Annotated[float, Interval("(0, 1]")] = 0.1
    units: tuple[int, ...] = (8, 8)
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    names: dict[str, float] = dataclasses.field(default_factory=dict)


CONFIG = {
    "experiment": "digits", "id": "11" * 16, "file": "/home/me/mine.py",
    "config": {"epochs": 2, "steps": None, "rate": 0.5, "units": [8, 8], "kind": "a", "path": "data", "names": {"a": 1.0}},
    "options": Options().recorded(),
}  # fmt: skip
LINES = [
    {"step": step, "epoch": 0, "split": split, "values": {"loss": 0.5, "accuracy": None, "norm/kernel": 3}}
    for step in (1, 2)
    for split in ("train", "val")
]
SUMMARY = {"experiment": "digits", "status": "finished", "steps": 2, "metrics": {"loss": 0.5, "val_loss": None}, "parameters": 10}
SPEED = {"step": 1, "started": 0.5, "training_seconds": 1.0, "examples_per_second": 8.0}


def is_one_line(text: str) -> bool:
    return "\n" not in text and len(text) < 2000


def check(error: Exception, *kinds: type) -> None:
    """Fails unless an error is the project's own, in one line."""
    assert isinstance(error, kinds or research.InvalidArgument)
    assert is_one_line(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@mutations.fuzzed(120)
@given(data=mutations.texts(CONFIG))
def test_config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    with mutations.watched():
        try:
            recorded = run_files.read_config(folder)
        except research.InvalidArgument as error:
            check(error)
            return
        for config_class, values in ((Config, recorded.config), (Options, recorded.options)):
            try:
                assert isinstance(restore_config(config_class, values), config_class)
            except research.InvalidArgument as error:
                check(error)


@mutations.fuzzed(120)
@given(lines=mutations.texts(LINES))
def test_metrics(folder: Path, lines: bytes) -> None:
    try:
        text = b"\n".join(json.dumps(line).encode("utf-8", "surrogatepass") for line in json.loads(lines))
    except (ValueError, TypeError, RecursionError):
        text = lines.replace(b"}, ", b"}\n")
    (folder / "metrics.jsonl").write_bytes(text)
    reports: list[str] = []
    with mutations.watched():
        entries = run_files.read_metrics(folder, reports.append)
        record.latest_metrics(entries)
    assert all(map(is_one_line, reports))
    assert len(reports) <= 1
    for entry in entries:
        assert 0 <= entry.step <= 2**53
        assert type(entry.split) is str
        assert all(type(name) is str and type(value) is float for name, value in entry.values.items())


@mutations.fuzzed(100)
@given(data=mutations.texts(SUMMARY))
def test_summary_versions_and_code(folder: Path, data: bytes) -> None:
    for name in ("summary.json", "versions.json", "code.json"):
        (folder / name).write_bytes(data)
    reports: list[str] = []
    with mutations.watched():
        summary = run_files.read_summary(folder, reports.append)
        assert isinstance(run_files.read_versions(folder, reports.append), dict)
        assert isinstance(run_files.read_code(folder, reports.append), dict)
    assert all(map(is_one_line, reports))
    assert (summary is None) <= bool(reports)


@mutations.fuzzed(100)
@given(data=mutations.texts(SPEED), decision=mutations.texts({"step": 37, "restored": 36, "reason": "spike"}))
def test_performance_and_decisions(folder: Path, data: bytes, decision: bytes) -> None:
    (folder / "performance.jsonl").write_bytes(data)
    (folder / "decisions.jsonl").write_bytes(decision)
    with mutations.watched():
        for line in run_files.read_performance(folder, run_files.ignore):
            assert all(math.isfinite(value) for value in line.values())
        try:
            assert all(0 <= each.restored < each.step for each in history.read_decisions(folder))
        except research.InvalidArgument as error:
            check(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = hostile.save(tmp_path_factory.mktemp("saved") / "checkpoints")
    return path, json.loads((path / manifest.MANIFEST).read_text())


MANIFEST = {
    "format": 2, "step": 6, "run": None, "config": None, "weak_types": [], "logs": {"loss": 0.5},
    "leaves": [["iterations", [], "int32"], ["dense/kernel", [6], "float32"]],
}  # fmt: skip


@mutations.fuzzed(60)
@given(contents=mutations.documents(MANIFEST), data=mutations.damaged(json.dumps(MANIFEST).encode()))
def test_manifest(saved: tuple[Path, dict[str, Any]], contents: Any, data: bytes) -> None:
    path, original = saved
    if isinstance(contents, dict):  # as one writes it who knows how checksums are made
        contents = {"files": original["files"], **contents}
        try:
            contents["checksum"] = manifest._checksum(contents)
        except ValueError:  # NaN
            contents["checksum"] = "0" * 64
    for text in (json.dumps(contents).encode("utf-8", "surrogatepass"), data):
        (path / manifest.MANIFEST).write_bytes(text)
        with mutations.watched():
            try:
                restored = checkpoint.restore(path, hostile.STATE, hostile.NAMES)
            except research.InvalidArgument as error:
                check(error)
                continue
        np.testing.assert_array_equal(restored.state["w"], hostile.STATE["w"])
        assert restored.state["count"] == hostile.STATE["count"]
        assert restored.step == 6


ARRAYS = {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.arange(2, dtype=np.float16), "step": np.array(3)}
GOOD = save(ARRAYS)
HEADER = json.loads(GOOD[8 : 8 + struct.unpack("<Q", GOOD[:8])[0]])
DATA = GOOD[8 + struct.unpack("<Q", GOOD[:8])[0] :]


def _file(header: Any) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + DATA


@mutations.fuzzed(120)
@given(data=mutations.documents(HEADER).map(_file) | mutations.damaged(GOOD))
def test_safetensors(folder: Path, data: bytes) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    with mutations.watched():
        try:
            with open_weights(path, print) as weights:
                for array in weights.arrays.values():
                    values = array.read((slice(None),) * len(array.shape))
                    assert values.shape == array.shape
                    assert values.nbytes <= len(data)
        except Exception as error:
            check(error, research.InvalidArgument, FileError)


class Tags(html.parser.HTMLParser):
    """The tags of a page, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attributes)}


@mutations.fuzzed(50)
@given(summary=mutations.documents(SUMMARY), lines=mutations.documents(LINES), config=mutations.documents(CONFIG))
def test_a_page_about_a_run_holds_text_from_files_as_text(
    tmp_path_factory: pytest.TempPathFactory, summary: Any, lines: Any, config: Any
) -> None:
    directory = tmp_path_factory.mktemp("run")
    contents = {"config.json": config, "summary.json": summary, "metrics.jsonl": lines}
    for name, value in contents.items():
        parts = value if name == "metrics.jsonl" and isinstance(value, list) else [value]
        text = "\n".join(json.dumps(part) for part in parts)
        (directory / name).write_text(text, "utf-8", "surrogatepass")
    with mutations.watched(directory):
        try:
            run, _ = record.read_run(directory)
        except research.InvalidArgument:
            return
        page = report.write_report(run).read_text()
    known = set(
        [
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "h1",
            "h2",
            "section",
            "div",
            "table",
            "tr",
            "th",
            "td",
            "code",
            "p",
            "span",
        ]
    )
    known |= {"html lang", "meta charset", "meta name", "meta content", "div class", "span class"}
    assert Tags(page).found <= known

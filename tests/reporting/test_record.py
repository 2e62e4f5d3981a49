"""Run directories: who may have one, what killed processes leave in it, which run is the latest."""

import errno
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from research.core.state import InvalidArgument
from research.reporting import comparison, picture, record, report, run_files
from research.training.logs import LogEntry


def test_runs_that_start_in_the_same_second_get_directories_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.time, "strftime", lambda form: "20260102-030405")
    chosen: list[Path] = []
    threads = [threading.Thread(target=lambda: chosen.append(record.new_directory("toy", tmp_path))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(chosen)) == 12
    assert all(path.is_dir() for path in chosen)
    for path in chosen:
        (path / "config.json").write_text("{}")
    assert record.find_run("toy", tmp_path).name == "20260102-030405-11"  # the latest, though "-9" sorts after "-11"


def test_a_later_second_is_later_than_any_number_of_runs_in_an_earlier_one(tmp_path: Path) -> None:
    for name in ("20260102-030405", "20260102-030405-10", "20260102-030406", "20251231-235959"):
        (tmp_path / "toy" / name).mkdir(parents=True)
        (tmp_path / "toy" / name / "config.json").write_text("{}")
    assert record.find_run("toy", tmp_path).name == "20260102-030406"


def test_a_directory_that_can_not_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "toy").write_text("a file")
    with pytest.raises(InvalidArgument, match=r"toy/.*: it can't be created .Not a directory.; choose another place: --run-dir"):
        record.new_directory("toy", tmp_path)


@pytest.mark.parametrize(
    "names", [[".lock"], [".lock", "error.txt"], [".lock", ".config.json.partial"], [".config.json.123.partial", "error-3.txt"]]
)
def test_what_a_process_leaves_that_was_killed_at_its_start_does_not_occupy_the_directory(
    names: list[str], tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    run, summary = record.open_run(tmp_path, "toy", {})
    assert summary is None
    with record.lock(run):
        record.start(run, {})
    assert record.read_run(tmp_path)[0].experiment == "toy"
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "lock", "error.txt.bak", "checkpoints", ".partial.txt"])
def test_any_other_file_occupies_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(InvalidArgument, match="it is not empty and holds no run; choose a new directory"):
        record.open_run(tmp_path, "toy", {})


def test_half_written_files_are_removed_when_a_run_goes_on(tmp_path: Path) -> None:
    run, _ = record.open_run(tmp_path / "run", "toy", {})
    (tmp_path / "run" / "plots" / "epochs").mkdir(parents=True)
    record.start(run, {})
    kept = [tmp_path / "run" / name for name in ("partial", "mine.partial")]
    partials = [".summary.json.partial", ".report.html.9.partial", "plots/.curves.png.9.partial", "plots/epochs/.a.png.9.partial"]
    for path in [*kept, *(tmp_path / "run" / name for name in partials)]:
        path.write_text("")
    (tmp_path / "run" / ".checkpoints.partial" / "000000003").mkdir(parents=True)
    record.start(run, {})
    assert all(path.exists() for path in kept)
    assert not [path for path in (tmp_path / "run").rglob(".*.partial")]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record.write_text(tmp_path / "file.txt", "old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        record.write_text(tmp_path / "file.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_halves_of_surrogate_pairs_and_bytes_in_names_do_not_prevent_a_report(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"run \xff")
    directory.mkdir()
    (directory / "config.json").write_text('{"experiment": "a\\ud800", "config": {"note\\udfff": "\\ud83c\\udf89 \\ud83c"}}')
    run, _ = record.read_run(directory)
    assert (run.experiment, run.config) == ("a?", {"note?": "🎉 ?"})
    page = report.write_report(run).read_text()
    assert "🎉 ?" in page
    assert "run ?" in page


NAMES = ["$", "$x$", "$\\frac{$", "a_b^{", "\\", "_loss", "损失 🎉", "a\0b", "line\nbreak", "", "%s {} <b>", "x" * 500]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    logs = [LogEntry(step, 0, name, {name: 1.0 / step}) for step in (1, 2)]
    figure = picture.plot_curves(logs)
    shown = name if len(name) < 100 else f"{name[:60]} ..."
    assert [axes.get_title() for axes in figure.axes] == [shown]
    assert [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()] == [shown] or not name
    for drawn in (figure, picture.plot_comparison({name: logs, "other": logs})):
        assert record.png_bytes(drawn).startswith(run_files.PNG_SIGNATURE)


@pytest.mark.parametrize(
    "values",
    [
        [1e308, -1e308],
        [1e308] * 3,
        [1e200] * 3,
        [-1e200, 1e200],
        [5e-324] * 3,
        [math.inf, 1.0],
        [math.nan] * 2,
        [1e300, math.nan],
    ],
)
@pytest.mark.parametrize("steps", [(1, 2, 3), (0, 2**53 - 1, 2**53), (5, 5, 5)])
def test_numbers_of_any_size_are_drawn_or_left_out(values: list[float], steps: tuple[int, ...]) -> None:
    logs = [LogEntry(step, 0, "train", {"loss": value}) for step, value in zip(steps, values, strict=False)]
    for figure in (picture.plot_curves(logs), picture.plot_comparison({"a": logs, "b": logs})):
        assert record.png_bytes(figure).startswith(run_files.PNG_SIGNATURE)


def test_a_comparison_shows_huge_whole_numbers(tmp_path: Path) -> None:
    for name, size in (("a", 10**300), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"experiment": "toy", "config": {"size": size}}))
        (tmp_path / name / "summary.json").write_text(json.dumps({"status": "stopped", "metrics": {"loss": size}, "steps": size}))
    runs = [record.read_run(tmp_path / name)[0] for name in ("a", "b")]
    assert f"{10**300:,}" in comparison.write_comparison(runs, tmp_path / "page.html").read_text()

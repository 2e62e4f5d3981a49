"""`just export RUN --step`: the next batches of a run and its step, in a folder of their own."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiment_file import write_experiment

from research.cli import export, run

pytestmark = pytest.mark.slow


@pytest.fixture
def _finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """A finished run of mine.py, 8 steps, in `run` of the current directory."""
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path)
    assert run.main(["mine.py", "--run-dir", "run"]) == 0
    capsys.readouterr()
    yield
    for name in ("mine", "sibling"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("_finished")
def test_the_step_of_a_run_is_written_once_with_its_next_batches(capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["run", "--step", "--batches", "5"]) == 0
    folder = Path("run/exported/000000008")
    assert capsys.readouterr().out == f"step 8: {folder}\n"
    contents = json.loads((folder / "step.json").read_text())
    assert (contents["step"], contents["steps_per_epoch"], len(contents["batches"])) == (8, 4, 5)
    assert export.main(["run", "--step"]) == 1
    assert capsys.readouterr().err == f"error: {folder}: it exists already; choose another folder, or remove it.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "just export RUN: one run directory, or an experiment's name for its latest run."),
        (["run", "--step", "--batches", "0"], "just export RUN: --batches 0: expected a value in [1, 10000]."),
        (["run", "--steps"], "just export RUN: unrecognized arguments: --steps."),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"

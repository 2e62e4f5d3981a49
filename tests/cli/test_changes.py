"""A run whose code or config changed since it stopped says so, and goes on only if that is allowed."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import strict
from experiment_file import write_experiment

from research.cli import resume, run

OPTIONS = ["--run-dir", "run", "--checkpoint-every", "3"]
ADVICE = "put back what it was, or go on with it as it is: --allow-changed.\n"

pytestmark = pytest.mark.slow


def forget_modules() -> None:
    for name in ("mine", "sibling"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """A run of mine.py that was killed after step 6 of 8, in the current directory."""
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path)
    assert run.main(["mine.py", *OPTIONS]) == 0
    Path("run/summary.json").unlink()
    shutil.rmtree(Path("run/checkpoints") / f"{8:09d}")
    forget_modules()
    capsys.readouterr()
    yield Path("run")
    forget_modules()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def resumed_from(directory: Path) -> int:
    step: int = strict((directory / "summary.json").read_text())["resumed_from"]
    return step


def test_an_unchanged_run_goes_on_without_a_word(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume.main(["run"]) == 0
    assert (capsys.readouterr().err, resumed_from(directory)) == ("", 6)


def test_the_summary_of_a_resumed_run_has_the_metrics_logged_before_it_was_stopped(directory: Path) -> None:
    arguments = ["mine.py", "--run-dir", "longer", "--epochs", "30", "--checkpoint-every", "110"]
    assert run.main(arguments) == 0  # 120 steps; norms are logged after step 100
    summary = Path("longer/summary.json")
    expected = strict(summary.read_text())["metrics"]
    assert "gradient_norm" in expected
    summary.unlink()
    shutil.rmtree(Path("longer/checkpoints") / f"{120:09d}")
    assert resume.main(["longer"]) == 0
    assert resumed_from(Path("longer")) == 110
    assert strict(summary.read_text())["metrics"] == expected


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("mine.py", "Fits a line.", "Fits no line."), ("sibling.py", "size=(32, 4)", "scale=2, size=(32, 4)")],
)
def test_changed_code_of_the_experiment_is_named_and_needs_permission(
    file: str, old: str, new: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(Path(file), old, new)
    before = sorted(directory.rglob("*"))
    assert resume.main(["run"]) == 1
    message = f"run: the code changed since the run stopped ({Path.cwd().name}/{file})"
    assert capsys.readouterr().err == f"error: {message}; {ADVICE}"
    assert sorted(directory.rglob("*")) == before
    assert resume.main(["run", "--allow-changed"]) == 0
    assert (capsys.readouterr().err, resumed_from(directory)) == (f"{message}; it goes on with what there is now\n", 6)


def test_changed_packages_and_changed_code_of_the_library_are_named(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = directory / "code.json"
    code = strict(path.read_text())
    assert {"core/step.py", "training/loop.py"} < code["research"].keys()
    assert code["experiment"].keys() == {"mine.py", "sibling.py"}
    code["packages"]["jax"] = "0.1"
    code["research"]["core/step.py"] = "0" * 16
    path.write_text(json.dumps(code))
    assert resume.main(["run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: run: the code changed since the run stopped (jax was 0.1, now ")
    assert error.endswith(f"; research/core/step.py); {ADVICE}")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"packages": 3, "research": {"/dev/zero.py": "a", "../x.py": "b", "core": "c"}, "experiment": {"a": 1}}']
)
def test_a_damaged_or_strange_code_file_reads_nothing_else_and_stops_nothing(
    text: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "code.json").write_text(text)
    assert resume.main(["run"]) == 0
    assert capsys.readouterr().err.count("code.json") == (not text.startswith("{"))


def test_a_run_without_a_code_file_is_one_of_an_earlier_version(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "code.json").unlink()
    assert resume.main(["run"]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_as_version_0_1_wrote_it_goes_on(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = (directory / "metrics.jsonl").read_text()
    (directory / "code.json").unlink()
    config = strict((directory / "config.json").read_text())
    names = ("log_every", "checkpoint_every", "mesh", "layout", "compiler_flags")
    config["options"] = {name: config["options"][name] for name in names}
    del config["id"]
    (directory / "config.json").write_text(json.dumps(config))
    for path in directory.glob("checkpoints/*/manifest.json"):
        manifest = strict(path.read_text())
        path.write_text(json.dumps({name: manifest[name] for name in ("step", "leaves", "logs", "files")}))
    assert resume.main(["run"]) == 0
    note = "was written by version 0.1: its step, logs and run can't be verified\n"
    assert capsys.readouterr().err == f"checkpoint run/checkpoints/{6:09d} {note}"
    assert resumed_from(directory) == 6
    assert (directory / "metrics.jsonl").read_text() == metrics


def test_a_config_that_was_edited_needs_permission_and_is_then_the_runs_own(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(directory / "config.json", '"epochs": 2', '"epochs": 3')
    assert resume.main(["run"]) == 1
    message = "run: its config is not the one of its checkpoint of step 6"
    assert capsys.readouterr().err == f"error: {message}; {ADVICE}"
    assert resume.main(["run", "--allow-changed"]) == 0
    assert capsys.readouterr().err == f"{message}; it goes on with what there is now\n"
    assert strict((directory / "summary.json").read_text())["steps"] == 12
    (directory / "summary.json").unlink()
    shutil.rmtree(directory / "checkpoints" / f"{12:09d}")
    assert resume.main(["run"]) == 0, capsys.readouterr().err


def test_a_finished_run_is_trained_on_for_more_epochs(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["mine.py", *OPTIONS]) == 0
    capsys.readouterr()
    assert run.main(["mine.py", *OPTIONS, "--epochs", "4"]) == 1
    assert capsys.readouterr().err.endswith(
        "(epochs was 2, now 4); give the same options, a new directory, or --allow-changed to go on.\n"
    )
    assert run.main(["mine.py", *OPTIONS, "--epochs", "4", "--allow-changed"]) == 0
    assert capsys.readouterr().err == "run: its run had another config (epochs was 2, now 4); it goes on with the new one\n"
    assert (resumed_from(directory), strict((directory / "summary.json").read_text())["steps"]) == (8, 16)

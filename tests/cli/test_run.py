"""`research run`: what it writes, what it rejects, and the numbers that the experiments promise."""

import ast
import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import ROOT, command, contents, strict

from research.cli import outputs, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run with the default options."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = command("digits", "--run-dir", directory.name, cwd=directory.parent)
    assert done.returncode == 0, done.stderr
    return directory


def test_digits_reaches_what_its_docstring_promises(finished: Path) -> None:
    summary = strict((finished / "summary.json").read_text())
    assert summary["metrics"]["val_accuracy"] >= 0.97
    assert summary["metrics"]["test_accuracy"] >= 0.94
    assert (summary["experiment"], summary["status"], summary["steps"], summary["epochs"]) == ("digits", "finished", 900, 20)
    assert summary["parameters"] == 64 * 512 + 512 + 512 * 10 + 10
    assert summary["resumed_from"] is None
    assert summary["steps_per_second"] > 0
    assert summary["seconds_to_first_step"] > 0


def test_a_run_leaves_its_config_versions_logs_pictures_and_report(finished: Path) -> None:
    assert strict((finished / "config.json").read_text())["config"]["epochs"] == 20
    assert strict((finished / "versions.json").read_text())["jax"]
    lines = [strict(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all(sorted(line) == ["epoch", "split", "step", "values"] for line in lines)
    assert [line["step"] for line in lines if line["split"] == "val"] == [45 * (i + 1) for i in range(20)]
    assert lines[-1]["split"] == "test"
    for name in ("curves", "mistakes", "model"):
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + ('alt="speed"' in page)  # a fast machine trains too briefly for a speed
    assert "http" not in page  # opens offline


def test_a_run_continues_when_a_device_lacks_the_memory_for_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gan = importlib.import_module("experiments.gan")

    def out_of_memory(*parts: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 30064771072 bytes.")

    monkeypatch.setattr(gan, "each_epoch", out_of_memory)
    monkeypatch.setattr(gan, "results", lambda *parts: {})
    monkeypatch.setattr(gan, "pictures", lambda *parts: {})
    assert run.main(["gan", "--steps", "2", "--run-dir", str(tmp_path / "run")]) == 0
    assert "no pictures of epoch 1: a device has no room for them" in capsys.readouterr().err
    assert strict((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def test_models_for_files_are_built_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = importlib.import_module("experiments.digits")
    state = digits.build(digits.Config()).init()
    host = jax.devices()[3]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [host] if backend == "cpu" else [])
    (model,) = outputs.build_models(digits, digits.Config(), jax.tree.map(np.asarray, state)).values()
    assert {device for variable in model.variables for device in variable.value.devices()} == {host}


def test_a_finished_run_is_not_run_again(finished: Path) -> None:
    before = contents(finished)
    again = command("digits", "--run-dir", str(finished), cwd=finished.parent)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is finished" in again.stdout
    assert contents(finished) == before


def test_the_same_config_gives_the_same_numbers_in_every_style(finished: Path, tmp_path: Path) -> None:
    expected = strict((finished / "summary.json").read_text())["metrics"]
    for style in ("functional", "subclassed"):
        done = command("digits", "--style", style, "--run-dir", style, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert strict((tmp_path / style / "summary.json").read_text())["metrics"] == expected


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits", "--epoch", "3"], 2, "error: no option '--epoch': did you mean '--epochs'?"),
        (["digit"], 2, "error: no experiment 'digit': did you mean 'digits'?"),
        (
            ["digits", "--batch-size", "2000", "--run-dir", "new"],
            1,
            "error: sklearn (train): the batch size is 2000 but there are",
        ),
        (
            ["digits", "--data", "mnist", "--run-dir", "new"],
            1,
            "error: --data mnist: not in Keras' cache, and the download failed",
        ),
        (
            ["digits", "--epochs", "4", "--run-dir", "RUN"],
            1,
            "error: --run-dir RUN: its run had another config (epochs was 20, now 4)",
        ),
        (["digits", "--run-dir", "OTHER"], 1, "error: --run-dir OTHER: it holds a run of 'gan', not of 'digits'"),
        (["digits", "--run-dir", "FULL"], 1, "error: --run-dir FULL: it is not empty and holds no run"),
        (["digits", "--run-dir", "FULL/file"], 1, "error: --run-dir FULL/file: "),
        (["digits", "--run-dir", "/proc/none"], 1, "error: --run-dir /proc/none: it can't be written"),
    ],
)
def test_bad_input_gives_one_line_and_changes_no_file(
    arguments: list[str], code: int, message: str, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER" / "config.json").write_text('{"experiment": "gan", "config": {}}')
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "file").write_text("a file of the user")
    (tmp_path / "RUN").symlink_to(finished)
    before = contents(tmp_path), contents(finished)
    # A proxy that does not exist: nothing is downloaded, wherever this runs.
    done = command(*arguments, cwd=tmp_path, KERAS_HOME=str(tmp_path / "keras"), https_proxy="http://127.0.0.1:9")
    (last,) = done.stderr.splitlines()[-1:]
    assert (done.returncode, last[: len(message)]) == (code, message)
    assert "Traceback" not in done.stderr
    for path in list((tmp_path / "keras").rglob("*")):
        if path.is_file():
            path.unlink()
    assert (contents(tmp_path), contents(finished)) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["digits", "--epochs", "many"], ["digits", "--data", "cifar"]])
def test_wrong_values_exit_with_2(arguments: list[str], tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert arguments[1].lstrip("-") in done.stderr


def test_without_a_name_every_experiment_is_listed_with_a_line(tmp_path: Path) -> None:
    done = command(cwd=tmp_path)
    assert done.returncode == 0
    for path in (ROOT / "experiments").glob("[!_]*.py"):
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [path.stem])
        assert len(line.split()) > 3


def test_a_failing_run_reports_one_line_and_the_status_failed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('BREAK'):\n"
        "    import research.training.loop\n"
        "    def broken(*_, **__): raise RuntimeError('out of luck')\n"
        "    research.training.loop.evaluate = broken\n"
    )
    done = command("digits", "--epochs", "1", "--run-dir", "run", cwd=tmp_path, PYTHONPATH=str(tmp_path), BREAK="1")
    assert done.returncode == 1
    reason = f"error: {tmp_path / 'sitecustomize.py'}:4: RuntimeError: out of luck; the traceback is in run/error.txt"
    assert done.stderr.splitlines()[-1] == reason
    assert strict((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert "broken" in (tmp_path / "run" / "error.txt").read_text()


def test_slow_packages_are_not_imported_before_they_are_used() -> None:
    def modules_after(imported: str) -> set[str]:
        code = f"import {imported}, sys; print(*(m for m in sys.modules if m in {slow}))"
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return set(done.stdout.split())

    slow = (
        "orbax.checkpoint",
        "matplotlib.figure",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "tyro",
        "rich.progress",
        "tensorboard",
    )
    assert modules_after("research") <= modules_after("keras")  # Keras itself loads some of them where they are installed


def test_values_that_are_not_finite_are_null_in_the_logs(tmp_path: Path) -> None:
    from research.reporting import picture, record
    from research.training.logs import LogEntry

    run, _ = record.open_run(tmp_path / "run", "digits", {})
    (tmp_path / "run").mkdir()
    record.start(run, {})
    record.append_entry(run, LogEntry(1, 0, "train", {"loss": math.nan, "accuracy": math.inf}))
    assert strict((tmp_path / "run" / "metrics.jsonl").read_text())["values"] == {"loss": None, "accuracy": None}
    assert math.isnan(record.read_entries(run)[0].values["loss"])
    record.save_figures(run, {"curves": picture.plot_curves(record.read_entries(run))})


def test_a_terminal_shows_a_bar_and_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    from research.reporting.progress import show_progress
    from research.training.logs import LogEntry

    with show_progress(10, 5, terminal=True) as (log, progress):
        for step in range(1, 11):
            log(LogEntry(step, (step - 1) // 5, "train", {"loss": 1.0 / step}))
            progress(step, waited=1.0)
    shown = capsys.readouterr().out
    assert "epoch 1/2  step 5" in shown
    assert "step 3" not in shown
    assert "10/10" in shown
    assert "% waiting for data" in shown


def test_the_runner_has_no_knowledge_of_single_experiments() -> None:
    names = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    for path in (ROOT / "research" / "cli").glob("*.py"):
        code = ast.parse(path.read_text())
        for node in ast.walk(code):  # docstrings may give examples
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = [*node.body[1:], ast.Pass()]
        words = set(re.findall(r"\w+", ast.unparse(code)))
        assert not words & names, path

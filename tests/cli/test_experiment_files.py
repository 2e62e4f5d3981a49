"""Experiments outside of the checkout: found by path, resumed from their file, run by an installed package."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from command_line import ROOT, research, strict
from experiment_file import write_experiment

from research.cli import experiment, runs
from research.core.state import InvalidArgument

EACH_EPOCH = """

def each_epoch(config, learner, state, splits):
    import time

    time.sleep(0.05)
    return {}
"""


def test_a_file_is_imported_once_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    file = write_experiment(tmp_path)
    loaded = experiment.load_experiment(str(file))
    assert (loaded.name, loaded.module.__name__, loaded.file) == ("mine", "mine", file)
    assert experiment.load_experiment(str(file)).module is loaded.module


def test_a_file_with_the_name_of_another_module_does_not_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    file = write_experiment(tmp_path).rename(tmp_path / "keras.py")
    import keras

    loaded = experiment.load_experiment(str(file))
    assert (loaded.name, loaded.module.__name__) == ("keras", "experiment_keras")
    assert sys.modules["keras"] is keras


def test_a_file_in_a_package_can_import_relatively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    file = write_experiment(tmp_path / "project", ("import sibling", "from . import sibling"))
    (tmp_path / "project" / "__init__.py").touch()
    assert experiment.load_experiment(str(file)).module.__name__ == "project.mine"


def test_names_are_looked_up_in_the_current_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_experiment(tmp_path / "experiments").with_name("sibling.py").rename(tmp_path / "experiments" / "_sibling.py")
    monkeypatch.chdir(tmp_path)
    assert experiment.list_experiments()["mine"] == "Fits a line."
    assert "digits" in experiment.list_experiments()
    monkeypatch.setattr(experiment, "CHECKOUT", tmp_path / "site-packages")
    assert experiment.list_experiments() == {"mine": "Fits a line."}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import research\nx = 1 +\n", "mine.py:2: SyntaxError: invalid syntax; the experiment can't be imported."),
        ("import research\nimport not_there\n", "mine.py:2: ModuleNotFoundError: No module named 'not_there'; the experiment "),
        ("def f():\n    return 1 / 0\n\n\nf()\n", "mine.py:2: ZeroDivisionError: division by zero; the experiment can't be "),
    ],
)
def test_a_file_that_can_not_be_imported_is_reported_with_its_line(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(InvalidArgument) as error:
        experiment.load_experiment(str(tmp_path / "mine.py"))
    assert reason in str(error.value)
    assert "mine" not in sys.modules


def test_a_run_whose_experiment_has_moved_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "gone.py"
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "gone", "file": str(file), "config": {}}))
    with pytest.raises(InvalidArgument) as error:
        runs.load_run(str(tmp_path))
    assert (
        str(error.value) == f"{tmp_path}: its experiment {str(file)!r} is not there any more; move it back, or edit config.json."
    )


def test_without_a_checkout_run_asks_for_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from research.cli import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "CHECKOUT", tmp_path / "site-packages")
    assert run.main([]) == 0
    assert "give the path of an experiment's file" in capsys.readouterr().out
    assert run.main(["digits"]) == 2
    assert capsys.readouterr().err == "error: no experiment 'digits': give the path of an experiment's file.\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `research` command of an environment into which the package was installed, beside the packages of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    source = folder.parent / "source"
    source.mkdir()
    for name in ("research", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(purelib)]
    built = subprocess.run([*install, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (purelib / "other_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = "from research.cli.main import command; command()"
    return _executable(folder / "bin" / "research", f"#!{folder / 'bin' / 'python'}\n{script}\n")


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_an_installed_package_runs_resumes_reports_and_exports_a_file_from_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    file = write_experiment(tmp_path / "project", append=EACH_EPOCH)
    here = tmp_path / "empty"
    here.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([installed, *arguments], capture_output=True, text=True, cwd=here, env=environment, check=False)

    where = subprocess.run(
        [installed.with_name("python"), "-c", "import research; print(research.__file__)"],
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert where.stdout.startswith(str(installed.parents[1])), where.stdout + where.stderr  # not the checkout's
    listed = call("run")
    assert "There are no experiments here" in listed.stdout, listed.stderr

    process = subprocess.Popen(
        [installed, "run", "../project/mine.py", "--epochs", "400", "--units", "3", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("/")[0].split() == ["epoch", "3"]:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    (run,) = (here / "runs" / "mine").iterdir()
    assert strict((run / "config.json").read_text())["file"] == str(file)

    resumed = call("resume", "mine")
    assert resumed.returncode == 0, resumed.stderr
    summary = strict((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 1600)
    assert summary["resumed_from"] > 0
    (run / "line.keras").unlink()
    exported = call("export", "mine")
    assert exported.returncode == 0, exported.stderr
    assert (run / "line.keras").is_file()
    reported = call("report", str(run))
    assert (reported.returncode, (run / "report.html").is_file()) == (0, True), reported.stderr


@pytest.mark.slow
def test_a_bug_in_a_users_code_is_reported_with_its_line_and_a_traceback_that_the_mended_run_removes(tmp_path: Path) -> None:
    loss = "\n\ndef loss(y, p):\n    return keras.ops.mean(y - p.missing)\n"
    broken = (('loss="mse"', "loss=loss"),)
    file = write_experiment(tmp_path, *broken, append=loss)
    done = research("run", "mine.py", "--run-dir", "run", cwd=tmp_path)
    line = 1 + file.read_text().splitlines().index("    return keras.ops.mean(y - p.missing)")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {file}:{line}: AttributeError: "), last
    assert last.endswith("; the traceback is in run/error.txt")
    assert "p.missing" in (tmp_path / "run" / "error.txt").read_text()
    write_experiment(tmp_path, *broken, append=loss.replace("p.missing", "p[:, :2] + keras.ops.ones((3, 1))"))
    done = research("run", "mine.py", "--run-dir", "run", cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last.startswith(f"error: {file}:{line}: ")) == (1, True), last
    assert last.endswith("; the traceback is in run/error.txt")
    write_experiment(tmp_path)
    done = research("run", "mine.py", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "error.txt").exists()

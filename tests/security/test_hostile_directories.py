"""A run directory whose entries lead elsewhere: no command writes, removes or waits there."""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from research.cli import export, replay, report, resume, run

EXPERIMENT = '''"""Fits a line."""

from dataclasses import dataclass

import research
import keras
import numpy as np


@dataclass(frozen=True)
class Config:
    epochs: int = 2
    steps: int | None = None
    batch_size: int = 8
    seed: int = 0


def build(config):
    keras.utils.set_random_seed(config.seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    return research.supervised(model, loss="mse", optimizer="sgd")


def data(config):
    x = np.random.default_rng(config.seed).normal(size=(32, 4)).astype(np.float32)
    return {"train": research.from_arrays(x, x[:, :1], batch_size=config.batch_size, seed=config.seed)}


def models(config, state):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    research.write_back(state, model)
    return {"line": model}
'''
OPTIONS = ["--run-dir", "run", "--checkpoint-every", "3", "--log-every", "1"]
COMMANDS = {
    "run": lambda: run.main(["linear.py", *OPTIONS]),
    "resume": lambda: resume.main(["run"]),
    "export": lambda: export.main(["run"]),
    "report": lambda: report.main(["run"]),
    "replay": lambda: replay.main(["run", "--step", "5"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory, with an experiment, linear.py, and its finished run in `finished`."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "enable_compilation_cache", lambda: None)
        patch.setattr(replay, "enable_compilation_cache", lambda: None)
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        Path("linear.py").write_text(EXPERIMENT)
        assert COMMANDS["run"]() == 0
        Path("run").rename("finished")
        yield folder
    sys.modules.pop("linear", None)
    importlib.invalidate_caches()


@pytest.fixture
def directory(folder: Path) -> Iterator[Path]:
    """The directory of a run that was killed after its checkpoint of step 6."""
    shutil.copytree(folder / "finished", "run")
    Path("run", "summary.json").unlink()
    shutil.rmtree(Path("run", "checkpoints", f"{8:09d}"))
    yield Path("run")
    shutil.rmtree("run")
    shutil.rmtree("outside", ignore_errors=True)


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


DIRECTORIES = (
    "checkpoints", ".checkpoints.partial", "start", ".start.partial", "plots", "plots/epochs", "tensorboard", "tensorboard/train",
    "replay", "replay/000000005", "failures", "exported", "profile",
)  # fmt: skip
FILES = (
    ".lock", "error.txt", "decisions.jsonl", "line.keras", "line.weights.h5", "tensorboard/train/events.out.tfevents.0",
    "replay/000000005/batch.npz",
)  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_is_a_link_ends_each_command_with_one_line(
    name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = Path("outside")
    outside.mkdir()
    if (directory / name).exists():
        shutil.copytree(directory / name, outside, dirs_exist_ok=True)
        shutil.rmtree(directory / name)
    for entry in ("000000003/state", "000000009", "train", ".x.partial"):
        (outside / entry).mkdir(parents=True, exist_ok=True)
    (outside / ".y.partial").write_text("text of the user")
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(outside.absolute())
    before = tree(outside)
    for command in COMMANDS.values():
        assert command() == 1
        expected = f"error: run/{name}: it is a link; a run reads and writes inside of its directory only: remove it."
        assert one_line(capsys) == expected
    assert tree(outside) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe"])
def test_no_command_writes_through_a_file_that_is_a_link_or_waits_for_a_pipe(
    kind: str, name: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = Path("outside")
    outside.mkdir()
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "link":
        (outside / "file").write_text("text of the user")
    os.mkfifo(path) if kind == "pipe" else path.symlink_to((outside / "file").absolute())
    before = tree(outside)
    for command in COMMANDS.values():
        assert command() == 1
        expected = "it is no regular file" if kind == "pipe" else "it is a link"
        assert one_line(capsys).startswith(f"error: run/{name}: {expected}; ")
    assert tree(outside) == before


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", ["config.json", "versions.json", "metrics.jsonl", "performance.jsonl", "summary.json", "report.html"]
)
@pytest.mark.slow
def test_files_that_are_written_anew_replace_a_link(name: str, directory: Path) -> None:
    outside, path = Path("outside"), directory / name
    outside.mkdir()
    content = path.read_bytes() if path.exists() else b"text of the user"
    path.unlink(missing_ok=True)
    (outside / "file").write_bytes(content)
    path.symlink_to((outside / "file").absolute())
    before = tree(outside)
    assert COMMANDS["run"]() in (0, 1)
    assert tree(outside) == before


def test_performance_of_a_run_is_not_written_to_where_a_link_to_nothing_leads(directory: Path) -> None:
    from research.reporting.performance import PerformanceRecorder
    from research.reporting.record import Run

    Path("outside").mkdir()
    (directory / "performance.jsonl").unlink(missing_ok=True)
    (directory / "performance.jsonl").symlink_to(Path("outside/file").absolute())
    recorder = PerformanceRecorder(Run(directory, "linear", {}), batch_size=8, step=0, started=0.0)
    for step, now in ((1, 1.0), (2, 3.0)):
        recorder.log(step, waited=0.0, now=now)
    assert not list(Path("outside").iterdir())
    assert len((directory / "performance.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped bit", "pipe", "link to a directory"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    damage: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "finished", "run")
    Path("run", "summary.json").unlink()
    newest = Path("run", "checkpoints", f"{8:09d}")
    file = next(path for path in (newest / "state" / "d").iterdir())
    if damage == "flipped bit":
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    elif damage == "link to a directory":
        shutil.copytree(newest, "outside")
        shutil.rmtree(newest / "state")
        (newest / "state").symlink_to(Path("outside/state").absolute())
    else:
        file.unlink()
        os.mkfifo(file)
    assert COMMANDS["resume"]() == 0
    assert one_line(capsys).startswith(f"checkpoint {newest} is damaged (")
    expected = tree(folder / "finished" / "checkpoints")
    assert tree(Path("run", "checkpoints")).keys() >= {name for name in expected if "/" not in name}
    shutil.rmtree("run")
    shutil.rmtree("outside", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": "often"}, ""),
        ({"log_every": 0}, ""),
        ({"from_": 3}, "error: run/config.json: options: from_ is 3; expected a string or null; correct it there."),
        ({"only": ["("]}, "error: run/config.json: options: only is ['(']; expected a string or null; correct it there."),
    ],
)
def test_recorded_options_of_another_type_do_not_matter_or_are_one_line(
    options: dict[str, Any], message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = json.loads((directory / "config.json").read_text())
    contents["options"] |= options
    (directory / "config.json").write_text(json.dumps(contents))
    assert COMMANDS["run"]() == bool(message)
    assert "".join(capsys.readouterr().err.splitlines()) == message


def test_a_run_on_one_machine_listens_at_no_port(folder: Path) -> None:
    sockets = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if os.path.lexists(entry)}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]]
    assert not [line for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets]

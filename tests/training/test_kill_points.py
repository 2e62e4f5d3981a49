"""A run that is killed at any point of its loop logs, after it is resumed, exactly what an undisturbed one logs."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import pytest
from small_training import assert_same_weights, data, learner

import research
from research.cli import run as cli_run
from research.cli.experiment import Experiment
from research.cli.options import Options
from research.data.prefetch import DispatchPacer
from research.reporting import environment, record
from research.training import checkpoint, loop, manifest
from research.training.logs import LogEntry

SCHEDULES = [(2, 5), (1, 5), (3, 10), (4, 3), (None, 5)]  # steps between logs and between checkpoints; an epoch has five
STEPS = 15


class Killed(BaseException):
    """Ends a training at once, as SIGKILL does: nothing of the loop handles it."""


class FixedPacer(DispatchPacer):
    """Runs as many steps in one dispatch as are allowed: how many are fused must not depend on the speed of the machine."""

    def __init__(self, agree: Any) -> None:
        self.steps = 1000

    def dispatched(self, results: Any, steps: int) -> None:
        pass


@pytest.fixture(scope="module")
def classifier() -> research.Learner:
    return learner()


def train(classifier: research.Learner, directory: Path, schedule: tuple[int | None, int], reached: Callable[[str], None]) -> Any:
    """Trains in a run directory from its latest checkpoint, as a command does; calls `reached` at every point of the loop."""
    run = record.Run(directory, "toy", {})
    start, latest = checkpoint.Checkpoint(0, classifier.init(), {}), checkpoint.latest(run.checkpoints, print)
    if latest is not None:
        start = checkpoint.restore(latest, start.state, classifier.names)
    directory.mkdir(exist_ok=True)
    record.start(run, {}, start.step)
    log_every, save_every = schedule

    def log(entry: LogEntry) -> None:
        reached(f"before line {entry.step} {entry.split}")
        record.append_entry(run, entry)
        reached(f"after line {entry.step} {entry.split}")

    def save(step: int, state: Any, logs: Any) -> None:
        reached(f"before checkpoint {step}")
        checkpoint.save(run.checkpoints, step, state, classifier.names, logs)
        reached(f"after checkpoint {step}")

    def stop() -> bool:  # called after each dispatch and between the batches of an evaluation
        reached("stop")
        return False

    state, last = loop.train(
        classifier,
        data(),
        steps=STEPS,
        start=start.step,
        state=start.state,
        logs=start.logs,
        log_every=log_every,
        log=log,
        evaluations={"val": data()},
        hooks=[(save_every, save)],
        stop=stop,
    )
    return state, last, (directory / "metrics.jsonl").read_text()


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_killed_at_any_point_logs_after_resuming_what_an_undisturbed_one_logs(
    schedule: tuple[int | None, int], classifier: research.Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "DispatchPacer", FixedPacer)
    monkeypatch.setattr(environment, "versions", dict)
    monkeypatch.setattr(environment, "git", lambda *arguments: "")
    points: list[str] = []
    expected = train(classifier, tmp_path / "undisturbed", schedule, points.append)
    differing = []
    for moment, point in enumerate(points):
        remaining = iter(range(moment, -1, -1))

        def kill(_: str, remaining: Iterator[int] = remaining) -> None:
            if next(remaining) == 0:
                raise Killed

        with pytest.raises(Killed):
            train(classifier, tmp_path / str(moment), schedule, kill)
        result = train(classifier, tmp_path / str(moment), schedule, lambda _: None)
        assert_same_weights(result[0], expected[0])
        if result[1:] != expected[1:]:
            differing.append(f"{moment} {point}")
    assert not differing
    assert {"before checkpoint 15", "after checkpoint 15", "after line 15 train", "before line 15 val"} <= set(points)


@dataclass(frozen=True)
class Config:
    """The config of the experiment below."""

    epochs: int = 3
    steps: int | None = None
    seed: int = 0


Run = Callable[..., dict[str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, killed at an evaluation or not: (directory, seed, kill_at) -> texts of its files.

    `kill_at` is the number of the evaluated batch at which the process dies; by then its last checkpoint is written.
    """
    monkeypatch.setattr(cli_run, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(loop, "DispatchPacer", FixedPacer)

    def start(directory: Path, seed: int = 0, kill_at: int | None = None) -> dict[str, str]:
        evaluated = iter(range(1000))
        val = data(seed=seed)

        def batch(step: int) -> Any:
            if next(evaluated) == kill_at:
                raise Killed
            return val.batch(step)

        def build(config: Config) -> research.Learner:
            keras.utils.set_random_seed(config.seed)
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
            return research.supervised(model, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="sgd")

        module = SimpleNamespace(
            Config=Config,
            build=build,
            data=lambda config: {"train": data(seed=config.seed), "val": val._replace(batch=batch, resident=None)},
        )
        options = Options(run_dir=directory, log_every=2, checkpoint_every=5)
        cli_run.run_experiment(Experiment("toy", module, Path(__file__)), Config(seed=seed), options)
        return {name: (directory / name).read_text() for name in ("config.json", "metrics.jsonl", "summary.json")}

    return start


def kill(run: Run, directory: Path, seed: int = 0, kill_at: int = 7) -> None:
    with pytest.raises(Killed):
        run(directory, seed, kill_at)


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [2, 7, 12])  # in the first, second and third evaluation
def test_a_run_killed_during_an_evaluation_logs_after_resuming_what_an_undisturbed_one_logs(
    kill_at: int, run: Run, tmp_path: Path
) -> None:
    expected = run(tmp_path / "undisturbed")
    kill(run, tmp_path / "killed", kill_at=kill_at)
    resumed = run(tmp_path / "killed")
    assert resumed["metrics.jsonl"] == expected["metrics.jsonl"]
    summaries = [json.loads(files["summary.json"]) for files in (resumed, expected)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["resumed_from"] in (5, 10, 15)


def of_another_run(run: Run, checkpoints: Path) -> str:
    kill(run, checkpoints.parents[1] / "other", seed=1)
    shutil.rmtree(checkpoints / "000000015", ignore_errors=True)
    shutil.copytree(checkpoints.parents[1] / "other" / "checkpoints" / "000000010", checkpoints / "000000010", dirs_exist_ok=True)
    return "000000010 does not belong here (its run is '"


def renamed(run: Run, checkpoints: Path) -> str:
    (checkpoints / "000000010").rename(checkpoints / "000000900")
    return "000000900 does not belong here (it is of step 10, expected 900 as its directory is named) and is skipped"


def of_another_config(run: Run, checkpoints: Path) -> str:
    path = checkpoints / "000000010" / "manifest.json"
    contents = json.loads(path.read_text())
    del contents["checksum"]
    contents["config"] = "0" * 64
    path.write_text(json.dumps({**contents, "checksum": manifest._checksum(contents)}))
    return "000000010 does not belong here (its config is '000000000000', expected '"


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("change", [of_another_run, renamed, of_another_config])
def test_a_run_goes_on_from_its_own_checkpoint_and_names_what_does_not_belong_to_it(
    change: Callable[[Run, Path], str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(tmp_path / "undisturbed")
    kill(run, tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["id"]
    line = change(run, tmp_path / "run" / "checkpoints")
    capsys.readouterr()
    resumed = run(tmp_path / "run")
    (reported,) = [text for text in capsys.readouterr().err.splitlines() if "checkpoint" in text]
    assert reported.startswith(f"checkpoint {tmp_path}/run/checkpoints/{line}"), reported
    assert resumed["metrics.jsonl"] == expected["metrics.jsonl"]
    assert json.loads(resumed["summary.json"])["resumed_from"] == 5
    assert json.loads(resumed["config.json"])["id"] == identity
    assert json.loads((tmp_path / "run" / "checkpoints" / "000000015" / "manifest.json").read_text())["run"] == identity
    assert json.loads(expected["config.json"])["id"] != identity

"""Sweeps: which trials they run, what they do about those that fail or fall behind, and how they go on after an interruption.

Trials are those of fake_trial.py, which take a moment; at the end is a sweep of real runs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from research.cli import study, sweep, trials
from research.reporting import record

FAKE = (sys.executable, str(Path(__file__).with_name("fake_trial.py")))


@pytest.fixture(autouse=True)
def fake_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "RUN", FAKE)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)


def found(directory: str = "s") -> list[optuna.trial.FrozenTrial]:
    """The trials of a sweep, without those that were interrupted and taken up again."""
    database = optuna.storages.RDBStorage(f"sqlite:///{directory}/sweep.db")
    trials = study.latest(optuna.load_study(study_name="digits", storage=database))
    database.remove_session()
    database.engine.dispose()
    return trials


def run(*arguments: str, directory: str = "s") -> int:
    return sweep.main(["digits", "--sweep-dir", directory, *arguments])


RATE = ("--vary", "learning_rate=linear:0.001:1")


def test_the_best_of_the_trials_is_printed_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trials", "6", *RATE, "--epochs", "2", "--jobs", "2", "--pruner", "none") == 0
    values = {trial.params["learning_rate"]: trial.value for trial in found()}
    assert len(values) == 6
    assert values == {rate: pytest.approx((rate - 0.3) ** 2 + 0.5) for rate in values}
    best = min(values, key=values.__getitem__)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"just run digits --epochs 2 --learning-rate {best}", "s/sweep.html"]
    assert lines[-4].startswith("6 trials: 6 complete")


@pytest.mark.slow
def test_tpe_comes_closer_to_the_best_value_than_its_random_start() -> None:
    assert run("--trials", "30", *RATE, "--pruner", "none", "--jobs", "2") == 0
    distances = [abs(trial.params["learning_rate"] - 0.3) for trial in found()]
    assert sum(distances[20:]) / 10 < 0.5 * sum(distances[:10]) / 10


def test_a_finished_sweep_goes_on_with_other_values() -> None:
    assert run("--trials", "3", *RATE, "--sampler", "random") == 0
    assert run("--trials", "6", *RATE, "--sampler", "random") == 0
    assert len({trial.params["learning_rate"] for trial in found()}) == 6


def test_a_grid_runs_each_point_once(capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--sampler", "grid", "--vary", "learning_rate=0.1:0.3,style=functional:subclassed", "--jobs", "2", "--pruner", "none")
    assert run(*grid) == 0
    points = [(trial.params["learning_rate"], trial.params["style"]) for trial in found()]
    assert sorted(points) == [(0.1, "functional"), (0.1, "subclassed"), (0.3, "functional"), (0.3, "subclassed")]
    assert run(*grid) == 0
    assert len(found()) == 4
    assert "just run digits --learning-rate 0.3 --style functional" in capsys.readouterr().out


def test_the_value_of_a_trial_is_its_best_epoch_or_a_result_of_the_end() -> None:
    assert run("--trials", "1", "--vary", "learning_rate=0.7", "--metric", "score:max") == 0
    assert found()[0].value == 0.7
    assert run("--trials", "1", "--vary", "learning_rate=0.3", "--metric", "val_loss:max", directory="t") == 0
    assert found("t")[0].value == 1.0


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sampler", "grid", "--vary", "seed=0:1:6") == 0
    states = {trial.params["seed"]: trial.state.name for trial in found()}
    assert states == {0: "COMPLETE", 1: "FAIL", 6: "COMPLETE"}
    assert "trial 1: failed  seed=1  (there is no room for it)" in capsys.readouterr().out
    assert "there is no room for it" in Path("s/sweep.html").read_text()


def test_three_failures_in_a_row_end_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trials", "9", *RATE, "--seed", "1") == 1
    assert capsys.readouterr().err == (
        "error: 3 runs in a row failed, the last one: there is no room for it (see s/trial-0002.log).\n"
    )
    assert [trial.state.name for trial in found()] == ["FAIL"] * 3


def test_a_run_that_diverges_counts_as_stopped_early_not_as_a_failure() -> None:
    assert run("--sampler", "grid", "--vary", "seed=2,learning_rate=0.1:0.2:0.3:0.4") == 1
    assert [trial.state.name for trial in found()] == ["PRUNED"] * 4


def test_a_metric_that_no_run_logs_ends_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trials", "9", *RATE, "--seed", "4") == 1
    expected = "error: s/trial-0000: it has no finite val_loss; expected --metric NAME:min or NAME:max, of loss.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.slow
def test_a_trial_that_falls_behind_the_median_is_stopped() -> None:
    rates = "learning_rate=0.3:0.31:0.29:0.32:0.28:3.0"
    assert run("--sampler", "grid", "--vary", rates, "--epochs", "5", "--batch-size", "100") == 0
    assert {trial.params["learning_rate"]: trial.state.name for trial in found() if trial.state.name != "COMPLETE"} == {
        3.0: "PRUNED"
    }
    assert all(len(trial.intermediate_values) == 5 for trial in found() if trial.state.name == "COMPLETE")
    assert len(Path("s/trial-0005/metrics.jsonl").read_text().splitlines()) < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_goes_on_with_the_runs_that_it_was_at(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--trials", "3", *RATE, "--jobs", "2", "--seed", "5", "--sampler", "random")

    def stop() -> None:
        while len(list(Path("s").glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert run(*arguments) == 75
    stopper.join()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"stopped by {signal.Signals(number).name}; to go on: just sweep digits --sweep-dir s --vary "
        "learning_rate=linear:0.001:1 --trials 3 --sampler random --jobs 2 --seed 5"
    )
    begun = {path.parent.name for path in Path("s").glob("*/starts")}
    Path("s/go").touch()
    assert run(*arguments) == 0
    assert [trial.state.name for trial in found()] == ["COMPLETE"] * 3
    again = {path.parent.name for path in Path("s").glob("*/starts") if path.read_text() == ".."}
    assert begun <= again
    assert len(list(Path("s").glob("trial-????"))) == 3


def test_a_second_signal_does_not_wait_for_runs_that_do_not_stop() -> None:
    def stop_twice() -> None:
        while not list(Path("s").glob("*/metrics.jsonl")):
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        time.sleep(3)
        Path("s/go").touch()  # a run that was waited for would be complete

    stopper = threading.Thread(target=stop_twice)
    stopper.start()
    assert run("--trials", "1", *RATE, "--seed", "7") == 75
    stopper.join()
    assert [trial.state.name for trial in found()] == ["WAITING"]


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_with_the_runs_that_it_was_at() -> None:
    arguments = ["digits", "--sweep-dir", "s", "--trials", "2", *RATE, "--seed", "5", "--sampler", "random"]
    code = f"import research.cli.trials as t; t.RUN = {FAKE!r}; from research.cli.sweep import main; main({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not list(Path("s").glob("*/metrics.jsonl")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert [trial.state.name for trial in found()] == ["RUNNING"]
    rate = found()[0].params["learning_rate"]
    Path("s/go").touch()
    assert run(*arguments[3:]) == 0
    assert [trial.state.name for trial in found()] == ["COMPLETE"] * 2
    assert found()[0].params["learning_rate"] == rate
    assert Path("s/trial-0000/starts").read_text() == ".."


def test_the_members_of_a_population_are_trials_of_one_run() -> None:
    assert run("--trials", "6", *RATE, "--population", "4", "--epochs", "2") == 0
    values = {trial.params["learning_rate"]: trial.value for trial in found()}
    assert values == {rate: pytest.approx((rate - 0.3) ** 2 + 0.5) for rate in values}
    runs = {trial.user_attrs["run"] for trial in found()}
    assert runs == {"trial-0000", "trial-0004"}


def test_two_sweeps_do_not_share_a_directory(capsys: pytest.CaptureFixture[str]) -> None:
    with record.lock(record.Run(Path("s"), "digits", {})):
        assert run("--trials", "1", *RATE) == 1
    assert capsys.readouterr().err == (
        "error: --sweep-dir s: another process is running in it; wait for it, or choose another.\n"
    )


def test_a_sweep_does_not_go_on_with_another_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trials", "1", *RATE) == 0
    assert run("--trials", "2", "--vary", "learning_rate=linear:0.001:2") == 1
    assert capsys.readouterr().err == (
        "error: study 'digits' there has another vary, learning_rate=linear:0.001:1: expected it again, or another --sweep-dir.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            ["--trials", "4", "--vary", "learn_rate=0.1:0.2"],
            2,
            "--vary learn_rate=0.1:0.2: there is no field 'learn_rate': did you mean ",
        ),
        (
            ["--trials", "4", "--vary", "seed"],
            2,
            "--vary seed: expected FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A:B:C.",
        ),
        (
            ["--trials", "4", "--vary", "dropout=linear:0.5:0.1"],
            2,
            "--vary dropout=linear:0.5:0.1: the range is empty; expected LOW",
        ),
        (["--trials", "4", "--vary", "learning_rate=log:0:1"], 2, "--vary learning_rate=log:0:1: expected bounds above 0"),
        (["--trials", "4", "--vary", "dropout=0.5:1.5"], 2, "--vary dropout=0.5:1.5: 1.5 is outside of "),
        (["--trials", "4", "--vary", "epochs=linear:0.5:3"], 2, "--vary epochs=linear:0.5:3: expected whole numbers as bounds."),
        (["--trials", "4", "--vary", "style=log:1:2"], 2, "--vary style=log:1:2: it is not a number; expected style=A:B:C."),
        (["--trials", "4", "--vary", "epochs=1:many"], 2, "--vary epochs=1:many: expected a whole number, got 'many'."),
        (
            ["--sampler", "grid", "--vary", "learning_rate=log:0.1:1"],
            2,
            "--vary learning_rate=...: a grid has no ranges; expected ",
        ),
        (["--vary", "seed=0:1"], 2, "--trials is missing: how many? "),
        (["--trials", "0", "--vary", "seed=0:1"], 2, "--trials 0: expected at least 1."),
        (
            ["--trials", "4", "--vary", "seed=0:1", "--metric", "loss"],
            2,
            "--metric loss: expected a metric and min or max, such as ",
        ),
        (
            ["--trials", "4", "--vary", "seed=0:1", "--metric", "test_loss:min"],
            2,
            "--metric test_loss:min: what is chosen by test ",
        ),
        (
            ["--trials", "4", "--vary", "seed=0:1", "--run-dir", "r"],
            2,
            "--run-dir with a sweep: each trial is a run of its own; ",
        ),
        (["--trials", "4", "--vary", "seed=0:1", "--epoch", "3"], 2, "no option '--epoch': did you mean '--epochs'?; "),
        (
            ["--trials", "4", "--vary", "seed=0:1", "--storage", "nothing://here"],
            1,
            "--storage nothing://here: it can't be opened (",
        ),
        (
            ["--trials", "4", "--vary", "seed=0:1", "--storage", "sqlite:////no/such.db"],
            1,
            "--storage sqlite:////no/such.db: it can",
        ),
        (
            ["--trials", "4", *RATE, "--learning-rate=1"],
            2,
            "--learning-rate with --vary learning_rate=...: expected one of them.",
        ),
        (["--trials", "4"], 2, "the following arguments are required: --vary"),
    ],
)
def test_what_can_not_be_swept_is_one_line(
    arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not list(Path().rglob("trial-*"))


def test_without_optuna_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("--trials", "4", *RATE) == 1
    assert capsys.readouterr().err == "error: a sweep needs Optuna: pip install 'research[sweep]'.\n"


@pytest.mark.slow
def test_a_sweep_of_real_runs_finds_their_losses_and_writes_a_page(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "research", "sweep", "digits", "--sweep-dir", "s", "--steps", "40"]
    options = ["--sampler", "grid", "--vary", "learning_rate=0.01:1e30,style=functional", "--jobs", "2"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "s" / "trial-0000" / "summary.json").read_text())
    (value,) = re.findall(r"trial 0: val_loss (\S+)  learning_rate=0.01 style=functional", done.stdout)
    assert float(value) == pytest.approx(summary["metrics"]["val_loss"], rel=1e-3)
    assert "just run digits --steps 40 --learning-rate 0.01 --style functional" in done.stdout
    assert "trial 1: stopped early" in done.stdout  # a loss that is not finite
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert 'href="trial-0000/report.html"' in page
    assert "data:image/png" in page

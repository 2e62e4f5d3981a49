"""The script that kills runs: its arguments, a count that was interrupted, its table, and what is compared. No run is started."""

import contextlib
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN = ["digits", "--epochs", "2", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def torture() -> ModuleType:
    if str(ROOT / "scripts") not in sys.path:
        sys.path.append(str(ROOT / "scripts"))
    return importlib.import_module("torture")


@pytest.fixture
def tried(torture: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The trials that were made: with an outcome at once, in place of runs."""
    made: list[tuple[str, int]] = []

    def outcome(name: str, number: int, undisturbed: Any, seed: int) -> Any:
        made.append((name, number))
        return torture.Outcome(True, equal=True, codes=(-9, 0), lost=10 * number + 3, promised=40)

    monkeypatch.setattr(torture, "repeat_until_in_time", outcome)
    monkeypatch.setattr(torture, "run_undisturbed", lambda options, scratch: "undisturbed")
    return made


def test_an_interrupted_count_goes_on(
    torture: ModuleType, tried: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.jsonl"
    arguments = ["--faults", "kill,term", "--trials", "2", "--json", str(path), "--", *RUN]
    assert torture.main(arguments) == 0
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["fault"] for line in lines] == ["kill", "term", "kill", "term"]
    assert json.loads(lines[0])["options"] == RUN[1:]
    path.write_text("".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    tried.clear()
    assert torture.main(arguments) == 0
    assert tried == [("kill", 1), ("term", 1)]
    assert [line.split('"seconds"')[0] for line in path.read_text().splitlines()] == [
        line.split('"seconds"')[0] for line in lines
    ]
    tried.clear()
    assert torture.main(arguments) == 0
    assert not tried
    for other in (["--seed", "1", *arguments], ["--processes", "2", *arguments], [*arguments, "--seed", "3"]):
        tried.clear()
        torture.main(other)
        assert len(tried) == 4, "another count goes on from this one"
    assert "4 of 4 equal to the last bit" in capsys.readouterr().out


def test_the_table_counts_what_failed(torture: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = torture.Count(tuple(RUN), 1, None, 0)
    outcomes = [
        torture.Outcome(True, equal=True, lost=7, promised=40, phase="training", resumed_from=20),
        torture.Outcome(True, "41 steps were trained twice, expected at most 40", equal=True, lost=41, promised=40),
        torture.Outcome(True, "differing: metrics.jsonl", lost=2, promised=40),
        torture.Outcome(False, "the run ended ten times before the fault came"),
    ]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for i, outcome in enumerate(outcomes):
        torture.append(files[i % 2], count.line("kill", i, outcome, 1.0))
    torture.append(files[1], count._replace(processes=2).line("term", 0, outcomes[0], 1.0))
    assert torture.main(["--table", *map(str, files)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| SIGKILL at a random moment | digits | 3 | 1 | 2 | 1 | 41 |",
        "| SIGTERM at a random moment | digits, 2 processes x 4 devices | 1 | 1 | 1 | 0 | 7 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults", "fire"], "no fault 'fire'; expected some of kill, "),
        (["--faults", "kill-all"], "no fault 'kill-all'; expected some of kill, "),
        (["--processes", "2", "--faults", "power-cut"], "no fault 'power-cut'; expected some of kill, "),
        (["--trials", "0"], "--trials, --processes and --devices: expected at least 1"),
        (["--table", "no/such/file"], "--table no/such/file: there is no such file; expected one that --json wrote"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, torture: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        torture.parse_arguments(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_file_is_one_line(torture: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3}\n')
    with pytest.raises(SystemExit, match=r"metrics\.jsonl:1: expected a trial, as `just torture --json` writes it"):
        torture.read(path)


def test_how_many_steps_may_be_trained_twice(torture: ModuleType, tmp_path: Path) -> None:
    for step in (20, 60):
        (tmp_path / "checkpoints" / f"{step:09d}").mkdir(parents=True)
    trial = torture.Trial(RUN, tmp_path, tmp_path, random.Random(0), 1.0, tmp_path)
    assert torture.promise(torture.FAULTS["kill"], trial) == 40
    assert torture.promise(torture.FAULTS["damage"], trial) == 80
    for every in ("auto", "0", "2epochs"):
        assert torture.promise(torture.FAULTS["kill"], trial._replace(arguments=["digits", "--checkpoint-every", every])) is None


def state_of(pid: int) -> str:
    """Returns the state of a process as in /proc: T for stopped; empty after its end."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    return ""


def test_signals_reach_the_processes_that_a_run_consists_of(torture: ModuleType, tmp_path: Path) -> None:
    kinds = importlib.import_module("kinds")
    code = "import subprocess, sys; c = 'import time; time.sleep(60)'\n"
    code += "running = [subprocess.Popen([sys.executable, '-c', c]) for _ in range(3)]\nprint([each.wait() for each in running])"
    trial = torture.Trial(RUN, tmp_path, tmp_path, random.Random(0), 0.3, tmp_path, processes=3)
    for fault in ("kill-all", "pause-kill"):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        running: list[int] = []
        while len(running) < 3:
            running = kinds.workers(process, True)
        kinds.FAULTS[fault].act(trial, process)
        if fault == "pause-kill":
            assert "T" in map(state_of, running)
            for pid in running:
                kinds.send_to(pid, kinds.KILL)
        output, _ = process.communicate()
        assert output == "[-9, -9, -9]\n"

"""Runs that are stopped by signals, killed or out of disk space resume without a difference."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ROOT, command, strict

from research.training import checkpoint, signals

pytestmark = pytest.mark.slow


@pytest.fixture
def run_arguments(tmp_path: Path) -> list[str]:
    return ["digits", "--epochs", "12", "--checkpoint-every", "40", "--run-dir", str(tmp_path / "run")]


def start_run(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "research", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split("/")[0].split() == ["epoch", "3"]:
            break
    return process


@pytest.mark.sample(4)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_reports_how_to_resume_and_exits_with_75(
    number: signal.Signals, run_arguments: list[str], tmp_path: Path
) -> None:
    process = start_run(run_arguments, tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 75
    summary = strict((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == {signal.SIGTERM: "preempted", signal.SIGINT: "stopped"}[number]
    line = f"stopped by {number.name} after step {summary['steps']}; to go on: just resume {tmp_path / 'run'}"
    assert stderr.splitlines()[-1] == line
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == summary["steps"]
    mesh = ["--mesh", "data=4,fsdp=2"] if number == signal.SIGINT else []  # all eight devices, or one as before
    resume = [sys.executable, "-m", "research", "resume", str(tmp_path / "run"), *mesh]
    resumed = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert strict((tmp_path / "run" / "summary.json").read_text())["resumed_from"] == summary["steps"]


def test_two_processes_can_not_run_in_one_directory(run_arguments: list[str], tmp_path: Path) -> None:
    run_arguments[2] = "400"
    process = start_run(run_arguments, tmp_path)
    second = command(*run_arguments, cwd=tmp_path)
    process.kill()
    process.communicate()
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].endswith("another process is running in it; wait for it, or choose another.")


@pytest.mark.complete
def test_runs_killed_and_resumed_at_random_moments_end_bitwise_equal() -> None:
    faults = "kill,power-cut"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "torture.py"), "--faults", faults, "--seed", f"{time.time():.0f}"]
        + ["--", "digits", "--epochs", "20", "--checkpoint-every", "50", "--log-every", "7"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 equal to the last bit" in done.stdout


@pytest.mark.complete
def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(run_arguments: list[str], tmp_path: Path) -> None:
    process = start_run(run_arguments, tmp_path)
    process.terminate()
    process.communicate()
    previous = checkpoint.latest(tmp_path / "run" / "checkpoints", print)
    assert previous is not None
    limited = (  # to less than the largest weight, 131 kB, and more than any other file that a run writes
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "runpy.run_module('research', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"GIT_DIR": "none"}  # no source.diff
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", *run_arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=environment,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: checkpoint of step ")
    assert "free space or fix permissions, then run the same command again to resume from the previous one." in last
    assert strict((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert checkpoint.verify(previous) is None
    assert command(*run_arguments, cwd=tmp_path).returncode == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("style", ["sequential", "subclassed"])
def test_a_run_saves_its_model_as_plain_keras_files(style: str, tmp_path: Path) -> None:
    done = command("digits", "--steps", "20", "--style", style, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    code = "import sys, keras, numpy as np\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nimport experiments.digits\n" if style == "subclassed" else ""
    code += "model = keras.models.load_model('run/model.keras')\n"
    code += "x = np.arange(2 * 64).reshape(2, 8, 8) % 16\nfirst = model.predict(x, verbose=0)\n"
    code += "model.load_weights('run/model.weights.h5')\nassert (first == model.predict(x, verbose=0)).all()\n"
    code += "print(sum(float(np.abs(w).sum()) for w in model.get_weights()))"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert loaded.returncode == 0, loaded.stderr
    exported = subprocess.run(
        [sys.executable, "-m", "research", "export", "run"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert exported.stdout.startswith("step 20: run/model.keras, run/model.weights.h5"), exported.stderr
    again = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert again.stdout == loaded.stdout


def test_a_signal_before_the_first_poll_ends_the_process_at_once(tmp_path: Path) -> None:
    code = (
        "import signal, time; from research.training import signals\n"
        "with signals.graceful_shutdown(lambda number: print('signal', number, flush=True)):\n"
        "    signal.raise_signal(signal.SIGTERM); time.sleep(5); print('still running')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (signals.RESUMABLE, f"signal {int(signal.SIGTERM)}\n")


def test_a_second_signal_ends_the_process_at_once_but_a_duplicate_of_the_first_does_not() -> None:
    code = (
        "import signal, time; from research.training import signals\n"
        "with signals.graceful_shutdown(lambda number: None) as stop:\n"
        "    stop(); signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
        "    print('duplicate', stop(), flush=True); time.sleep(1.1)\n"
        "    signal.raise_signal(signal.SIGINT); print('still running')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (signals.RESUMABLE, "duplicate True\n")


def test_resume_and_export_take_an_experiments_name_and_reject_a_missing_run(tmp_path: Path) -> None:
    def script(name: str, *arguments: str) -> tuple[int, str]:
        line = [sys.executable, "-m", "research", name, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]

    for name in ("resume", "export"):
        assert script(name) == (2, f"error: just {name} RUN: one run directory, or an experiment's name for its latest run.")
        code, message = script(name, "digits")
        assert (code, message[:24]) == (1, "error: no run 'digits': ")
    assert command("digits", "--steps", "3", cwd=tmp_path).returncode == 0
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert script("resume", "digits") == (
        0,
        f"runs/digits/{run.name}: this run is finished; open runs/digits/{run.name}/report.html",
    )
    assert script("export", "digits")[1].startswith("step 3: ")

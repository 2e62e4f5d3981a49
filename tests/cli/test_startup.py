"""The start of a process: since when it runs, and how it ends before anything has begun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

import research
from research import distributed
from research.cli import placement, startup
from research.cli.experiment import Experiment
from research.cli.options import Options


def test_the_start_of_a_process_is_before_its_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert startup.process_start_time() <= startup._IMPORTED
    monkeypatch.setattr(startup, "_IMPORTED", 0.0)  # as if the clock had been set since
    assert startup.process_start_time() == 0.0


@pytest.mark.slow
def test_the_start_of_a_process_is_the_moment_at_which_it_was_started() -> None:
    code = "from research.cli.startup import process_start_time; print(process_start_time())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = time.time()
    assert after - before > 0.2  # or the next line would prove nothing
    assert before - 0.1 <= float(done.stdout) <= before + min(1.0, (after - before) / 2)


@pytest.mark.parametrize("content", ["", "1 (python) S 1", "1 (a) b) S" + " x" * 40, "1 (python) S" + " 999999999999" * 40])
def test_without_a_plausible_record_the_time_of_the_import_counts(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: content)
    assert startup.process_start_time() == startup._IMPORTED


def test_a_name_with_spaces_and_parentheses_does_not_shift_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = startup.process_start_time()
    stat = Path("/proc/self/stat").read_text()
    odd = f"{stat.partition('(')[0]}(a) (b c){stat.rpartition(')')[2]}"
    monkeypatch.setattr(Path, "read_text", lambda path: odd)
    assert startup.process_start_time() == pytest.approx(expected, abs=0.05)


def test_what_stays_replicated_though_large_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = placement.describe_replicated([(f"weight{i}", 5 << 20) for i in range(5)])
    assert "weight2 (5.0 MiB) and 2 more, 25.0 MiB in all" in line
    assert distributed.replicated_leaves({}, {}) == []


@pytest.mark.slow
def test_a_mesh_with_fsdp_reports_large_weights_that_it_can_not_split(capsys: pytest.CaptureFixture[str]) -> None:
    def build(config: Any) -> research.Learner:
        model = keras.Sequential([keras.Input((513,)), keras.layers.Dense(1023)])
        return research.supervised(model, loss="mse", optimizer="sgd")

    odd = Experiment("odd", SimpleNamespace(build=build), Path("odd.py"))
    x = np.zeros((8, 513), np.float32)
    splits = {"train": research.from_arrays(x, np.zeros((8, 1023), np.float32), batch_size=8)}
    placement.place(odd, None, Options(mesh="fsdp=8"), splits)
    assert "replicated on every device, though large: " in capsys.readouterr().out
    placement.place(odd, None, Options(mesh="data=8"), splits)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_the_command_with_75(number: signal.Signals, tmp_path: Path) -> None:
    installed = tmp_path / "research"
    installed.write_text("from research.cli.main import command\ncommand()\n")
    for line in (["-m", "research"], [str(installed)]):
        watched = [sys.executable, "-v", *line, "run", "digits"]  # -v: each import is a line on stderr
        process = subprocess.Popen(watched, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        assert process.stderr is not None
        for text in process.stderr:
            if text.startswith("import 'keras'") or text.startswith("import 'jax._src"):
                break
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == 75, [line for line in errors.splitlines() if not line.startswith(("#", "import "))]
        assert f"stopped by {number.name}; run the same command again" in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_write_to_stderr_ends_the_command_with_75(number: signal.Signals) -> None:
    code = "import sys; from research.cli.signals import exit_on_signal; exit_on_signal(); print('ready', flush=True); "
    code += "[sys.stderr.write('x' * 99 + chr(10)) for _ in range(100_000)]"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    start = [sys.executable, "-c", code]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stderr.read(1)  # it writes
    time.sleep(0.5)  # until the pipe is full
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 75, errors[-500:]
    assert f"stopped by {number.name}; run the same command again" in errors


@pytest.mark.slow
def test_the_library_leaves_signals_alone() -> None:
    code = "import signal; before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT); import research; "
    code += "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_loads_what_keras_has_of_sklearn_and_matplotlib_once_it_is_used() -> None:
    code = """
import sys
sys.argv = ["research"]  # as the command that pip installs
import research, keras
loaded = {"sklearn", "matplotlib"} & set(sys.modules)
assert not loaded, f"{loaded} loaded at the start"
from sklearn.base import ClassifierMixin
assert issubclass(keras.wrappers.SKLearnClassifier, ClassifierMixin)
import numpy as np
keras.visualization.plot_image_gallery(np.zeros((1, 4, 4, 3), "uint8"), rows=1, cols=1)
assert "matplotlib.pyplot" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_loads_matplotlib_after_what_training_needs_and_no_sklearn(tmp_path: Path) -> None:
    start = [sys.executable, "-P", "-X", "importtime", "-m", "research", "run", "digits"]
    run = subprocess.run([*start, "--steps", "1", "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    imported = [line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")]
    assert "sklearn" not in imported
    assert imported.index("matplotlib") > imported.index("tensorboardX")


def test_importing_research_elsewhere_changes_no_import() -> None:
    assert "LazyFinder" not in [getattr(finder, "__name__", "") for finder in sys.meta_path]

"""Runs systems in processes of their own, in turn, and measures the time per step."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import worker
import workloads
from results import median
from systems import SYSTEMS

CORE_PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"  # Keras would import TensorFlow and PyTorch if installed
PAUSE = 0.3  # seconds before each turn, in which the threads of the previous system stop spinning


class BenchmarkError(Exception):
    """The benchmark cannot continue; the message is one line with the reason and what to do."""


class SystemProcess:
    """One system on one workload, running in a process of its own."""

    def __init__(self, system: str, workload: str, data: Path, cache: Path, directory: Path) -> None:
        self.title, self.log = f"{SYSTEMS[system].title} on {workload}", directory / f"{system}-{workload}.log"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # All systems share one compilation cache, so only the first start compiles.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        python = str(CORE_PYTHON) if SYSTEMS[system].package == "jax" and CORE_PYTHON.exists() else sys.executable
        command = [python, worker.__file__, system, workload, str(data), str(time.time())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def read_report(self) -> dict[str, Any]:
        """Returns the process' next report. Raises `BenchmarkError` if the process ended or a log is not finite."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            messages = [text for text in self.log.read_text().splitlines() if text.strip()]
            reason = messages[-1] if messages else "no message"
            raise BenchmarkError(f"{self.title} failed: {reason}; its complete output is in {self.log}")
        report = json.loads(line)
        if not all(math.isfinite(value) for value in report["logs"].values()):
            raise BenchmarkError(f"{self.title}: its logs are not finite: {report['logs']}")
        return report

    def train(self, epochs: int) -> dict[str, Any]:
        """Trains some epochs and returns the report."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{epochs}\n")
        self.process.stdin.flush()
        return self.read_report()

    def close(self) -> None:
        """Ends the process, and deletes its log if it exited with 0."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        if self.process.wait() == 0:
            self.log.unlink(missing_ok=True)


def measure(name: str, config: dict[str, Any], directory: Path, console: Any) -> list[dict[str, Any]]:
    """Returns one workload's rows of bench.json, one for each system of `config["systems"]`."""
    work = workloads.WORKLOADS[name]
    console.print(f"{name}: {work.steps} steps of {work.batch_size} in an epoch")
    first_start: dict[str, float] = {}
    later_starts: dict[str, list[float]] = {system: [] for system in config["systems"]}
    reports: dict[str, list[dict[str, Any]]] = {system: [] for system in config["systems"]}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        data, cache = Path(scratch, "data"), Path(scratch, "cache")
        data.mkdir()
        workloads.write(name, data)
        for session in range(config["sessions"] + 1):  # session 0 only fills the compilation cache
            processes: dict[str, SystemProcess] = {}
            # The first process to start takes longer than the rest: let one start that is not measured.
            unmeasured = SystemProcess(config["systems"][0], name, data, cache / "unmeasured", directory)
            stack.callback(unmeasured.close)
            unmeasured.read_report()
            unmeasured.close()
            for system in config["systems"]:
                processes[system] = SystemProcess(system, name, data, cache, directory)
                stack.callback(processes[system].close)
                report = processes[system].read_report()
                if session:
                    later_starts[system].append(report["seconds"])
                else:
                    first_start[system] = report["seconds"]
                logs = "  ".join(f"{key} {value:.4g}" for key, value in report["logs"].items())
                console.print(f"  {SYSTEMS[system].title:45} first epoch after {report['seconds']:5.1f} s   {logs}")
            if session:
                first_round, end = (config["rounds"] * n // config["sessions"] for n in (session - 1, session))
                for system, measured in train_in_turn(processes, range(first_round, end), config["seconds"], console).items():
                    reports[system] += measured
            for process in processes.values():
                process.close()
    rows = [_row(name, system, reports[system], first_start[system], later_starts[system]) for system in config["systems"]]
    for row in rows:
        us = row["us_per_step"]
        console.print(f"  {SYSTEMS[row['system']].title:45} {us['median']:10.1f} us a step ({us['min']:.1f} to {us['max']:.1f})")
    return rows


def train_in_turn(
    processes: dict[str, SystemProcess], rounds: range, seconds: float, console: Any
) -> dict[str, list[dict[str, Any]]]:
    """Returns each system's reports, one a round. A turn takes about `seconds`; each round starts with another system."""
    epochs = {}
    for system, process in processes.items():
        epochs[system] = max(1, math.ceil(seconds / process.train(1)["seconds"]))
        if epochs[system] > 1:  # a single epoch is slower than the average of several
            epochs[system] = max(1, math.ceil(seconds / process.train(epochs[system])["seconds"] * epochs[system]))
    reports: dict[str, list[dict[str, Any]]] = {system: [] for system in processes}
    names = list(processes)
    for number in rounds:
        for system in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(PAUSE)
            reports[system].append(processes[system].train(epochs[system]) | {"epochs": epochs[system]})
        console.print(f"  round {number + 1}", end="\r")
    return reports


def _row(
    workload: str, system: str, reports: list[dict[str, Any]], first_start: float, later_starts: list[float]
) -> dict[str, Any]:
    """Returns a row of bench.json; the starts are seconds to the end of the first epoch."""
    steps = workloads.WORKLOADS[workload].steps
    us = [1e6 * report["seconds"] / (report["epochs"] * steps) for report in reports]
    other_steps = (steps - 1) * median(us) / 1e6  # seconds of the first epoch after its first step
    row = {
        "workload": workload,
        "system": system,
        "us_per_step": {"median": median(us), "min": min(us), "max": max(us), "rounds": us},
        "seconds_to_first_step": median(later_starts) - other_steps,
        "seconds_to_first_step_cold": first_start - other_steps,
        "starts": [seconds - other_steps for seconds in later_starts],
        "peak_mb_over_imports": reports[-1]["peak_mb_over_imports"],
        "epochs_per_round": reports[-1]["epochs"],
        "logs": reports[-1]["logs"],
    }
    waiting = [report["logs"].get("seconds_waiting_for_data", 0.0) / report["seconds"] for report in reports]
    return row | ({"waiting_share": median(waiting)} if any(waiting) else {})

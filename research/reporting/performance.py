"""The speed of a run, in performance.jsonl: written on the host when a log arrives, so that no device waits for it."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.reporting import record, run_files
from research.reporting.run_files import ignore
from research.training.logs import LogEntry

INTERVAL = 0.5  # seconds: logs of one dispatch arrive at once, and several dispatches are ahead


class PerformanceRecorder:
    """Appends a line to performance.jsonl when a log of training arrives, `INTERVAL` or more after the line before.

    A line has the `step`, the `examples_per_second` and `step_seconds` since the line before, `seconds_waiting_for_data` of this
    process, and the numbers that `device()` returns, such as memory. If `best_step_seconds`, the model FLOPs of a step over the
    peak FLOPs per second of all chips, is known: `model_flops_utilization`, its share in `step_seconds`.

    `goodput` is `training_seconds / elapsed_seconds` of the complete run. Elapsed are the seconds since it first started, stops
    included. Training are the seconds between two lines of a process, evaluations included. They leave out starting, compiling,
    and steps that were lost and done again: a run that resumes at `step` goes on from its lines up to there, which are kept.

    >>> import tempfile
    >>> run = record.Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> recorder = PerformanceRecorder(run, batch_size=32, step=0, started=100.0)
    >>> recorder.log(1, waited=0.0, now=110.0)
    >>> recorder.log(51, waited=0.5, now=115.0)
    >>> [(line["step"], line["examples_per_second"], round(line["goodput"], 2)) for line in recorder.lines]
    [(51, 320.0, 0.33)]
    """

    def __init__(
        self,
        run: record.Run,
        batch_size: int,
        step: int,
        started: float,
        device: Callable[[], Mapping[str, float]] = dict,
        best_step_seconds: float | None = None,
    ) -> None:
        self.path, self.batch_size = run.directory / run_files.PERFORMANCE, batch_size
        self.device, self.best_step_seconds = device, best_step_seconds
        lines = run_files.read_performance(run.directory, ignore)
        self.lines = [line for line in lines if line["step"] <= step]
        self.started = min((line["started"] for line in lines), default=started)
        self.trained = self.lines[-1]["training_seconds"] if self.lines else 0.0
        self.last: tuple[int, float] | None = None  # step and time of the last line, or of the first log of this process
        if os.path.lexists(self.path):  # a link to nothing too: what it leads to would be made
            record.write_text(self.path, "".join(map(_line, self.lines)))

    def log(self, step: int, waited: float, now: float | None = None) -> None:
        """Appends a line, unless the one before it was just written. `waited`: seconds that this process has waited for data."""
        now = time.time() if now is None else now
        if self.last is None:  # what came before is starting and compiling
            self.last = (step, now)
        steps, seconds = step - self.last[0], now - self.last[1]
        if steps < 1 or seconds < INTERVAL:
            return
        self.last = (step, now)
        self.trained += seconds
        elapsed = max(now - self.started, self.trained)
        line = {
            "step": step,
            "examples_per_second": self.batch_size * steps / seconds,
            "step_seconds": seconds / steps,
            "seconds_waiting_for_data": waited,
            "goodput": self.trained / elapsed,
            "training_seconds": self.trained,
            "elapsed_seconds": elapsed,
            "started": self.started,
            **self.device(),
        }
        if self.best_step_seconds is not None:
            line["model_flops_utilization"] = self.best_step_seconds * steps / seconds
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(_line(line))


def curves(directory: Path) -> list[LogEntry]:
    """Returns the lines of performance.jsonl as entries of logs, to be drawn as curves.

    >>> curves(Path("no/run"))
    []
    """
    hidden = ("step", "started", "training_seconds", "elapsed_seconds")
    lines = run_files.read_performance(directory, ignore)
    return [LogEntry(int(n["step"]), 0, "train", {k: v for k, v in n.items() if k not in hidden}) for n in lines]


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"

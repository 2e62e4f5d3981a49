"""Trials of a sweep: what `--vary` says as Optuna's distributions, the command of each trial, and what its run has logged."""

import contextlib
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from research.cli.checkpoints import Best
from research.cli.vary import is_range, listed, number_type, parse_vary, read_range, read_values
from research.core.state import InvalidArgument
from research.reporting import record, run_files
from research.reporting.members import latest_of_members
from research.training.signals import RESUMABLE

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

RUN = (sys.executable, "-P", "-m", "research", "run")  # -P: a folder named research where the user stands is not the package
FORMS = "FIELD=log:LOW:HIGH, FIELD=linear:LOW:HIGH or FIELD=A:B:C"


def search_space(vary: str, types_of: Mapping[str, Any]) -> "dict[str, BaseDistribution]":
    """Returns the distribution of each field that varies. Raises `InvalidArgument` for a field or values that can't be.

    >>> search_space("learning_rate=log:1e-4:1e-1,units=64:128", {"learning_rate": float, "units": int})["units"]
    CategoricalDistribution(choices=(64, 128))
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, BaseDistribution] = {}
    for varied in parse_vary(vary, types_of):
        if not varied.text:
            raise InvalidArgument(f"--vary {varied.part}: expected {FORMS}.")
        if not is_range(varied.text):
            values = read_values(varied, listed(varied.text))
            if any(not isinstance(value, str | int | float | Path | None) for value in values):
                raise InvalidArgument(f"--vary {varied.part}: only numbers, texts, true or false, and None vary; fix it.")
            space[varied.field] = CategoricalDistribution([str(value) if isinstance(value, Path) else value for value in values])
            continue
        log, low, high = read_range(varied)
        if not low < high:
            raise InvalidArgument(f"--vary {varied.part}: the range is empty; expected LOW below HIGH.")
        if number_type(varied.annotation) is int:
            if low % 1 or high % 1:
                raise InvalidArgument(f"--vary {varied.part}: expected whole numbers as bounds.")
            space[varied.field] = IntDistribution(int(low), int(high), log=log)
        else:
            space[varied.field] = FloatDistribution(low, high, log=log)
    return space


def option_list(values: Mapping[str, Any]) -> list[str]:
    """Returns values of fields as options of a command line.

    >>> option_list({"learning_rate": 0.01, "augment": False, "offset": -1e-5, "dropout": None})
    ['--learning-rate', '0.01', '--no-augment', '--offset=-1e-05', '--dropout', 'None']
    """
    options = []
    for name, value in values.items():
        option, text = name.replace("_", "-"), str(value)
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}={text}"] if text.startswith("-") else [f"--{option}", text]
    return options


def population_options(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the options of a population whose members have these values.

    >>> population_options([{"rate": 0.1, "seed": 0}, {"rate": 0.2, "seed": 1}])
    ['--population', '2', '--vary', 'rate=0.1|0.2,seed=0|1']
    """
    parts = (f"{name}={'|'.join(str(each[name]) for each in values)}" for name in values[0])
    return ["--population", str(len(values)), "--vary", ",".join(parts)]


class Outcome(NamedTuple):
    """How a run ended: "complete", "pruned", "failed" or "stopped", the value of each trial in it, and why it failed."""

    state: str
    values: Sequence[float | None]
    why: str = ""


class TrialRun:
    """The run of one trial, or of several as members of a population: a process, its directory, and what it has logged."""

    def __init__(self, trials: "Sequence[Trial]", directory: Path, arguments: list[str], best: Best) -> None:
        """Starts the run, or goes on with it if its directory has one."""
        self.trials, self.directory, self.best = trials, directory, best
        self.log = directory.with_suffix(".log")
        self.pruned = False
        self.reported = -1
        self.size = -1
        directory.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*RUN, *arguments, "--run-dir", str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # a signal from the terminal reaches the sweep only, which forwards it
            )

    def report(self) -> None:
        """Reports to Optuna what the run has logged since the last call, by epoch. Members of a population report nothing."""
        if len(self.trials) > 1 or not self._has_grown():
            return
        for epoch, value in self.curve():
            if epoch > self.reported and math.isfinite(value):
                self.reported = epoch
                self.trials[0].report(value, epoch)

    def prune(self) -> None:
        """Stops the run if Optuna's pruner says so."""
        if len(self.trials) == 1 and self.reported >= 0 and not self.pruned and self.trials[0].should_prune():
            self.pruned = True
            self.process.terminate()

    def curve(self) -> list[tuple[int, float]]:
        """Returns the metric of the sweep by epoch."""
        entries = run_files.read_metrics(self.directory, run_files.ignore)
        values = [(entry.epoch, record.latest_metrics([entry]).get(self.best.metric)) for entry in entries]
        return [(epoch, value) for epoch, value in values if value is not None]

    def outcome(self) -> Outcome:
        """Returns how the run ended, once its process has."""
        code, none = self.process.returncode, [None] * len(self.trials)
        if self.pruned:
            return Outcome("pruned", none)
        if code == RESUMABLE:
            return Outcome("stopped", none)
        if (self.directory / "failures").exists() and code:
            return Outcome("pruned", none, self._error())  # it diverged
        if code:
            return Outcome("failed", none, self._error())
        values = self._values()
        if all(value is None for value in values):
            raise InvalidArgument(self._no_metric())
        return Outcome("complete", values)

    def _has_grown(self) -> bool:
        size = self.size
        with contextlib.suppress(OSError):
            self.size = (self.directory / "metrics.jsonl").stat().st_size
        return self.size != size

    def _values(self) -> list[float | None]:
        """Returns the best value of each trial over the epochs; one that is measured at the end only as it is."""
        if len(self.trials) > 1:
            entries = run_files.read_metrics(self.directory, run_files.ignore)
            columns = [latest_of_members([entry]).get(self.best.metric) for entry in entries]
            curves = list(zip(*[column for column in columns if column is not None], strict=True)) or [()] * len(self.trials)
        else:
            summary = run_files.read_summary(self.directory, run_files.ignore) or {}
            curves = [tuple(value for _, value in self.curve())]
            curves = curves if curves[0] else [(summary.get("metrics", {}).get(self.best.metric, math.nan),)]
        finite = ([value for value in curve if math.isfinite(value)] for curve in curves)
        return [(max if self.best.highest else min)(curve) if curve else None for curve in finite]

    def _no_metric(self) -> str:
        summary = run_files.read_summary(self.directory, run_files.ignore) or {}
        names = ", ".join(name for name in summary.get("metrics", {}) if "/" not in name)
        return f"{self.directory}: it has no finite {self.best.metric}; expected --metric NAME:min or NAME:max, of {names}."

    def _error(self) -> str:
        """Returns the last error that the run has printed."""
        if self.process.returncode < 0:
            return f"it was ended by {signal.Signals(-self.process.returncode).name}"
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            return (errors or lines or [""])[-1][:1000]
        return ""


def describe(values: Mapping[str, Any]) -> str:
    """Returns values of fields as one line.

    >>> describe({"learning_rate": 0.0123456, "units": 64})
    'learning_rate=0.01235 units=64'
    """
    return " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())

"""Outcomes of trials: one JSON line each, written as it ends, so that an interrupted count goes on; and tables of them."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

POLICIES = ("--keep", "--keep-best", "--keep-every")


class Outcome(NamedTuple):
    """What became of a trial.

    `in_time` is whether the fault came before the run's end, `codes` are the exit codes, `lost` the steps trained twice,
    `promised` the most that may be, None where no number of steps is promised. `equal` is whether all results are those of the
    undisturbed run; `error` is empty if they are, and no more was lost than promised. `phase` is when the fault came: at the
    "start" (no step was logged), in "training", or at the "end" (the last step was). `resumed_from` is the step of the
    checkpoint that the run went on from.
    """

    in_time: bool
    error: str = ""
    equal: bool = False
    codes: tuple[int, ...] = ()
    lost: int = 0
    promised: int | None = None
    phase: str = ""
    resumed_from: int = 0

    @property
    def lost_more(self) -> bool:
        """Whether more steps were trained twice than may be."""
        return self.promised is not None and self.lost > self.promised


class Count(NamedTuple):
    """What a count of trials is of."""

    run: tuple[str, ...]  # experiment and options
    processes: int
    devices: int | None
    seed: int

    def line(self, fault: str, trial: int, outcome: Outcome, seconds: float) -> dict[str, Any]:
        """Returns the JSON object of a trial."""
        experiment, *options = self.run
        of = {"experiment": experiment, "options": options, "processes": self.processes, "devices": self.devices}
        return {**of, "fault": fault, "seed": self.seed, "trial": trial, **outcome._asdict(), "seconds": round(seconds, 1)}

    def done(self, lines: Iterable[dict[str, Any]]) -> set[tuple[str, int]]:
        """Returns fault and number of the trials of this count that are there."""
        return {(line["fault"], line["trial"]) for line in lines if count_of(line) == self}


def count_of(line: dict[str, Any]) -> Count:
    """Returns what the trial of a line belongs to."""
    return Count((line["experiment"], *line["options"]), line["processes"], line["devices"], line["seed"])


def outcome_of(line: dict[str, Any]) -> Outcome:
    """Returns the outcome in a line."""
    return Outcome(**{name: line[name] for name in Outcome._fields})


def append(path: Path, line: dict[str, Any]) -> None:
    """Appends a line to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the trials in a file; none if it does not exist. Removes a last line that was not completely written.

    Exits with one line for anything but trials.
    """
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete)
    lines = []
    for i, each in enumerate(complete.splitlines(), 1):
        try:
            lines.append(json.loads(each))
            count_of(lines[-1]), outcome_of(lines[-1]), lines[-1]["trial"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"error: {path}:{i}: expected a trial, as `just torture --json` writes it; choose another file.")
    return lines


def describe_run(count: Count) -> str:
    """Returns the name of an experiment, with the policy of its checkpoints and its processes.

    >>> describe_run(Count(("digits", "--epochs", "4", "--keep", "1"), 2, 4, 0))
    'digits --keep 1, 2 processes x 4 devices'
    """
    words = [count.run[0]]
    for name, value in zip(count.run, count.run[1:], strict=False):
        words += [name, value] if name in POLICIES else []
    devices = count.devices or max(1, 8 // count.processes)
    of = f", {count.processes} processes x {devices} device{'s' * (devices > 1)}" if count.processes > 1 else ""
    return " ".join(words) + of


def table(lines: Iterable[dict[str, Any]], what: dict[str, str]) -> str:
    """Returns a Markdown table of trials. `what` describes each fault. Trials in which the fault came too late do not count."""
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for line in lines:
        key = (what.get(line["fault"], line["fault"]), describe_run(count_of(line)))
        rows.setdefault(key, []).extend([outcome_of(line)] * line["in_time"])
    text = [
        "| fault | run | trials | in training | equal | lost more than promised | most steps trained twice |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (fault, run), each in sorted(rows.items(), key=lambda row: (list(what.values()) + [row[0][0]]).index(row[0][0])):
        equal, more = sum(outcome.equal for outcome in each), sum(outcome.lost_more for outcome in each)
        most = max((outcome.lost for outcome in each), default=0)
        training = sum(outcome.phase == "training" for outcome in each)
        text.append(f"| {fault} | {run} | {len(each)} | {training} | {equal} | {more} | {most} |")
    return "\n".join(text)

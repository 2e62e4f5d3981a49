"""The checkpoints of a run as rows of a table: what is left on the disk, and what the run scored there."""

import time
from collections.abc import Iterable
from pathlib import Path

from research.training import checkpoint, manifest
from research.training.logs import LogEntry

MAX_METRICS = 8  # columns of a page


def checkpoint_table(directory: Path, entries: Iterable[LogEntry]) -> tuple[list[str], dict[str, list[str | float | None]]]:
    """Returns titles of columns, and a row for each checkpoint of a directory by its step: when it was written, size, metrics.

    The metrics are the loss of training and what was logged of evaluations at that step. The files are not compared with their
    checksums, which would take as long as restoring them; a manifest that can't be read is said to be damaged.

    >>> checkpoint_table(Path("no/run"), [])
    (['written', 'size'], {})
    """
    saved = {f"{step:,}": step for step in checkpoint.steps(directory)}
    metrics: dict[int, dict[str, float]] = {step: {} for step in saved.values()}
    for entry in entries:
        if entry.step in metrics:
            prefix = "" if entry.split == "train" else f"{entry.split}_"
            values = {prefix + name: value for name, value in entry.values.items() if prefix or name == "loss"}
            metrics[entry.step].update({name: value for name, value in values.items() if "/" not in name})
    names = list(dict.fromkeys(name for each in metrics.values() for name in each))[:MAX_METRICS]
    rows = {}
    for title, step in saved.items():
        rows[title] = [*_written(directory / f"{step:09d}"), *(metrics[step].get(name) for name in names)]
    return ["written", "size", *names], rows


def _written(path: Path) -> tuple[str, str]:
    """Returns when a checkpoint was written, in the local time zone, and its size; in place of that what is wrong with it."""
    try:
        contents = manifest.read(path)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / manifest.MANIFEST).stat().st_mtime))
    except (manifest.InvalidCheckpoint, OSError) as error:
        return "", f"damaged: {error}" if isinstance(error, manifest.Damaged) else str(error)
    return when, f"{sum(size for size, _ in contents.files.values()) / 1e6:,.2f} MB"

"""Console output of a run: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from research.training.logs import LogEntry

UPDATE_INTERVAL = 0.05  # seconds


def format_entry(entry: LogEntry, epochs: int) -> str:
    """Returns an entry as one aligned line.

    >>> format_entry(LogEntry(90, 1, "val", {"loss": 0.25, "accuracy": 0.9375}), epochs=20)
    'epoch  2/20  step 90     val    loss 0.2500  accuracy 0.9375'
    """
    values = sorted(shown(entry.values).items(), key=lambda item: item[0] != "loss")
    text = "  ".join(f"{name} {value:#.4g}" for name, value in values)
    return f"epoch {entry.epoch + 1:{len(str(epochs))}}/{epochs}  step {entry.step:<6} {entry.split:6} {text}"


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the values of an entry without those of single layers, which would fill the screen.

    >>> shown({"loss": 0.5, "gradient_norm/dense": 1.0})
    {'loss': 0.5}
    """
    return {name: value for name, value in values.items() if "/" not in name}


@contextmanager
def show_progress(
    total: int, steps_per_epoch: int, start: int = 0, terminal: bool | None = None
) -> Iterator[tuple[Callable[[LogEntry], None], Callable[[int, float], None]]]:
    """Yields a `log` and a `progress` function for `loop.train`, which show training from step `start` to `total`.

    In a terminal (detected if `terminal` is None) a bar counts dispatched steps. It shows the share of time spent waiting for
    data if that is 5% or more, and each epoch ends with a line. Elsewhere every entry is a line.

    >>> with show_progress(10, 5, terminal=False) as (log, progress):
    ...     log(LogEntry(5, 0, "train", {"loss": 1.0}))
    epoch 1/2  step 5      train  loss 1.000
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    epochs = -(-total // steps_per_epoch)
    console = Console(highlight=False, soft_wrap=True)
    if not (console.is_terminal if terminal is None else terminal):
        yield lambda entry: print(format_entry(entry, epochs), flush=True), lambda step, waited: None  # noqa: T201
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total, completed=start, speed="", values="")
        started, updated = time.monotonic(), 0.0

        def log(entry: LogEntry) -> None:
            if entry.step % steps_per_epoch == 0 or entry.step == total or entry.split != "train":
                console.print(format_entry(entry, epochs))
            if entry.split == "train":
                values = "  ".join(f"{name} {value:#.3g}" for name, value in shown(entry.values).items())
                bar.update(task, values=values)

        def progress(step: int, waited: float) -> None:
            nonlocal updated
            now = time.monotonic()
            if now - updated < UPDATE_INTERVAL and step < total:
                return
            updated = now
            speed, share = bar.tasks[0].speed, waited / (now - started)
            speed_text = "" if speed is None else f"{speed:,.0f} steps/s"
            speed_text += "" if share < 0.05 else f", {share:.0%} waiting for data"
            epoch = min(step // steps_per_epoch + 1, epochs)
            bar.update(task, completed=step, description=f"epoch {epoch}/{epochs}", speed=speed_text)

        yield log, progress
        bar.update(task, completed=total)

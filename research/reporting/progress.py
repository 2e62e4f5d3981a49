"""What a person sees while a run goes on: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from research.loop import Entry

SHOW_EVERY = 0.05  # seconds


def line(entry: Entry, epochs: int) -> str:
    """An entry as one aligned line.

    >>> line(Entry(90, 1, "val", {"loss": 0.25, "accuracy": 0.9375}), epochs=20)
    'epoch  2/20  step 90     val    loss 0.2500  accuracy 0.9375'
    """
    values = sorted(entry.values.items(), key=lambda item: item[0] != "loss")
    shown = "  ".join(f"{name} {value:#.4g}" for name, value in values)
    return f"epoch {entry.epoch + 1:{len(str(epochs))}}/{epochs}  step {entry.step:<6} {entry.split:6} {shown}"


@contextmanager
def watching(
    total: int, steps_per_epoch: int, first: int = 0, terminal: bool | None = None
) -> Iterator[tuple[Callable[[Entry], None], Callable[[int, float], None]]]:
    """Shows training from step `first` to `total`: gives a `log` and a `progress` for `loop.train`.

    In a terminal (found out where `terminal` is None) the bar counts steps that were dispatched, tells the share of time in which
    the device had to wait for data where that is 5% or more, and the end of each epoch leaves a line; elsewhere each entry is a
    line.

    >>> with watching(10, 5, terminal=False) as (log, progress):
    ...     log(Entry(5, 0, "train", {"loss": 1.0}))
    epoch 1/2  step 5      train  loss 1.000
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    epochs = -(-total // steps_per_epoch)
    console = Console(highlight=False, soft_wrap=True)
    if not (console.is_terminal if terminal is None else terminal):
        yield lambda entry: print(line(entry, epochs), flush=True), lambda step, waited: None  # noqa: T201
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
        task = bar.add_task("compiling", total=total, completed=first, speed="", values="")
        since, shown = time.monotonic(), 0.0

        def log(entry: Entry) -> None:
            if entry.step % steps_per_epoch == 0 or entry.step == total:
                console.print(line(entry, epochs))
            if entry.split == "train":
                values = "  ".join(f"{name} {value:#.3g}" for name, value in entry.values.items())
                bar.update(task, values=values)

        def progress(step: int, waited: float) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < SHOW_EVERY and step < total:
                return
            shown = now
            speed, share = bar.tasks[0].speed, waited / (now - since)
            told = "" if speed is None else f"{speed:,.0f} steps/s"
            told += "" if share < 0.05 else f", {share:.0%} waiting for data"
            bar.update(task, completed=step, description=f"epoch {min(step // steps_per_epoch + 1, epochs)}/{epochs}", speed=told)

        yield log, progress
        bar.update(task, completed=total)

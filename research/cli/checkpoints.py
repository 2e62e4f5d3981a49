"""How often a run writes checkpoints, and which it keeps, as its options say."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from research.core.learner import Learner
from research.core.state import InvalidArgument
from research.data.batches import Batches
from research.distributed import processes
from research.reporting import record
from research.training.checkpoint_policy import Keep, Timer, keep
from research.training.logs import LogEntry
from research.training.loop import Every, Hook
from research.transforms.population import MEMBERS_SUFFIX

if TYPE_CHECKING:
    from research.cli.training import Session

AUTO_SECONDS, AUTO_SHARE = 60.0, 0.01
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
MAX_STEPS = 2**31 - 1


class Cadence(NamedTuple):
    """How often checkpoints are written: one of `steps`, `epochs` and `seconds`, or none of them for the end alone.

    `share` is the most of the time that they may take.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    share: float | None = None


class Best(NamedTuple):
    """The metric by which a checkpoint is the best, and whether a higher value is better."""

    metric: str
    highest: bool


def parse_cadence(text: int | str) -> Cadence:
    """Returns the cadence of `--checkpoint-every`. Raises `InvalidArgument` for anything else.

    >>> parse_cadence("2epochs"), parse_cadence("5min")
    (Cadence(steps=None, epochs=2, seconds=None, share=None), Cadence(steps=None, epochs=None, seconds=300.0, share=None))
    >>> parse_cadence("often")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: --checkpoint-every often: expected steps (500; 0 for the end only), ...
    """
    if text == "auto":
        return Cadence(seconds=AUTO_SECONDS, share=AUTO_SHARE)
    match = re.fullmatch(r"(\d{1,10}(?:\.\d{1,9})?)(epochs?|s|min|h)?", str(text), re.ASCII)
    number, unit = (float(match[1]), match[2]) if match and not isinstance(text, bool) else (-1.0, None)
    if unit in SECONDS and number > 0:
        return Cadence(seconds=number * SECONDS[unit])
    if number.is_integer() and 0 <= number <= MAX_STEPS:
        if unit is None:
            return Cadence(steps=int(number) or None)
        if unit not in SECONDS and number:
            return Cadence(epochs=int(number))
    raise InvalidArgument(
        f"--checkpoint-every {str(text)[:80]}: expected steps (500; 0 for the end only), 2epochs, 30s, 5min, 1h or auto."
    )


def parse_best(text: str | None) -> Best | None:
    """Returns the metric and the direction of `--keep-best`. Raises `InvalidArgument` for anything else.

    >>> parse_best("val_accuracy:max")
    Best(metric='val_accuracy', highest=True)
    """
    if text is None:
        return None
    metric, _, direction = text.rpartition(":")
    if not metric or direction not in ("min", "max"):
        raise InvalidArgument(f"--keep-best {text[:80]}: expected a metric and min or max, such as val_loss:min.")
    return Best(metric, direction == "max")


def checkpoint_hooks(
    cadence: Cadence, best: Best | None, steps_per_epoch: int, total: int, save: Hook
) -> list[tuple[Every, Hook]]:
    """Returns the hooks that save at these times, at the end, and, with `best`, at the end of each epoch."""
    hooks: list[tuple[Every, Hook]] = []
    if cadence.seconds is not None:
        timer = Timer(cadence.seconds, cadence.share)
        due: Callable[[], bool] = timer.due
        if jax.process_count() > 1:  # the first decides
            due = processes.any_process(lambda: processes.is_first() and timer.due())
        hooks.append((lambda step: due(), timer.timed(save)))
    else:
        steps = cadence.steps if cadence.epochs is None else cadence.epochs * steps_per_epoch
        hooks.append((steps or total + 1, save))
    return hooks + ([(steps_per_epoch, save)] if best else [])


def due_checkpoints(session: "Session") -> Callable[[int], bool]:
    """Returns a function: whether a run's options ask for a checkpoint of a step. One of a stop or a bad step is none of these.

    By the clock any step may be due.
    """
    options, steps_per_epoch, total = session.options, session.splits["train"].steps_per_epoch, session.steps
    cadence = parse_cadence(options.checkpoint_every)
    periods = [cadence.steps if cadence.epochs is None else cadence.epochs * steps_per_epoch]
    periods += [steps_per_epoch] if options.keep_best else []
    return lambda step: cadence.seconds is not None or step == total or any(step % period == 0 for period in periods if period)


def kept_checkpoints(session: "Session", scores: "Scores") -> Keep:
    """Returns which checkpoints a run keeps, as its options say. Those of a stop or a bad step count as none that are due."""
    return keep(session.options.keep, session.options.keep_every, scores, due_checkpoints(session))


def once_a_step(*hooks: Hook) -> Hook:
    """Returns a hook that calls these hooks, and does nothing when it is called again after the same step.

    >>> hook = once_a_step(lambda step, state, logs: print("checked", step), lambda step, state, logs: print("saved", step))
    >>> hook(10, {}, {}), hook(10, {}, {})
    checked 10
    saved 10
    (None, None)
    """
    last: list[int] = []

    def hook(step: int, state: Any, logs: dict[str, Any]) -> None:
        if last != [step]:
            for each in hooks:
                each(step, state, logs)
            last[:] = [step]

    return hook


class Scores(dict[int, float]):
    """The metric of `--keep-best` by step, higher for better."""

    def __init__(self, best: Best | None, entries: Iterable[LogEntry]) -> None:
        self.best = best
        for entry in entries:
            self.add(entry)

    def add(self, entry: LogEntry) -> None:
        """Adds the metric of a step, if the entry has it."""
        prefix = "" if entry.split == "train" else f"{entry.split}_"
        for name, value in entry.values.items():
            if self.best is not None and prefix + name == self.best.metric:
                self[entry.step] = value if self.best.highest else -value


def recorded_scores(keep_best: str | None, run: record.Run) -> Scores:
    """Returns the scores in a run's metrics.jsonl."""
    best = parse_best(keep_best)
    return Scores(best, record.read_entries(run) if best else [])


def check_best(best: Best | None, learner: Learner, state: Any, splits: dict[str, Batches]) -> None:
    """Raises `InvalidArgument` if no log of training or of an evaluation has the metric's name."""
    if best is None:
        return
    known = []
    for split in [name for name in splits if name != "test"]:
        _, logs = jax.eval_shape(learner.train if split == "train" else learner.evaluate, state, splits[split].shapes)
        prefix = "" if split == "train" else f"{split}_"
        for name, log in logs.items():
            if name.endswith(MEMBERS_SUFFIX):  # of a population the mean counts
                continue
            known += [f"{prefix}{name}"] if not log.shape else [f"{prefix}{name}_{i}" for i in range(log.size)]
    if best.metric not in known:
        raise InvalidArgument(f"--keep-best {best.metric}: there is no such metric; expected one of {', '.join(known)}.")

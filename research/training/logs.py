"""Logs between the device and the world: when they are due, and read while the device computes the next steps."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from research.transforms.population import MEMBERS_SUFFIX


class LogEntry(NamedTuple):
    """The logs of one split ("train", "val", ...) after `step` steps, as Python floats. `epoch` counts from 0.

    `members` has the logs of each member of a population, where `values` have their mean.

    >>> LogEntry(step=10, epoch=0, split="train", values={"loss": 0.5}).values["loss"]
    0.5
    """

    step: int
    epoch: int
    split: str
    values: dict[str, float]
    members: dict[str, list[float]] = {}  # noqa: RUF012  (of a tuple, never changed)


class PendingLogs:
    """Logs that are due but still on the device. They are read after the next dispatch, so that the device does not wait."""

    def __init__(
        self,
        steps_per_epoch: int,
        total: int,
        log_every: int | None,
        log: Callable[[LogEntry], None] | None,
        evaluators: Mapping[str, Callable[[Any], dict[str, Any]]],
        observe_every: int | None = None,
        evaluate_every: int | None = None,
    ) -> None:
        self.steps_per_epoch, self.total, self.log_every = steps_per_epoch, total, log_every
        self.log, self.evaluators = log, evaluators
        self.observe_every, self.evaluate_every = observe_every, evaluate_every
        self.last: dict[str, Any] = {}  # the newest values of all splits
        self.entries: list[tuple[int, str, dict[str, Any], int | None]] = []  # step, split, logs, index into stacked logs

    def due(self, first: int, done: int) -> list[int]:
        """Returns the steps from `first` to `done` whose training logs are due. `done` is the only one that may end an epoch."""
        due = set() if self.log_every is None else set(range(first + -first % self.log_every, done + 1, self.log_every))
        due |= {1} if first == 1 and self.log is not None else set()
        return sorted(due | ({done} if self._ends_epoch(done) else set()))

    def observed(self, step: int) -> bool:
        """Returns whether a step's logs are due and have what is observed of it."""
        return self.observe_every is not None and step % self.observe_every == 0 and bool(self.due(step, step))

    def _ends_epoch(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0 or step == self.total

    def schedule(self, first: int, done: int, logs: PyTree, all_logs: PyTree = None) -> None:
        """Adds the training logs that are due in steps `first` to `done`: those of step `done`, and the stacked ones of all."""
        for step in self.due(first, done):
            self._add(step, "train", *((logs, None) if step == done else (all_logs, step - first)))

    def evaluate(self, done: int, state: Any) -> None:
        """Evaluates the state after `done` steps, if that is due, and adds the logs."""
        due = self._ends_epoch(done) or (self.evaluate_every is not None and done % self.evaluate_every == 0)
        for split, evaluate in self.evaluators.items() if due else ():
            self._add(done, split, evaluate(state), None)

    def _add(self, step: int, split: str, logs: dict[str, Any], index: int | None) -> None:
        self.entries.append((step, split, logs, index))
        for value in logs.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()

    def flush(self, before: int | None = None) -> None:
        """Reads the logs off the device and reports them: all, or those before a step."""
        read = [entry for entry in self.entries if before is None or entry[0] < before]
        self.entries[:] = self.entries[len(read) :]
        for step, split, logs, index in read:
            values = to_python(logs, index)
            self.last.update({name if split == "train" else f"{split}_{name}": value for name, value in values.items()})
            if self.log is not None:
                self.log(log_entry(step, (step - 1) // self.steps_per_epoch, split, values))

    def discard(self, step: int) -> None:
        """Drops the logs of this step and later ones."""
        self.entries[:] = [entry for entry in self.entries if entry[0] < step]


def split_before_hooks(
    bounds: Iterable[tuple[int, int]], periods: Sequence[int], total: int, due: Callable[[int, int], list[int]]
) -> Iterator[tuple[int, int]]:
    """Yields the dispatches `bounds`, those that end at a hook split after the last log that is due before it.

    Logs are read after the next dispatch. Those of one dispatch with the hook would be read after the hook: if it writes a
    checkpoint, and the process is killed then, the resumed run would start after their steps and never report them.
    """
    for start, count in bounds:
        done = start + count
        if done == total or any(done % every == 0 for every in periods):
            earlier = due(start + 1, done - 1) if count > 1 else []
            if earlier:
                yield start, earlier[-1] - start
                start = earlier[-1]
        yield start, done - start


def split_before_observed(bounds: Iterable[tuple[int, int]], observed: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    """Yields the dispatches `bounds`, with steps that are observed, the last of their dispatches, in dispatches of their own.

    >>> list(split_before_observed([(0, 1), (1, 9), (10, 4)], lambda step: step == 10))
    [(0, 1), (1, 8), (9, 1), (10, 4)]
    """
    for start, count in bounds:
        if count > 1 and observed(start + count):
            yield start, count - 1
            start, count = start + count - 1, 1
        yield start, count


def to_python(logs: dict[str, Any], index: int | None = None) -> dict[str, Any]:
    """Returns logs, or entry `index` of stacked logs, as floats, and those that are arrays as lists.

    >>> to_python({"loss": np.float32(0.5), "each": np.arange(2)})
    {'loss': 0.5, 'each': [0.0, 1.0]}
    """
    return {name: np.asarray(log)[... if index is None else index].astype(float).tolist() for name, log in logs.items()}


def log_entry(step: int, epoch: int, split: str, logs: dict[str, Any]) -> LogEntry:
    """Returns logs as `to_python` returns them as an entry: those of a population's members apart from the others.

    >>> log_entry(1, 0, "train", {"loss": 2.0, "loss_of_members": [1.0, 3.0]})
    LogEntry(step=1, epoch=0, split='train', values={'loss': 2.0}, members={'loss': [1.0, 3.0]})
    """
    members: dict[str, list[float]] = {}
    for name, value in logs.items():
        if name.endswith(MEMBERS_SUFFIX) and isinstance(value, list):
            columns = elements({name.removesuffix(MEMBERS_SUFFIX): value[0]} if value else {})
            rows = np.reshape(value, (len(value), -1)).T.tolist()
            members.update(zip(columns, rows, strict=True))
    return LogEntry(
        step, epoch, split, elements({name: v for name, v in logs.items() if not name.endswith(MEMBERS_SUFFIX)}), members
    )


def elements(values: dict[str, Any]) -> dict[str, float]:
    """Returns logs as floats alone: a list becomes one float per element, named `NAME_0`, ...

    >>> elements({"loss": 0.5, "each": [0.0, 1.0]})
    {'loss': 0.5, 'each_0': 0.0, 'each_1': 1.0}
    """
    floats: dict[str, float] = {}
    for name, value in values.items():
        elements = [(f"{name}_{i}", element) for i, element in enumerate(np.ravel(value).tolist())]
        floats.update(elements if isinstance(value, list) else {name: value})
    return floats

"""When checkpoints are due by the clock, and which of them to keep."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from research.training.loop import Hook

Keep = Callable[[Sequence[int]], Collection[int]]  # the steps of all checkpoints, ascending -> those to keep


class Timer:
    """Says when a hook is due by the clock: after `seconds`, and later where the hook takes more than a `share` of the time.

    `due` returns True once, until the hook that `timed` returns was called. The time between two calls is `seconds` at least, and
    at least what the last call took, divided by `share`.

    >>> now = [0.0]
    >>> def save(step, state, logs):
    ...     now[0] += 2.0
    >>> timer = Timer(60.0, share=0.01, clock=lambda: now[0])
    >>> hook = timer.timed(save)
    >>> def due_after(seconds):
    ...     now[0] += seconds
    ...     return timer.due()
    >>> due_after(59.0), due_after(1.0), due_after(1.0)
    (False, True, False)
    >>> hook(100, {}, {})
    >>> due_after(60.0), due_after(139.0), due_after(1.0)
    (False, False, True)
    """

    def __init__(self, seconds: float, share: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.share, self.clock = seconds, share, clock
        self.next: float | None = clock() + seconds  # None from the moment when the hook was due until it was called

    def due(self) -> bool:
        """Returns whether the hook is due since the last call."""
        if self.next is None or self.clock() < self.next:
            return False
        self.next = None
        return True

    def timed(self, hook: Hook) -> Hook:
        """Returns the hook, made to measure what it takes."""

        def measured(step: int, state: Any, logs: dict[str, Any]) -> Any:
            started = self.clock()
            result = hook(step, state, logs)
            ended = self.clock()
            self.next = ended + max(self.seconds, (ended - started) / self.share if self.share else 0.0)
            return result

        return measured


def keep(
    last: int = 2,
    every: int | None = None,
    scores: Mapping[int, float] | None = None,
    due: Callable[[int], bool] = lambda step: True,
) -> Keep:
    """Returns a function from the steps of all checkpoints to those to keep.

    These are the `last` ones; the first one from each multiple of `every` steps on, before the next multiple; and the one with
    the highest of the `scores` (step -> score), the earliest of several. `scores` may grow while training goes on.

    Only steps for which `due` returns True count, so that a stop, which writes one at any step, changes nothing in the end.
    While fewer than `last` are there, the latest of all stay.

    >>> sorted(keep(last=2, every=100)([30, 90, 110, 140, 260, 280, 290]))
    [110, 260, 280, 290]
    >>> sorted(keep(last=1, scores={30: 0.9, 90: 0.5})([30, 90, 110]))
    [30, 110]
    """

    def kept(steps: Sequence[int]) -> set[int]:
        counted = [step for step in steps if due(step)]
        result = set(counted[-last:] if len(counted) >= last else steps[-last:])
        if every is not None:
            first_of_each: dict[int, int] = {}
            for step in counted:
                if step >= every:
                    first_of_each.setdefault(step // every, step)
            result |= set(first_of_each.values())
        known = dict(scores or {})
        scored = [step for step in counted if step in known and known[step] == known[step]]  # NaN is no score
        if scored:
            result.add(max(scored, key=lambda step: (known[step], -step)))
        return result

    return kept

"""SIGTERM and SIGINT as a question that a loop asks between two dispatches."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL: stopped from outside, and safe to run again


class Asked:
    """Whether a signal asked to stop, and which. Calling it is asking."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.before = before
        self.signal: int | None = None
        self.at = 0.0
        self.running = False

    def __call__(self) -> bool:
        """Whether to stop. Who asks for the first time is past the first compile and able to stop by itself."""
        self.running = True
        return self.signal is not None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Takes a signal: the first waits for the question, a second ends the process."""
        # A signal to the process group arrives twice within a millisecond.
        second = self.signal is not None and time.monotonic() - self.at > 1
        if self.signal is None:
            self.signal, self.at = number, time.monotonic()
        if not self.running:
            # An exception raised inside XLA's first compile would wait for it and then crash.
            self.before(number)
            os._exit(RESUMABLE)
        if second:
            os._exit(RESUMABLE)


@contextmanager
def stopping(before: Callable[[int], None]) -> Iterator[Asked]:
    """Listens to SIGTERM and SIGINT. `before(signal)` is called, and the process ended, where nothing was asked yet.

    >>> with stopping(lambda number: None) as asked:
    ...     _ = asked()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     asked(), signal.Signals(asked.signal).name
    (True, 'SIGTERM')
    """
    asked = Asked(before)
    previous = {number: signal.signal(number, asked.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

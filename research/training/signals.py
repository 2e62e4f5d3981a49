"""SIGTERM and SIGINT as a stop request that the training loop polls between dispatches."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # exit code EX_TEMPFAIL: stopped from outside, safe to run again


class StopRequest:
    """Whether a signal has requested a stop, and which. Call it to poll.

    `before_start(signal)` is called before the process exits because of a signal that arrived before the first poll.

    >>> stop = StopRequest(lambda number: None)
    >>> stop(), stop.signal
    (False, None)
    """

    def __init__(self, before_start: Callable[[int], None]) -> None:
        self.before_start = before_start
        self.signal: int | None = None
        self.received_at = 0.0
        self.polled = False

    def __call__(self) -> bool:
        """Returns whether to stop. From the first call on the caller stops by itself: it is past the first compilation."""
        self.polled = True
        return self.signal is not None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Handles a signal: the first is a request to stop, a second ends the process at once."""
        # A signal to the process group arrives twice within a millisecond.
        second = self.signal is not None and time.monotonic() - self.received_at > 1
        if self.signal is None:
            self.signal, self.received_at = number, time.monotonic()
        if not self.polled:
            # An exception raised during XLA's first compilation would wait for its end and then crash.
            self.before_start(number)
            os._exit(RESUMABLE)
        if second:
            os._exit(RESUMABLE)


@contextmanager
def graceful_shutdown(before_start: Callable[[int], None]) -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a `StopRequest` inside the `with` block, and restores the previous handlers after it.

    A signal before the first poll calls `before_start(signal)` and ends the process with exit code `RESUMABLE`; so does a second
    signal, without the call.

    >>> with graceful_shutdown(lambda number: None) as stop:
    ...     _ = stop()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop(), signal.Signals(stop.signal).name
    (True, 'SIGTERM')
    """
    request = StopRequest(before_start)
    previous = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""SIGTERM and SIGINT outside of training: the process ends at once, and can be started again."""

import contextlib
import os
import signal
from typing import Any

from research.training.signals import RESUMABLE

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_on_signal() -> None:
    """Makes SIGTERM and SIGINT end the process at once with exit code 75, with a line that says to run the command again."""

    def exit_now(number: int, _: Any) -> None:
        # Not by print: if the signal comes in the middle of a write to sys.stderr, that raises an error.
        with contextlib.suppress(OSError):
            os.write(2, f"stopped by {signal.Signals(number).name}; run the same command again\n".encode())
        os._exit(RESUMABLE)

    for number in SIGNALS:
        signal.signal(number, exit_now)


def ignore_signals() -> None:
    """Makes SIGTERM and SIGINT do nothing: all is done, and the interpreter takes a while to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

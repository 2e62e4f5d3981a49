"""Traces of single steps: what the device and the host did, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from research.loop import Hook
from research.state import Refused


@contextmanager
def tracing(directory: Path, first: int, last: int) -> Iterator[list[tuple[int, Hook]]]:
    """Hooks for `loop.train` that trace steps `first` to `last`, counted from 1, with JAX's profiler.

    The trace is for `xprof --logdir DIRECTORY` (a package of its own) or TensorBoard with its profile plugin, and, as
    `perfetto_trace.json.gz`, for Perfetto. The device is waited for before and after, so that the trace holds these steps and no
    other; each dispatch is marked with the number of its first step, counted from 0. Leaving the context ends a trace that
    training did not come to the end of. Raises `Refused` where the steps are none.

    >>> with tracing(Path("there"), 11, 20) as hooks:
    ...     [every for every, _ in hooks]
    [10, 20]
    """
    if not 1 <= first <= last:
        raise Refused(f"a trace of steps {first} to {last}: expected two numbers from 1 on, the second no less than the first.")
    running = False

    def start(step: int, state: Any, logs: Any) -> None:
        nonlocal running
        if step == first - 1 and not running:
            jax.block_until_ready((state, logs))
            jax.profiler.start_trace(str(directory), create_perfetto_trace=True)
            running = True

    def stop(step: int, state: Any, logs: Any) -> None:
        nonlocal running
        if step == last and running:
            jax.block_until_ready((state, logs))
            jax.profiler.stop_trace()
            running = False

    if first == 1:
        start(0, None, None)
    try:
        yield [*([(first - 1, start)] if first > 1 else []), (last, stop)]
    finally:
        if running:
            jax.profiler.stop_trace()

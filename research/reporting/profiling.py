"""Profiler traces of single steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from research.core.state import InvalidArgument
from research.training.loop import Hook


@contextmanager
def trace_steps(directory: Path, first: int, last: int) -> Iterator[list[tuple[int, Hook]]]:
    """Yields hooks for `loop.train` that trace steps `first` to `last`, counted from 1, with JAX's profiler.

    `xprof --logdir DIRECTORY` (a separate package) and TensorBoard with its profile plugin show the trace, Perfetto shows its
    `perfetto_trace.json.gz`. The hooks wait for the device before and after, so that the trace holds exactly these steps. Each
    dispatch is annotated with the number of its first step, counted from 0. If training ends early, leaving the context ends the
    trace. Raises `InvalidArgument` unless 1 <= `first` <= `last`.

    >>> with trace_steps(Path("profile"), 11, 20) as hooks:
    ...     [every for every, _ in hooks]
    [10, 20]
    """
    if not 1 <= first <= last:
        raise InvalidArgument(
            f"trace of steps {first} to {last}: expected two numbers from 1, the second at least as large as the first."
        )
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

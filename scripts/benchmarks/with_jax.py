"""The workloads in plain JAX, written by hand: pure functions of nested dictionaries of arrays.

`jax-scan` is the floor: the data is on the device and an epoch is one program. `jax-loop` is the usual loop: the jitted step is
called for each batch. The networks are in jax_networks.py, what they consist of in jax_parts.py.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax_networks import NETWORKS
from jax_parts import Batch, State, Step
from workloads import WORKLOADS


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some epochs and returns the last one's logs."""
    size = WORKLOADS[workload]
    state, step = NETWORKS[workload]()
    rng = np.random.default_rng(0)
    if workload == "stream":
        load = functools.partial(load_batch, data["x"], data["y"], rng)
        epoch = stream_epoch(step, prefetch(load) if system == "jax-scan" else functools.partial(map, load))
    elif system == "jax-loop":
        epoch = loop_epoch(step, jax.device_put(data))
    else:
        epoch = scan_epoch(
            step, jax.device_put(data), unroll=2 if workload == "gan-64" else 1
        )  # so that XLA does not copy weights

    def train(epochs: int) -> dict[str, float]:
        nonlocal state
        for _ in range(epochs):
            state = epoch(state, rng.permutation(size.examples).astype(np.int32).reshape(size.steps, size.batch_size))
        return {name: float(total) / size.steps for name, total in state.sums.items()}

    return train


Epoch = Callable[[State, np.ndarray], State]


def scan_epoch(step: Step, data: Batch, unroll: int) -> Epoch:
    """Returns an epoch as one program, a scan over its batches."""

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state: State, data: Batch, order: Array) -> State:
        def body(state: State, rows: Array) -> tuple[State, None]:
            return step(state, take(data, rows)), None

        return jax.lax.scan(body, reset_sums(state), order, unroll=unroll)[0]

    return lambda state, order: epoch(state, data, order)


def loop_epoch(step: Step, data: Batch) -> Epoch:
    """Returns an epoch that calls a jitted step for each batch; the data is on the device."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: State, data: Batch, order: Array) -> State:
        return step(state, take(data, order[state.step % len(order)]))

    def epoch(state: State, order: np.ndarray) -> State:
        state, order = reset_sums(state), jax.device_put(order)
        for _ in range(len(order)):
            state = train_step(state, data, order)
        return state

    return epoch


def stream_epoch(step: Step, batches: Callable[[np.ndarray], Iterable[Batch]]) -> Epoch:
    """Returns an epoch that calls a jitted step for each batch from the host."""
    train_step = jax.jit(step, donate_argnums=0)

    def epoch(state: State, order: np.ndarray) -> State:
        state = reset_sums(state)
        for batch in batches(order):
            state = train_step(state, batch)
        return state

    return epoch


def take(data: Batch, rows: Array) -> Batch:
    """Returns some rows of each array."""
    return {name: array[rows] for name, array in data.items()}


def reset_sums(state: State) -> State:
    """Returns the state with the sums of logs set to zero, as at the beginning of an epoch."""
    return state._replace(sums=jax.tree.map(jnp.zeros_like, state.sums))


def prefetch(load: Callable[[np.ndarray], Batch]) -> Callable[[np.ndarray], Iterator[Batch]]:
    """Returns a function that yields an epoch's batches; a thread loads two of them in advance."""
    thread = ThreadPoolExecutor(1)

    def batches(order: np.ndarray) -> Iterator[Batch]:
        pending = deque(thread.submit(load, rows) for rows in order[:2])
        for rows in order[2:]:
            pending.append(thread.submit(load, rows))
            yield pending.popleft().result()
        for future in pending:
            yield future.result()

    return batches


def load_batch(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, rows: np.ndarray) -> Batch:
    """Reads images from a file, pads, crops and mirrors them at random and transfers them to the device."""
    n = len(rows)
    padded = np.zeros((n, 40, 40, 3), np.uint8)
    padded[:, 4:-4, 4:-4] = x[rows]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2))
    crops = windows[np.arange(n), *rng.integers(0, 9, (2, n))]
    mirrored = rng.random(n) < 0.5
    crops[mirrored] = crops[mirrored, ..., ::-1]
    pixels = np.moveaxis(crops, 1, -1).reshape(n, -1)
    return jax.device_put({"x": np.divide(pixels, 255, dtype=np.float32), "y": y[rows]})

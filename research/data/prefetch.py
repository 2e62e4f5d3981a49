"""Moves batches to the device ahead of time: a thread prepares what the next dispatches need while the device computes."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

T = TypeVar("T")
DISPATCH_SECONDS = 0.1  # of computation per dispatch: the progress bar and Ctrl-C never wait longer
IN_FLIGHT = 2  # dispatches that the host may be ahead of the device
PREFETCHED = 2  # dispatches whose batches are prepared in advance


class Chunk(NamedTuple):
    """The input of one dispatch: `steps` training steps, the first of which is step `start`.

    If `positions` is None, the dispatch runs one step and `batches` is its batch. Otherwise batches are stacked: every leaf of
    `batches` has a leading axis as long as `positions` (0, 1, ... capacity - 1), and its first `steps` entries are used.

    >>> Chunk(start=4, steps=2, batches=np.zeros((3, 8)), positions=np.arange(3, dtype=np.int32)).batches.shape
    (3, 8)
    """

    start: int
    steps: int
    batches: PyTree
    positions: Int[np.ndarray, " capacity"] | None


class DispatchPacer:
    """Chooses the number of steps per dispatch from the time of earlier dispatches. Limits how far the host runs ahead.

    `agree` is called at each dispatch. With several processes it returns the same number in all of them, because they have to
    dispatch the same programs.

    >>> pacer = DispatchPacer()
    >>> for _ in range(3):
    ...     pacer.dispatched(jnp.zeros(()), steps=1)
    >>> pacer.steps
    1
    """

    def __init__(self, agree: Callable[[int], int] = lambda steps: steps) -> None:
        self.agree = agree
        self.steps = 1
        self.running: deque[tuple[Any, int]] = deque()
        self.since: float | None = None

    def dispatched(self, results: Any, steps: int) -> None:
        """Registers a dispatch of `steps` steps and its results. Blocks until the dispatch `IN_FLIGHT` before it is done."""
        proposal = self.steps
        self.running.append((results, steps))
        if len(self.running) > IN_FLIGHT:
            results, steps = self.running.popleft()
            jax.block_until_ready(results)
            now = time.perf_counter()
            if self.since is not None:
                proposal = max(1, min(2 * self.steps, int(DISPATCH_SECONDS * steps / max(now - self.since, 1e-9))))
            self.since = now
        self.steps = self.agree(proposal)

    def pause(self) -> None:
        """Excludes the time until the next dispatch from the measurement."""
        self.running.clear()
        self.since = None


def chunk_bounds(start: int, total: int, stops: Iterable[int], pacer: DispatchPacer, capacity: int) -> Iterator[tuple[int, int]]:
    """Splits steps `start` to `total` into dispatches and yields (first step, number of steps).

    No dispatch crosses a multiple of one of `stops`. The first is a single step, so that the first log comes early. The others
    have about `pacer.steps` steps, at most `capacity`, of equal length up to the next stop.

    >>> pacer = DispatchPacer()
    >>> pacer.steps = 8
    >>> list(chunk_bounds(0, 30, [20], pacer, 100))
    [(0, 1), (1, 10), (11, 9), (20, 10)]
    """
    step, periods = start, tuple(stops)
    while step < total:
        remaining = min([total, *(step - step % period + period for period in periods)]) - step
        count = 1 if step == start else min(-(-remaining // max(1, round(remaining / pacer.steps))), capacity)
        yield step, count
        step += count


def batch_chunks(bounds: Iterable[tuple[int, int]], batch: Callable[[int], Any], full: Any, capacity: int) -> Iterator[Chunk]:
    """Yields the chunks of batches from the host. If `capacity` exceeds 1, batches with the signature of `full` are stacked.

    >>> batch = lambda step: np.full(2 if step < 2 else 1, float(step))
    >>> stacked, single = batch_chunks([(0, 3)], batch, np.zeros(2), capacity=2)
    >>> stacked.steps, stacked.batches.tolist(), single.start, single.batches.tolist()
    (2, [[0.0, 0.0], [1.0, 1.0]], 2, [2.0])
    """
    stackable, positions = signature(full), np.arange(capacity, dtype=np.int32)
    for start, count in bounds:
        step = start
        for shapes, batches in itertools.groupby((batch(start + i) for i in range(count)), signature):
            group = list(batches)
            if capacity > 1 and shapes == stackable:
                yield Chunk(step, len(group), stack_batches(group, capacity), positions)
            else:
                for i, single in enumerate(group):
                    yield Chunk(step + i, 1, single, None)
            step += len(group)


def row_chunks(
    bounds: Iterable[tuple[int, int]], rows: Callable[[int, int], Int[np.ndarray, " rows"]], batch_size: int, capacity: int
) -> Iterator[Chunk]:
    """Yields the chunks of data that is on the device: row indices in place of batches, `batch_size` per step.

    `rows(start, steps)` returns the indices of several steps, concatenated; the last step may have fewer.

    >>> stacked, single = row_chunks([(0, 3)], lambda start, steps: np.arange(5, dtype=np.int32), batch_size=2, capacity=2)
    >>> stacked.steps, stacked.batches.tolist(), single.start, single.batches.tolist()
    (2, [[0, 1], [2, 3]], 2, [4])
    """
    positions = np.arange(capacity, dtype=np.int32)
    for start, steps in bounds:
        indices, full = rows(start, steps), 0
        if capacity > 1 and len(indices) >= batch_size:
            full = len(indices) // batch_size
            stacked = np.empty((capacity, batch_size), indices.dtype)
            stacked[:full] = indices[: full * batch_size].reshape(full, batch_size)
            yield Chunk(start, full, stacked, positions)
        for step in range(full, steps):
            yield Chunk(start + step, 1, indices[step * batch_size : (step + 1) * batch_size], None)


class Prefetcher(Generic[T]):
    """Iterates over `items` in a thread, ahead of the consumer, inside a `with` block. `waited`: seconds the consumer has waited.

    >>> with Prefetcher(iter("abc")) as letters:
    ...     "".join(letters)
    'abc'
    """

    def __init__(self, items: Iterator[T]) -> None:
        self.items, self.waited = items, 0.0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.pending: deque[Future[Any]] = deque()

    def __enter__(self) -> "Prefetcher[T]":
        for _ in range(PREFETCHED):
            self._request()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        item = self.pending.popleft().result()
        self.waited += time.perf_counter() - began
        if item is self:  # the end: no item can be the prefetcher itself
            raise StopIteration
        self._request()
        return item

    def _request(self) -> None:
        self.pending.append(self.pool.submit(next, self.items, self))


def to_device(tree: PyTree) -> PyTree:
    """Returns a batch on the default device. A batch that spans the devices of several processes is returned unchanged.

    >>> isinstance(to_device(np.zeros(2)), jax.Array)
    True
    """
    distributed = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return tree if distributed else jax.device_put(tree)


def signature(tree: PyTree) -> Any:
    """Returns the structure, shapes and dtypes of a tree: trees with equal signatures can share a compiled program.

    >>> signature({"x": np.zeros(2)}) == signature({"x": np.ones(2)}), signature(np.zeros(2)) == signature(np.zeros(3))
    (True, False)
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def stack_batches(batches: list[Any], length: int) -> PyTree:
    """Stacks batches of one signature along a new leading axis of this length. Entries after the last batch are undefined.

    >>> stack_batches([np.zeros(2), np.ones(2)], 3).shape
    (3, 2)
    """

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array) and jax.default_backend() != "cpu":
            return _stack([*leaves, *[leaves[-1]] * (length - len(leaves))])
        stacked = np.empty((length, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            stacked[i] = leaf
        return stacked

    return jax.tree.map(stack, *batches)


def is_numeric(tree: PyTree) -> bool:
    """Returns whether every leaf is a numeric array, so that batches can be stacked.

    >>> is_numeric((np.zeros(2), None)), is_numeric(np.array(["a"]))
    (True, False)
    """
    leaves = jax.tree.leaves(tree)
    return all(hasattr(leaf, "dtype") and leaf.dtype.kind in "biufc" for leaf in leaves)


_stack = jax.jit(jnp.stack)

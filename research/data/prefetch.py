"""Batches on their way to the device: as many at once as one dispatch takes, brought by a thread while the device works."""

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
SECONDS = 0.1  # of steps in a dispatch: nobody waits longer for the progress bar or for Ctrl-C
IN_FLIGHT = 2  # dispatches that the device may be behind
AHEAD = 2  # dispatches whose batches are brought before they are asked for


class Piece(NamedTuple):
    """What one dispatch takes: so many steps from `start` on.

    `batches` is the step's batch where `slots` is None; otherwise each of its leaves has one more axis in front, as long as
    `slots`, of which the first `steps` are used.
    """

    start: int
    steps: int
    batches: PyTree
    slots: Int[np.ndarray, " capacity"] | None


class Pace:
    """How many steps to dispatch at once, found from how long earlier ones took; keeps the host from running far ahead.

    `agree` is asked at each dispatch and makes one number of what several processes found: they have to dispatch the same.

    >>> pace = Pace()
    >>> for _ in range(3):
    ...     pace.dispatched(jnp.zeros(()), steps=1)
    >>> pace.steps
    1
    """

    def __init__(self, agree: Callable[[int], int] = lambda steps: steps) -> None:
        self.agree = agree
        self.steps = 1
        self.running: deque[tuple[Any, int]] = deque()
        self.since: float | None = None

    def dispatched(self, results: Any, steps: int) -> None:
        """So many steps were dispatched, with these results. Waits for the dispatch that is `IN_FLIGHT` before."""
        found = self.steps
        self.running.append((results, steps))
        if len(self.running) > IN_FLIGHT:
            results, steps = self.running.popleft()
            jax.block_until_ready(results)
            now = time.perf_counter()
            if self.since is not None:
                found = max(1, min(2 * self.steps, int(SECONDS * steps / max(now - self.since, 1e-9))))
            self.since = now
        self.steps = self.agree(found)

    def rest(self) -> None:
        """Time passes in which no step is run."""
        self.running.clear()
        self.since = None


def stretches(start: int, total: int, stops: Iterable[int], pace: Pace, capacity: int) -> Iterator[tuple[int, int]]:
    """Steps from `start` to `total` in dispatches, (step, count) each: none passes a multiple of one of `stops`.

    The first is one step, which shows that all is well. The others are as long as one another, up to the next of `stops`, and
    about as long as the pace.

    >>> pace = Pace()
    >>> pace.steps = 8
    >>> list(stretches(0, 30, [20], pace, 100))
    [(0, 1), (1, 10), (11, 9), (20, 10)]
    """
    step, every = start, tuple(stops)
    while step < total:
        left = min([total, *(step - step % n + n for n in every)]) - step
        count = 1 if step == start else min(-(-left // max(1, round(left / pace.steps))), capacity)
        yield step, count
        step += count


def pieces(plan: Iterable[tuple[int, int]], batch: Callable[[int], Any], whole: Any, capacity: int) -> Iterator[Piece]:
    """The batches of each stretch, those that are shaped like `whole` side by side where `capacity` is more than 1.

    >>> side_by_side, alone = pieces([(0, 3)], lambda step: np.full(2 if step < 2 else 1, float(step)), np.zeros(2), capacity=2)
    >>> side_by_side.steps, side_by_side.batches.tolist(), alone.start, alone.batches.tolist()
    (2, [[0.0, 0.0], [1.0, 1.0]], 2, [2.0])
    """
    shape, slots = kind(whole), np.arange(capacity, dtype=np.int32)
    for start, count in plan:
        step = start
        for found, alike in itertools.groupby((batch(start + i) for i in range(count)), kind):
            group = list(alike)
            if capacity > 1 and found == shape:
                yield Piece(step, len(group), stacked(group, capacity), slots)
            else:
                for i, each in enumerate(group):
                    yield Piece(step + i, 1, each, None)
            step += len(group)


def numbered(
    plan: Iterable[tuple[int, int]], rows: Callable[[int, int], Int[np.ndarray, " rows"]], size: int, capacity: int
) -> Iterator[Piece]:
    """The same for row numbers, `size` a step: `rows(start, steps)` gives those of a whole stretch, its last step's maybe fewer.

    >>> whole, rest = numbered([(0, 3)], lambda start, steps: np.arange(5, dtype=np.int32), size=2, capacity=2)
    >>> whole.steps, whole.batches.tolist(), rest.start, rest.batches.tolist()
    (2, [[0, 1], [2, 3]], 2, [4])
    """
    slots = np.arange(capacity, dtype=np.int32)
    for start, steps in plan:
        found, done = rows(start, steps), 0
        if capacity > 1 and len(found) >= size:
            done = len(found) // size
            side_by_side = np.empty((capacity, size), found.dtype)
            side_by_side[:done] = found[: done * size].reshape(done, size)
            yield Piece(start, done, side_by_side, slots)
        for step in range(done, steps):
            yield Piece(start + step, 1, found[step * size : (step + 1) * size], None)


class Ahead(Generic[T]):
    """An iterator that a thread runs ahead of who asks for its items, within `with`. `waited`: the seconds they had to wait.

    >>> with Ahead(iter("abc")) as letters:
    ...     "".join(letters)
    'abc'
    """

    def __init__(self, items: Iterator[T]) -> None:
        self.items, self.waited = items, 0.0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.coming: deque[Future[Any]] = deque()

    def __enter__(self) -> "Ahead[T]":
        for _ in range(AHEAD):
            self._send()
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        item = self.coming.popleft().result()
        self.waited += time.perf_counter() - began
        if item is self:  # no item can be: the end
            raise StopIteration
        self._send()
        return item

    def _send(self) -> None:
        self.coming.append(self.pool.submit(next, self.items, self))


def brought(tree: PyTree) -> PyTree:
    """A batch on the device; one that lies on the devices of several processes stays where it is.

    >>> isinstance(brought(np.zeros(2)), jax.Array)
    True
    """
    there = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))
    return tree if there else jax.device_put(tree)


def kind(tree: PyTree) -> Any:
    """What tells the batches of one program from another's: structure, shapes and types.

    >>> kind({"x": np.zeros(2)}) == kind({"x": np.ones(2)}), kind(np.zeros(2)) == kind(np.zeros(3))
    (True, False)
    """
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def stacked(batches: list[Any], length: int) -> PyTree:
    """Batches of one kind along a new first axis of this length; what is behind the last of them has no meaning.

    >>> stacked([np.zeros(2), np.ones(2)], 3).shape
    (3, 2)
    """

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array) and jax.default_backend() != "cpu":
            return _stack([*leaves, *[leaves[-1]] * (length - len(leaves))])
        filled = np.empty((length, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            filled[i] = leaf
        return filled

    return jax.tree.map(stack, *batches)


def loopable(tree: PyTree) -> bool:
    """Whether a batch is all arrays of numbers, which can be put side by side.

    >>> loopable((np.zeros(2), None)), loopable(np.array(["a"]))
    (True, False)
    """
    leaves = jax.tree.leaves(tree)
    return all(hasattr(leaf, "dtype") and leaf.dtype.kind in "biufc" for leaf in leaves)


_stack = jax.jit(jnp.stack)

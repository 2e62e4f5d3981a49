"""Batches from data sets that others made: Keras' `PyDataset`, Grain, tf.data, PyTorch's `DataLoader`, generators."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree

from research.data import Batches, arrays
from research.state import Batch, Refused, rows


@runtime_checkable
class Indexed(Protocol):
    """A data set that knows how many batches it has and gives any of them: `PyDataset`, a batched Grain `MapDataset`, a list."""

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def __getitem__(self, position: int) -> Any:
        """A batch."""
        ...


def indexed(source: Indexed, *, steps_per_epoch: int | None = None, name: str = "data") -> Batches:
    """Batches of a data set that can be asked for any batch, in its order, from the start again when it is through.

    An item is `x`, `(x, y)`, `(x, y, sample_weight)` or a `Batch`; float64 becomes float32. What the data set does between
    epochs (`on_epoch_end`) is not called: a batch depends on its step alone, which makes resuming exact. Raises `Refused` for one
    without batches.

    >>> batches = indexed([(np.zeros((2, 3)), np.zeros(2)), (np.ones((2, 3)), np.ones(2))])
    >>> batches.steps_per_epoch, batches.examples, batches.batch(3).y.tolist()
    (2, 4, [1.0, 1.0])
    """
    if len(source) == 0:
        raise Refused(f"{name}: it has no batch, expected at least one: check what it was made from.")
    first = _batch(source[0], name)
    return _batches(lambda step: _batch(source[step % len(source)], name), first, steps_per_epoch or len(source))


def picked(source: Indexed, *, batch_size: int = 32, seed: int = 0, shuffle: bool = True, name: str = "data") -> Batches:
    """Batches put together from a data set that gives any single example: a Grain `MapDataset`, a PyTorch `Dataset`, a list.

    An item is an example without a batch axis, otherwise as for `indexed`. The order is that of `arrays`. Of several processes
    each reads only the examples that go to its devices. Raises `Refused` for an empty data set or one smaller than a batch.

    >>> batches = picked([(np.full(3, i), i) for i in range(5)], batch_size=2, shuffle=False)
    >>> batches.steps_per_epoch, batches.batch(1).y.tolist(), batches.batch(2).x.shape
    (3, [2, 3], (1, 3))
    """
    if len(source) < max(batch_size, 1):
        raise Refused(f"{name}: the batch size is {batch_size} but there are {len(source)} examples: choose fewer, or more data.")

    def part(step: int, start: int, stop: int) -> Batch:
        items = [_batch(source[int(row)], name) for row in order.batch(step).x[start:stop]]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *items)

    order = arrays(np.arange(len(source), dtype=np.int32), batch_size=batch_size, seed=seed, shuffle=shuffle)
    first = _batch(source[0], name)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype), first)
    return Batches(lambda step: part(step, 0, batch_size), shapes, order.steps_per_epoch, len(source), part=part)


def iterated(
    source: Iterable[Any] | Callable[[], Iterable[Any]], *, steps_per_epoch: int | None = None, name: str = "data"
) -> Batches:
    """Batches of a data set that can only be iterated over, one after the other, from the start again when it is through.

    `source` is the data set, or a function that makes an iterator; items are as for `indexed`. `steps_per_epoch` is needed where
    the data set does not know its length. Going on at a later step passes over the batches before it: that is exact if the data
    set gives the same batches in the same order each time it is started. Raises `Refused` where the length is not known, and,
    while training, where an iterator that can't be started again has ended or is asked for a batch that has gone by.

    >>> batches = iterated(lambda: ((np.full((2, 3), i), np.full(2, i)) for i in range(3)), steps_per_epoch=3)
    >>> [int(batches.batch(step).y[0]) for step in (0, 1, 2, 3)]
    [0, 1, 2, 0]
    """
    length = steps_per_epoch or _length(source)
    if length is None:
        raise Refused(f"{name}: its length is not known, so an epoch has no end: pass steps_per_epoch.")
    stream = _Stream(source, name)
    return _batches(lambda step: _batch(stream.at(step), name), _batch(stream.at(0), name), length)


class _Stream:
    """Items by position, where they can only be had in order."""

    def __init__(self, source: Any, name: str) -> None:
        self.source, self.name = source, name
        self.once = isinstance(source, Iterator)
        self.items = self._endless()
        self.position, self.item = -1, None

    def at(self, position: int) -> Any:
        if position < self.position:
            if self.once:
                raise Refused(
                    f"{self.name}: batch {position} has gone by (the iterator is at {self.position}): "
                    "pass a function that makes the iterator, so that it can be started again."
                )
            self.items, self.position = self._endless(), -1
        while self.position < position:
            self.item = next(self.items)
            self.position += 1
        return self.item

    def _endless(self) -> Iterator[Any]:
        for turn in itertools.count():
            empty = True
            for item in self.source() if callable(self.source) else self.source:
                empty = False
                yield item
            if empty or self.once:
                ended = "it has no batch" if empty and turn == 0 else f"it ended after batch {self.position}"
                raise Refused(f"{self.name}: {ended}: pass a data set or a function that can be started again, or fewer steps.")


def _batches(batch: Callable[[int], Batch], first: Batch, steps_per_epoch: int) -> Batches:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)
    return Batches(batch, shapes, steps_per_epoch, steps_per_epoch * rows(first.x))


def _batch(item: Any, name: str) -> Batch:
    """An item as other libraries give it, as a batch of NumPy arrays."""
    parts = item if isinstance(item, tuple | list) else (item,)
    if isinstance(item, Batch):
        return jax.tree.map(_array, item)
    if not 1 <= len(parts) <= 3:
        raise Refused(f"{name}: an item has {len(parts)} parts, expected x, (x, y) or (x, y, sample_weight).")
    return Batch(*(_arrays(part) for part in parts))


def _arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(_array, tree)


def _array(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    # A copy: a data set may fill the same array again while JAX still reads what it held, on the CPU without one of its own.
    return array.astype(np.float32 if array.dtype == np.float64 else array.dtype)


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # what can't tell, or is endless
        return None

"""Batches from the data sets of other libraries: Keras' `PyDataset`, Grain, tf.data, PyTorch's `DataLoader`, generators."""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from research.core.state import Batch, InvalidArgument, num_rows
from research.data.arrays import check_flag, check_integer, named_leaves, to_numpy
from research.data.batches import Batches, from_arrays
from research.data.streams import Stream


@runtime_checkable
class Indexable(Protocol):
    """A data set with random access: `PyDataset`, a Grain `MapDataset`, a PyTorch `Dataset`, a list.

    >>> isinstance([1, 2], Indexable), isinstance(iter([1, 2]), Indexable)
    (True, False)
    """

    def __len__(self) -> int:
        """Returns the number of items."""
        ...

    def __getitem__(self, position: int) -> Any:
        """Returns the item at a position."""
        ...


def from_batches(
    source: Indexable, *, steps_per_epoch: int | None = None, drop_last: bool = False, name: str = "data"
) -> Batches:
    """Returns the batches of a data set with random access to batches, in its order, repeated endlessly.

    An item is `x`, `(x, y)`, `(x, y, sample_weight)` or a `Batch`; float64 becomes float32 as in `from_arrays`. `on_epoch_end` of
    the data set is not called: a batch depends only on its step, which makes resuming exact. Items are read one at a time, also
    where several threads ask for batches. `drop_last` leaves out the last item if it has fewer examples than the first.
    `steps_per_epoch` defaults to the number of items. `name` stands for the data set in error messages. Raises `InvalidArgument`
    if the data set has no batches, or for items that are not numbers of as many examples.

    >>> batches = from_batches([(np.zeros((2, 3)), np.zeros(2)), (np.ones((2, 3)), np.ones(2))])
    >>> batches.steps_per_epoch, batches.examples, batches.batch(3).y.tolist()
    (2, 4, [1.0, 1.0])
    """
    check_flag(drop_last, "drop_last", name)
    count = _check_indexable(source, name, "from_iterable")
    if count == 0:
        raise InvalidArgument(f"{name}: the data set has no batches, expected at least one: check what it was built from.")
    steps = _check_steps(steps_per_epoch, name)
    lock = threading.Lock()

    def batch(position: int) -> Batch:
        with lock:  # a data set may reuse its buffer, or read from one file
            return _batch(source[position], name)

    first = batch(0)
    if drop_last and count > 1 and num_rows(batch(count - 1).x) < num_rows(first.x):
        count -= 1
    return _batches(lambda step: batch(step % count), first, steps or count)


def from_examples(
    source: Indexable, *, batch_size: int = 32, seed: int = 0, shuffle: bool = True, drop_last: bool = False, name: str = "data"
) -> Batches:
    """Returns batches assembled from single examples: of a Grain `MapDataset`, a PyTorch `Dataset`, a list.

    An item is one example without a batch axis, otherwise as for `from_batches`. The order is that of `from_arrays`, as is
    `drop_last`. With several processes each reads only the examples for its own devices. Raises `InvalidArgument` if the data set
    is smaller than a batch, or for examples of different shapes.

    >>> batches = from_examples([(np.full(3, i), i) for i in range(5)], batch_size=2, shuffle=False)
    >>> batches.steps_per_epoch, batches.batch(1).y.tolist(), batches.batch(2).x.shape
    (3, [2, 3], (1, 3))
    """
    count = _check_indexable(source, name, "from_iterable, with batches")
    batch_size = check_integer(batch_size, "the batch size", name, 1)
    if count < batch_size:
        raise InvalidArgument(
            f"{name}: the batch size is {batch_size} but there are {count} examples: choose a smaller one, or add data."
        )
    rows = np.arange(count, dtype=np.int32)
    order = from_arrays(rows, batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last, name=name)
    lock = threading.Lock()

    def example(row: int) -> Batch:
        with lock:  # a data set may reuse its buffer, or read from one file
            return _item(source[row], name)

    def part(step: int, start: int, stop: int) -> Batch:
        return _stacked([example(int(row)) for row in order.batch(step).x[start:stop]], name)

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype), example(0))
    return Batches(lambda step: part(step, 0, batch_size), shapes, order.steps_per_epoch, count, part=part)


def from_iterable(
    source: Iterable[Any] | Callable[[], Iterable[Any]], *, steps_per_epoch: int | None = None, name: str = "data"
) -> Batches:
    """Returns the batches of a data set without random access, in order. It is iterated again each time it is exhausted.

    `source` is an iterable, or a function that returns one; items are as for `from_batches`. `steps_per_epoch` is required if the
    data set has no length. A batch depends only on its step, for several readers too: training, an evaluation and a hook each
    get an iterator of their own. Resuming at a later step, and going back, reads and discards the batches before it.

    That needs a source that yields the same batches each time it is iterated. An iterator, such as a generator or `iter(...)` of
    a data set, can be read once and in order, by one reader: a request for an earlier batch raises `InvalidArgument`. So does a
    source whose batches differ when they are read again, because it shuffles with a random state of its own; only two `Batches`
    that share such a source or iterator can't notice: make one for both. To shuffle, pass a function that makes the data set from
    a fixed seed. Raises `InvalidArgument` also if the length is unknown or an iterator is exhausted.

    >>> batches = from_iterable(lambda: ((np.full((2, 3), i), np.full(2, i)) for i in range(3)), steps_per_epoch=3)
    >>> [int(batches.batch(step).y[0]) for step in (0, 1, 2, 3)]
    [0, 1, 2, 0]
    """
    if not callable(source) and not isinstance(source, Iterable | Indexable):
        raise InvalidArgument(
            f"{name}: the data set is a {type(source).__name__}, expected an iterable of batches or a function that returns one."
        )
    length = _check_steps(steps_per_epoch, name) or _length(source)
    if length is None:
        raise InvalidArgument(
            f"{name}: the length of the data set is unknown, expected one to end an epoch: pass steps_per_epoch."
        )
    stream = Stream(source, length, functools.partial(_batch, name=name), name)
    return _batches(stream.at, stream.at(0), length)


def _batches(batch: Callable[[int], Batch], first: Batch, steps_per_epoch: int) -> Batches:
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)
    return Batches(batch, shapes, steps_per_epoch, steps_per_epoch * num_rows(first.x))


def _batch(item: Any, name: str) -> Batch:
    """Returns an item that is a batch. Raises `InvalidArgument` unless all of its arrays have as many examples."""
    batch = _item(item, name)
    leaves = jax.tree.leaves(batch)
    if not jax.tree.leaves(batch.x) or any(leaf.ndim == 0 or len(leaf) != len(leaves[0]) for leaf in leaves):
        shapes = ", ".join(f"{path[1:]} {leaf.shape}" for path, leaf in named_leaves("", batch)) or "no array"
        raise InvalidArgument(
            f"{name}: an item has the shapes {shapes}; expected a batch: arrays whose first axes count the same examples."
        )
    return batch


def _item(item: Any, name: str) -> Batch:
    """Returns an item of any of the supported forms as a `Batch` of NumPy arrays of its own."""
    parts = item if isinstance(item, tuple | list) else (item,)
    if not isinstance(item, Batch) and not 1 <= len(parts) <= 3:
        raise InvalidArgument(f"{name}: an item has {len(parts)} parts, expected x, (x, y) or (x, y, sample_weight).")
    batch = Batch(*parts)
    # Copies: a data set may reuse its buffer while JAX still reads it. On the CPU, JAX does not copy aligned arrays.
    leaves = [np.array(to_numpy(leaf, f"{name}: {path[1:]}")) for path, leaf in named_leaves("", batch)]
    return jax.tree.unflatten(jax.tree.structure(batch), leaves)


def _stacked(items: list[Batch], name: str) -> Batch:
    """Returns examples as a batch."""
    try:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *items)
    except ValueError as error:
        raise InvalidArgument(
            f"{name}: the examples of a batch differ in their shapes or parts ({' '.join(str(error).split())}): pad or crop them."
        ) from error


def _check_indexable(source: Any, name: str, otherwise: str) -> int:
    """Returns the length of a data set with random access. Raises `InvalidArgument` for anything else."""
    count = _length(source) if isinstance(source, Indexable) and not isinstance(source, Mapping) else None
    if count is None:
        raise InvalidArgument(
            f"{name}: the data set is a {type(source).__name__}, expected one with a length and items by position; "
            f"for others see {otherwise}."
        )
    return count


def _check_steps(steps_per_epoch: int | None, name: str) -> int | None:
    return None if steps_per_epoch is None else check_integer(steps_per_epoch, "steps_per_epoch", name, 1)


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # no length, or infinite
        return None

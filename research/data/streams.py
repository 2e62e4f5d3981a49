"""Batches by position, of a source that yields them in order only, for any number of readers in any threads."""

import array
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from research.core.state import Batch, InvalidArgument

MAX_ITERATORS = 4  # that are open at once: each may hold files, buffers or worker processes
DIGEST_ELEMENTS = 4096  # of each array of a batch, at most, to compare it with what was read before


class Stream:
    """The batches of a source by position. `at` is a pure function of the position, in any order and from several threads.

    `source` is an iterable, or a function that returns one, and is iterated again when it is exhausted. `to_batch` converts an
    item. Readers at different positions get an iterator each, up to `MAX_ITERATORS`; a request is served by the nearest one that
    is not past it, or by a new one, which reads and discards the batches before it.

    An iterator can't be restarted: a request for a batch that is behind it raises `InvalidArgument`. So does a source whose new
    iterator yields other batches than the first one did (a shuffling loader, iterators that share their position). This is
    detected in the first `epoch` positions, from a sample of each batch.

    >>> stream = Stream(lambda: map(np.full, [2] * 5, range(5)), 5, lambda item: Batch(item), "data")
    >>> [int(stream.at(position).x[0]) for position in (3, 0, 7, 4, 1)]
    [3, 0, 2, 4, 1]
    """

    def __init__(
        self, source: Iterable[Any] | Callable[[], Iterable[Any]], epoch: int, to_batch: Callable[[Any], Batch], name: str
    ) -> None:
        self.source, self.epoch, self.to_batch, self.name = source, epoch, to_batch, name
        self.single_pass = isinstance(source, Iterator)
        self.lock = threading.RLock()  # reentrant: a source that reads its own batches fails instead of waiting for itself
        self.cursors: list[_Cursor] = []  # the most recently used last
        self.digests = array.array("L")  # of the first epoch, as the first iterator yielded it
        self.reached = -1  # by any cursor
        self.failure: str | None = None
        if self.single_pass and _streams.setdefault(id(source), self) is not self:
            raise InvalidArgument(
                f"{name}: the {type(source).__name__} is already read by the data set {_streams[id(source)].name!r}, and has one "
                "reader: share that data set, or pass a function that returns the iterator."
            )

    def at(self, position: int) -> Batch:
        """Returns the batch at a position, in arrays of its own."""
        with self.lock:
            if self.failure is not None:
                raise InvalidArgument(self.failure)
            cursor = self._nearest(position) or self._open(position)
            try:
                while cursor.position < position:
                    self._advance(cursor)
            except BaseException:  # of the source: its iterator can't be continued
                self.cursors.remove(cursor)
                raise
            self.cursors.remove(cursor)
            self.cursors.append(cursor)
            return jax.tree.map(np.copy, cursor.batch)

    def _nearest(self, position: int) -> "_Cursor | None":
        """Returns the iterator that has to read least: the last used one if it is a step behind, so that it goes on."""
        behind = [cursor for cursor in reversed(self.cursors) if cursor.position <= position]
        return max(behind, key=lambda cursor: min(cursor.position, position - 1), default=None)

    def _open(self, position: int) -> "_Cursor":
        if self.single_pass and self.reached >= 0:
            raise InvalidArgument(
                f"{self.name}: batch {position} was requested but the iterator is already at {self.reached}: it is read once, "
                "by one reader; pass a function that returns the iterator, so that each reader gets its own."
            )
        cursor = _Cursor(self.source, self.single_pass, self.name)
        furthest = max(reversed(self.cursors), key=lambda other: other.position, default=None)
        # A reader that ended its pass seldom goes on, except for the training itself, which is the furthest.
        self.cursors = [other for other in self.cursors if (other.position + 1) % self.epoch or other is furthest]
        self.cursors = [*self.cursors[1 - MAX_ITERATORS :], cursor]
        return cursor

    def _advance(self, cursor: "_Cursor") -> None:
        item = cursor.next_item()
        for other in [other for other in self.cursors if other is not cursor and other.iterator is cursor.iterator]:
            self.cursors.remove(other)  # one object, which was rewound for the new reader, as by PyTorch's persistent workers
        batch, position = self.to_batch(item), cursor.position + 1
        if not self.single_pass and position < self.epoch:
            digest = _digest(batch)
            if position == len(self.digests):
                self.digests.append(digest)
            elif digest != self.digests[position]:
                self.failure = (
                    f"{self.name}: batch {position} was read again and differs: the data set yields other batches each time it "
                    "is iterated, so it can't have a second reader nor go back; fix its order and random numbers, or pass a "
                    "function that makes it from a seed."
                )
                raise InvalidArgument(self.failure)
        cursor.batch, cursor.position = batch, position
        self.reached = max(self.reached, position)


class _Cursor:
    """An open iterator and the last batch that it yielded. `iterator` is the source's own, of the current pass."""

    def __init__(self, source: Any, single_pass: bool, name: str) -> None:
        self.source, self.single_pass, self.name = source, single_pass, name
        self.position = -1
        self.batch: Batch | None = None
        self.iterator: Iterator[Any] | None = None

    def next_item(self) -> Any:
        """Returns the next item, of a new pass if the source is exhausted."""
        at_start = self.iterator is None
        while True:
            if self.iterator is None:
                self.iterator = _iterator(self.source, self.name)
            item = next(self.iterator, _END)
            if item is not _END:
                return item
            if at_start or self.single_pass:
                empty = at_start and self.position < 0
                reason = "the data set has no batches" if empty else f"the data set ended after batch {self.position}"
                raise InvalidArgument(
                    f"{self.name}: {reason}: pass a data set or a function that can be iterated again, or train for fewer steps."
                )
            self.iterator, at_start = None, True


def _iterator(source: Any, name: str) -> Iterator[Any]:
    iterable = source() if callable(source) else source
    try:
        return iter(iterable)
    except TypeError as error:
        what = "the function returned" if callable(source) else "the data set is"
        raise InvalidArgument(f"{name}: {what} a {type(iterable).__name__}, expected an iterable of batches.") from error


def _digest(batch: PyTree) -> int:
    """Returns a checksum of a sample of a batch: of all elements of small arrays, of every n-th of larger ones."""
    checksum = 0
    for leaf in jax.tree.leaves(batch):
        stride = leaf.size // DIGEST_ELEMENTS | 1  # odd: an even one could meet the same pixel of each image
        checksum = zlib.crc32(leaf.reshape(-1)[::stride].tobytes(), zlib.crc32(str(leaf.shape).encode(), checksum))
    return checksum


_END = object()
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()  # by the id of the iterator that they read

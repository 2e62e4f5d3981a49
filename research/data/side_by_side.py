"""One batch of several data sets' batches, one after another: for members of a population that see their own batches."""

import functools
import hashlib
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int, PyTree

from research.core.state import InvalidArgument, check_type
from research.data.batches import RESIDENT_BYTES, Batches, Resident


def side_by_side(data: Sequence[Batches]) -> Batches:
    """Returns batches that hold the batches of several data sets, in order, for `population(..., own_batches=True)`.

    They have as many batches of the same shapes, such as one data set in the orders of several seeds. The device holds the data
    sets side by side, and those that are equal once, unless all of them together are larger than a data set may be there. Raises
    `InvalidArgument` for data sets of other shapes or lengths.

    >>> from research.data import from_arrays
    >>> x = np.arange(4.0)
    >>> both = side_by_side([from_arrays(x, batch_size=2, seed=seed) for seed in (0, 1)])
    >>> both.batch(0).x.shape, both.steps_per_epoch
    ((4,), 2)
    """
    data = list(data)
    if not data:
        raise InvalidArgument("side_by_side: there are no data sets, expected one for each member.")
    for each in data:
        check_type(each, Batches, "side_by_side: a data set", "research.Batches, as of research.from_arrays(x, y)")
    first, count = data[0], len(data)
    for i, each in enumerate(data):
        if (each.shapes, each.steps_per_epoch, each.examples) != (first.shapes, first.steps_per_epoch, first.examples):
            raise InvalidArgument(
                f"side_by_side: data set {i} has {each.examples} examples in {each.steps_per_epoch} batches of {each.shapes}, "
                f"the first {first.examples} in {first.steps_per_epoch} of {first.shapes}; expected the same."
            )

    def batch(step: int) -> object:
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *[each.batch(step) for each in data])

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)

    return Batches(batch, jax.tree.map(shape, first.shapes), first.steps_per_epoch, count * first.examples, _resident(data))


def _resident(data: Sequence[Batches]) -> Resident | None:
    """Returns the arrays of all data sets on the device; None if one of them stays on the host, or they are too large."""
    residents = [each.resident for each in data if each.resident is not None]
    if len(residents) < len(data):
        return None

    @functools.cache
    def loaded() -> tuple[PyTree, list[int]]:
        """Returns the distinct sources, one after another, and the row at which that of each data set begins."""
        distinct: dict[str, PyTree] = {}
        digests = []
        for resident in residents:
            source = resident.source()
            digests.append(_digest(source))
            distinct.setdefault(digests[-1], source)
        length = len(jax.tree.leaves(residents[0].source())[0])
        positions = {digest: i * length for i, digest in enumerate(distinct)}
        sources = list(distinct.values())
        tree = sources[0] if len(sources) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *sources)
        return tree, [positions[digest] for digest in digests]

    size = jax.tree.leaves(data[0].shapes)[0].shape[0]
    example = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(data[0].shapes))
    if sum(each.examples for each in data) * example > RESIDENT_BYTES and any(loaded()[1]):
        return None

    def rows(step: int, steps: int) -> Int[np.ndarray, " rows"]:
        starts = loaded()[1]
        each = [resident.rows(step, steps) + np.int32(start) for resident, start in zip(residents, starts, strict=True)]
        if len(each[0]) == steps * size:
            return np.stack(each).reshape(len(each), steps, size).swapaxes(0, 1).reshape(-1)
        return np.concatenate([part[i * size : (i + 1) * size] for i in range(steps) for part in each])

    return Resident(lambda: loaded()[0], rows)


def _digest(source: PyTree) -> str:
    digest = hashlib.blake2b(repr(jax.tree.structure(source)).encode())
    for leaf in jax.tree.leaves(source):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

"""One batch of several data sets' batches, one after another: for members of a population that see their own batches."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from research.core.state import InvalidArgument, check_type
from research.data.batches import Batches, Resident


def side_by_side(data: Sequence[Batches]) -> Batches:
    """Returns batches that hold the batches of several data sets, in order, for `population(..., own_batches=True)`.

    They have as many batches of the same shapes, such as one data set in the orders of several seeds. Where all data sets are the
    same arrays (`from_arrays` of equal ones), the device holds them once. Raises `InvalidArgument` for data sets of other
    shapes or lengths.

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
    """Returns the arrays that all data sets have in common on the device; None if they have none."""
    residents = [each.resident for each in data if each.resident is not None]
    if len(residents) < len(data) or not _same_arrays([resident.source() for resident in residents]):
        return None

    def rows(step: int, steps: int) -> Int[np.ndarray, " rows"]:
        return np.concatenate([resident.rows(step + i, 1) for i in range(steps) for resident in residents])

    return Resident(residents[0].source, rows)


def _same_arrays(sources: Sequence[object]) -> bool:
    first = jax.tree.leaves(sources[0])
    return all(a is b or np.array_equal(a, b) for source in sources for a, b in zip(first, jax.tree.leaves(source), strict=True))

"""Batches whose number of examples is random: the sampling that the accounting of differential privacy assumes."""

import functools
import math

import jax
import numpy as np
from jaxtyping import Int

from research.core.state import Batch, InvalidArgument, check_type
from research.data.arrays import MAX_SEED, check_integer
from research.data.batches import Batches, Resident, take_rows


def poisson(data: Batches, *, capacity: int | None = None, seed: int = 0) -> Batches:
    """Returns batches in which each example of a data set is with the same probability, independently of the others.

    The probability is the batch size of `data` over its number of examples, so that batches have that size on average, and an
    epoch, which has as many steps as in `data`, sees each example once on average. `data` comes from `from_arrays` or `lazy`; its
    order does not matter. Batches are padded to `capacity` rows and `Batch.valid` marks the padding. By default that is the
    average and six standard deviations: about one batch in a billion has more examples, and keeps a random choice of them.
    `examples` of the result counts all rows of an epoch.

    Raises `InvalidArgument` for data that stays on the host, for batches that are no `Batch`, and for a `capacity` below the
    batch size.

    >>> from research.data import from_arrays
    >>> batches = poisson(from_arrays(np.arange(1000.0), batch_size=100), seed=1)
    >>> batches.shapes.x.shape, [int(batches.batch(step).valid.sum()) for step in range(5)]
    ((160,), [94, 98, 122, 102, 94])
    """
    check_type(data, Batches, "poisson: the data", "research.Batches, as of research.from_arrays(x, y, batch_size=256)")
    resident = data.resident
    if resident is None:
        raise InvalidArgument("poisson: the data stays on the host, but its examples are drawn one by one: raise resident_bytes.")
    if not isinstance(data.shapes, Batch) or data.shapes.valid is not None:
        raise InvalidArgument(
            "poisson: its batches are no research.Batch without padding; expected those of research.from_arrays."
        )
    seed = check_integer(seed, "seed", "poisson", 0, MAX_SEED)
    n, batch_size = data.examples, int(jax.tree.leaves(data.shapes)[0].shape[0])
    default = min(n, math.ceil(batch_size + 6 * math.sqrt(batch_size)))
    capacity = check_integer(default if capacity is None else capacity, "capacity", "poisson", batch_size)

    @functools.cache
    def source() -> Batch:  # the last row is the padding
        padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf[:1])]), resident.source())
        return padded._replace(valid=np.arange(n + 1) < n)

    def rows_of_step(step: int) -> Int[np.ndarray, " capacity"]:
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        drawn = np.flatnonzero(rng.random(n) < batch_size / n)
        if len(drawn) > capacity:
            drawn = rng.permutation(drawn)[:capacity]
        return np.concatenate([drawn, np.full(capacity - len(drawn), n)]).astype(np.int32)

    def rows(step: int, count: int) -> Int[np.ndarray, " rows"]:
        return np.concatenate([rows_of_step(step + i) for i in range(count)])

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((capacity, *leaf.shape[1:]), leaf.dtype), data.shapes)
    return Batches(
        batch=lambda step: take_rows(source(), rows_of_step(step)),
        shapes=shapes._replace(valid=jax.ShapeDtypeStruct((capacity,), np.bool_)),
        steps_per_epoch=data.steps_per_epoch,
        examples=data.steps_per_epoch * capacity,
        resident=Resident(source, rows),
        part=lambda step, start, stop: take_rows(source(), rows_of_step(step)[start:stop]),
    )

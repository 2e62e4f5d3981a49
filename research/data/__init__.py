"""Batches addressed by step, from whatever data set the user has.

`batches`: `Batches`, and how to make them from arrays, in memory or loaded at first use.
`sources`: `Batches` from other libraries' data sets: indexable ones, single examples, iterables.
`arrays`: what users bring as NumPy arrays that JAX takes unchanged. `streams`: an iterable's batches for several readers.
`poisson`: batches that hold each example with the same probability, independently.
`side_by_side`: one batch of several data sets' batches.
`prefetch`: moves batches to the device ahead of time, as many at once as one dispatch takes.
"""

from research.data.batches import (
    RESIDENT_BYTES,
    Batches,
    Resident,
    examples_in_batch,
    from_arrays,
    lazy,
    num_batches,
    take_rows,
)
from research.data.poisson import poisson
from research.data.side_by_side import side_by_side
from research.data.sources import Indexable, from_batches, from_examples, from_iterable

__all__ = [
    "RESIDENT_BYTES",
    "Batches",
    "Indexable",
    "Resident",
    "examples_in_batch",
    "from_arrays",
    "from_batches",
    "from_examples",
    "from_iterable",
    "lazy",
    "num_batches",
    "poisson",
    "side_by_side",
    "take_rows",
]

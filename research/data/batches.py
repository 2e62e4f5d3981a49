"""Batches addressed by step: the same source, seed and step always give the same batch."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from research.core.state import Batch, InvalidArgument
from research.data.arrays import (
    MAX_SEED,
    check_arrays,
    check_flag,
    check_integer,
    check_labels,
    class_weights,
    named_leaves,
    to_numpy,
)

RESIDENT_BYTES = 1 << 30  # larger data sets stay on the host


class Resident(NamedTuple):
    """A data set small enough for device memory. The batch of a step is `take_rows(source(), rows(step, 1))`.

    `source()` returns a tree of arrays whose first axis counts examples. `rows(step, steps)` returns the row indices of `steps`
    consecutive batches of one epoch, concatenated. `sharding` is the sharding of the source where it spans several devices.

    >>> import numpy as np
    >>> resident = from_arrays(np.arange(5.0), batch_size=2, shuffle=False).resident
    >>> take_rows(resident.source(), resident.rows(1, 2)).x.tolist()
    [2.0, 3.0, 4.0]
    """

    source: Callable[[], PyTree]
    rows: Callable[[int, int], Int[np.ndarray, " rows"]]
    sharding: jax.sharding.Sharding | None = None


class Batches(NamedTuple):
    """A data set split into batches.

    `batch(step)` returns the batch of a step on the host. It is a pure function of the step, counted from the start of training.
    The other fields are known without loading any data. `shapes` describes a full batch as `jax.ShapeDtypeStruct`s. `examples` is
    the size of the data set. `resident` describes the data set in device memory; it is None if the data stays on the host.
    `part(step, start, stop)`, if not None, returns examples `start` to `stop` of a batch without reading the others: of several
    processes each reads only its own.
    `batch`, `resident` and `part` must agree: to replace one of them, replace the others too or set them to None.

    >>> import numpy as np
    >>> batches = Batches(lambda step: np.full(2, step), jax.ShapeDtypeStruct((2,), np.int64), steps_per_epoch=4, examples=8)
    >>> batches.batch(3).tolist()
    [3, 3]
    """

    batch: Callable[[int], Any]
    shapes: Any
    steps_per_epoch: int
    examples: int
    resident: Resident | None = None
    part: Callable[[int, int, int], Any] | None = None


def from_arrays(
    x: PyTree,
    y: PyTree = None,
    sample_weight: PyTree = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    classes: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    resident_bytes: int = RESIDENT_BYTES,
    name: str = "data",
) -> Batches:
    """Returns batches of arrays whose first axis counts examples. Several inputs, outputs or weights come as trees of arrays.

    Each epoch is shuffled with `seed` (all rows are permuted, then split into batches, as in Keras). The last batch of an epoch
    may be shorter; with `drop_last` it is left out. float64 becomes float32, unless `keras.config.floatx()` is "float64" and
    JAX's x64 mode is on. If `classes` is given, `y` must hold integer labels from 0 to `classes - 1`. `class_weight` maps the
    classes of `y` (class numbers or class probabilities, one class per example) to weights and becomes `sample_weight`. Arrays
    of up to `resident_bytes` in total are copied to the device at their first use and stay there as long as the result is alive:
    after changing an array in place, call `from_arrays` again. `name` stands for the data set in error messages.

    Raises `InvalidArgument` for data that is empty, smaller than a batch, of unequal lengths, not numeric, not finite, complex,
    with integers that JAX can't hold, or with labels out of range.

    >>> import numpy as np
    >>> batches = from_arrays(np.arange(5.0), np.arange(5), batch_size=2, shuffle=False)
    >>> batches.steps_per_epoch, [batches.batch(step).x.tolist() for step in range(4)]
    (3, [[0.0, 1.0], [2.0, 3.0], [4.0], [0.0, 1.0]])
    """
    batch_size = check_integer(batch_size, "the batch size", name, 1)
    seed = check_integer(seed, "seed", name, 0, MAX_SEED)
    check_integer(resident_bytes, "resident_bytes", name, 0)
    check_flag(shuffle, "shuffle", name)
    host = Batch(*(_host_arrays(part, field, name) for field, part in (("x", x), ("y", y), ("sample_weight", sample_weight))))
    n = check_arrays(host, name)
    if batch_size > n:
        raise InvalidArgument(f"{name}: the batch size is {batch_size} but there are {n} examples: choose {n} or less.")
    if classes is not None:
        check_labels(host.y, check_integer(classes, "classes", name, 1), name)
    if class_weight is not None:
        host = host._replace(sample_weight=class_weights(host, class_weight, name))
    steps = steps_in_epoch(n, batch_size, drop_last, name)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, " examples"]:
        if not shuffle:
            return np.arange(n, dtype=np.int32)
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n).astype(np.int32)

    def rows(step: int, count: int) -> Int[np.ndarray, " rows"]:
        epoch, position = divmod(step, steps)
        return order(epoch)[position * batch_size : (position + count) * batch_size]

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(host))
    return Batches(
        batch=lambda step: take_rows(host, rows(step, 1)),
        shapes=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), host),
        steps_per_epoch=steps,
        examples=n,
        resident=Resident(lambda: host, rows) if size <= resident_bytes else None,
        part=lambda step, start, stop: take_rows(host, rows(step, 1)[start:stop]),
    )


def lazy(load: Callable[[], Batches], shapes: Any, examples: int, *, drop_last: bool = False) -> Batches:
    """Returns batches that are loaded at first use. Until then, `shapes` (of a full batch) and `examples` describe them.

    Programs can be compiled before or while the data is read. `load` is called once; `drop_last` is that of the batches which it
    returns. Raises `InvalidArgument` at first use if the loaded data has other shapes, dtypes or another number of examples or
    batches.

    >>> import numpy as np
    >>> x = jax.ShapeDtypeStruct((2,), np.float32)
    >>> batches = lazy(lambda: from_arrays(np.arange(5.0), batch_size=2, shuffle=False), Batch(x), examples=5)
    >>> batches.steps_per_epoch, batches.batch(2).x.tolist()
    (3, [4.0])
    """
    examples = check_integer(examples, "examples", "lazy", 1)
    leaves = jax.tree.leaves(shapes)
    if not callable(load) or not leaves or not all(getattr(leaf, "shape", ()) for leaf in leaves):
        raise InvalidArgument(
            "lazy: expected a function that returns Batches, and the shapes of a full batch as a tree of jax.ShapeDtypeStructs, "
            f"got a {type(load).__name__} and {' '.join(str(shapes).split())[:100]}."
        )
    batch_size = leaves[0].shape[0]  # more than there are examples fails when they are loaded; a plan needs shapes alone
    steps = steps_in_epoch(examples, batch_size, drop_last, "lazy")
    size = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) * examples
    resident_size, lock = size <= RESIDENT_BYTES, threading.Lock()

    @functools.cache
    def load_once() -> Batches:
        batches = load()
        if not isinstance(batches, Batches):
            raise InvalidArgument(f"lazy: the function returned a {type(batches).__name__}, expected Batches, as of from_arrays.")
        if (batches.shapes, batches.examples, batches.steps_per_epoch) != (shapes, examples, steps):
            raise InvalidArgument(
                f"data: loaded {batches.examples} examples in {batches.steps_per_epoch} batches of {batches.shapes}, expected "
                f"{examples} in {steps} of {shapes}: the files differ or are damaged; remove them and load them again."
            )
        if resident_size and batches.resident is None:
            raise InvalidArgument(
                "data: the loaded data stays on the host, but it is small: load it with the default resident_bytes."
            )
        return batches

    def loaded() -> Batches:
        with lock:  # two readers in two threads load the data once
            return load_once()

    def resident() -> Resident:
        found = loaded().resident
        assert found is not None
        return found

    def part(step: int, start: int, stop: int) -> Any:
        batches = loaded()
        if batches.part is not None:
            return batches.part(step, start, stop)
        return jax.tree.map(lambda leaf: leaf[start:stop], batches.batch(step))

    return Batches(
        batch=lambda step: loaded().batch(step),
        shapes=shapes,
        steps_per_epoch=steps,
        examples=examples,
        resident=Resident(lambda: resident().source(), lambda step, steps: resident().rows(step, steps))
        if resident_size
        else None,
        part=part,
    )


def examples_in_batch(data: Batches, step: int) -> int:
    """Returns the number of examples in the batch of a step. The last batch of an epoch may have fewer than the others.

    >>> import numpy as np
    >>> batches = from_arrays(np.arange(5.0), batch_size=2)
    >>> [examples_in_batch(batches, step) for step in range(4)]
    [2, 2, 1, 2]
    """
    size = int(jax.tree.leaves(data.shapes)[0].shape[0])
    return min(size, data.examples - step % data.steps_per_epoch * size)


def num_batches(examples: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch, including a shorter last one.

    >>> num_batches(10, 4)
    3
    """
    return -(-examples // batch_size)


def steps_in_epoch(examples: int, batch_size: int, drop_last: bool, name: str) -> int:
    """Returns the number of batches in an epoch, with or without a shorter last one.

    >>> steps_in_epoch(10, 4, False, "data"), steps_in_epoch(10, 4, True, "data")
    (3, 2)
    """
    check_flag(drop_last, "drop_last", name)
    return examples // batch_size if drop_last else num_batches(examples, batch_size)


def take_rows(source: PyTree, rows: Any) -> PyTree:
    """Returns these rows of every array in a tree, on the host or inside a compiled program.

    >>> import numpy as np
    >>> take_rows(Batch(np.arange(4) * 10), np.array([3, 1])).x
    array([30, 10])
    """
    return jax.tree.map(lambda leaf: leaf[rows], source)


def _host_arrays(tree: PyTree, field: str, name: str) -> PyTree:
    """Returns a tree of users' arrays as NumPy arrays."""
    leaves = [to_numpy(leaf, f"{name}: {path}") for path, leaf in named_leaves(field, tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)

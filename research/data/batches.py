"""Batches that a step number addresses: the same source, seed and step give the same batch, wherever and whenever asked."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from research.state import Batch, Refused

RESIDENT_BYTES = 1 << 30  # arrays up to this size are kept on the device


class Resident(NamedTuple):
    """Data small enough to live on the device: a step's batch is `take(source(), rows(step, 1))`.

    `source()` is a tree of arrays whose first axis counts examples; `rows(step, steps)` numbers those of so many steps of one
    epoch, one step's after another's. `sharding` is where it lives, if on more than one device.
    """

    source: Callable[[], PyTree]
    rows: Callable[[int, int], Int[np.ndarray, " rows"]]
    sharding: jax.sharding.Sharding | None = None


class Batches(NamedTuple):
    """A data set cut into batches.

    `batch(step)` is that step's batch on the host, a pure function of the step counted from the start of training. Everything
    else is known without loading anything: `shapes` is a whole batch as `jax.ShapeDtypeStruct`s. `part(step, start, stop)`, where
    it is given, is some of that batch's examples, for less than the whole costs: what one of several processes reads. `batch`,
    `resident` and `part` tell the same: who replaces one replaces, or empties, the others.
    """

    batch: Callable[[int], Any]
    shapes: Any
    steps_per_epoch: int
    examples: int
    resident: Resident | None = None
    part: Callable[[int, int, int], Any] | None = None


def arrays(
    x: PyTree,
    y: PyTree = None,
    sample_weight: PyTree = None,
    *,
    batch_size: int = 32,
    seed: int = 0,
    shuffle: bool = True,
    classes: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    resident_bytes: int = RESIDENT_BYTES,
    name: str = "data",
) -> Batches:
    """Batches of arrays whose first axis counts examples; trees of them for several inputs, outputs and weights.

    Shuffled anew each epoch by `seed` (all rows, then cut, as Keras does); the last batch of an epoch may be shorter, and none
    is dropped. float64 becomes Keras' float type. `classes` says that `y` holds class numbers below it. `class_weight` turns
    into sample weights. Arrays of up to `resident_bytes` live on the device, from the first time that they are used and for as
    long as what is returned: change them, and make it anew. Raises `Refused` for data that is
    empty, of unequal lengths, smaller than a batch, not finite, or labelled out of range; `name` is what it calls them.

    >>> import numpy as np
    >>> batches = arrays(np.arange(5.0), np.arange(5), batch_size=2, shuffle=False)
    >>> batches.steps_per_epoch, [batches.batch(step).x.tolist() for step in range(4)]
    (3, [[0.0, 1.0], [2.0, 3.0], [4.0], [0.0, 1.0]])
    """
    host = Batch(*(jax.tree.map(_host, part) for part in (x, y, sample_weight)))
    n = _checked(host, batch_size, name)
    if classes is not None:
        _check_labels(host.y, classes, name)
    if class_weight is not None:
        host = host._replace(sample_weight=_class_weights(host, class_weight, name))
    steps = steps_in(n, batch_size)

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
        batch=lambda step: take(host, rows(step, 1)),
        shapes=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype), host),
        steps_per_epoch=steps,
        examples=n,
        resident=Resident(lambda: host, rows) if size <= resident_bytes else None,
        part=lambda step, start, stop: take(host, rows(step, 1)[start:stop]),
    )


def deferred(load: Callable[[], Batches], shapes: Any, examples: int) -> Batches:
    """Batches that are loaded when the first is asked for, and until then known by the shapes of one and the number of examples.

    Raises `Refused`, on loading, where the data is not what was announced.

    >>> import numpy as np
    >>> x = jax.ShapeDtypeStruct((2,), np.float32)
    >>> batches = deferred(lambda: arrays(np.arange(5.0), batch_size=2, shuffle=False), Batch(x), examples=5)
    >>> batches.steps_per_epoch, batches.batch(2).x.tolist()
    (3, [4.0])
    """
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(shapes)}
    size = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) * examples

    @functools.cache
    def loaded() -> Batches:
        found = load()
        if (found.shapes, found.examples) != (shapes, examples):
            raise Refused(
                f"data: {found.examples} examples were loaded in batches of {found.shapes}, expected {examples} in {shapes}: "
                "the files are other ones, or damaged; remove them and load them again."
            )
        return found

    def source() -> PyTree:
        found = loaded().resident
        assert found is not None
        return found.source()

    def rows(step: int, steps: int) -> Int[np.ndarray, " rows"]:
        found = loaded().resident
        assert found is not None
        return found.rows(step, steps)

    def part(step: int, start: int, stop: int) -> Any:
        found = loaded()
        if found.part is not None:
            return found.part(step, start, stop)
        return jax.tree.map(lambda leaf: leaf[start:stop], found.batch(step))

    return Batches(
        batch=lambda step: loaded().batch(step),
        shapes=shapes,
        steps_per_epoch=steps_in(examples, leading.pop()),
        examples=examples,
        resident=Resident(source, rows) if size <= RESIDENT_BYTES else None,
        part=part,
    )


def rows_in(data: Batches, step: int) -> int:
    """The examples in a step's batch: an epoch's last may have fewer.

    >>> import numpy as np
    >>> batches = arrays(np.arange(5.0), batch_size=2)
    >>> [rows_in(batches, step) for step in range(4)]
    [2, 2, 1, 2]
    """
    size = int(jax.tree.leaves(data.shapes)[0].shape[0])
    return min(size, data.examples - step % data.steps_per_epoch * size)


def steps_in(examples: int, batch_size: int) -> int:
    """The batches in an epoch, a shorter last one counted.

    >>> steps_in(10, 4)
    3
    """
    return -(-examples // batch_size)


def take(source: PyTree, rows: Any) -> PyTree:
    """The given rows of every array, on the host or inside a program.

    >>> import numpy as np
    >>> take(Batch(np.arange(4) * 10), np.array([3, 1])).x
    array([30, 10])
    """
    return jax.tree.map(lambda leaf: leaf[rows], source)


def _host(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _paths(part: str, tree: PyTree) -> list[tuple[str, np.ndarray]]:
    return [(part + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _checked(host: Batch, batch_size: int, name: str) -> int:
    """The number of examples, after refusing what can't be trained on."""
    named = [*_paths("x", host.x), *_paths("y", host.y), *_paths("sample_weight", host.sample_weight)]
    first, leading = named[0]
    for where, leaf in named:
        if leaf.dtype == object or leaf.dtype.kind in "USV":
            raise Refused(f"{name}: {where} holds {leaf.dtype}, expected numbers of one shape: encode or pad it first.")
        if leaf.ndim == 0:
            raise Refused(f"{name}: {where} is a single number, expected an array whose first axis counts examples.")
        if len(leaf) != len(leading):
            raise Refused(
                f"{name}: {where} has {len(leaf)} examples but {first} has {len(leading)}; "
                "expected the same number: cut or pair them up again."
            )
    n = len(leading)
    if n == 0:
        raise Refused(f"{name}: {first} is empty, expected at least one example: check the path or the split it came from.")
    if batch_size < 1:
        raise Refused(f"{name}: the batch size is {batch_size}, expected at least 1.")
    if batch_size > n:
        raise Refused(f"{name}: the batch size is {batch_size} but there are {n} examples: choose {n} or less.")
    for where, leaf in named:
        if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite([leaf.min(), leaf.max()]).all():
            bad = np.argwhere(~np.isfinite(leaf))
            if len(bad):
                raise Refused(
                    f"{name}: {where} has {len(bad)} values that are not finite, the first at {tuple(map(int, bad[0]))}; "
                    "expected numbers only: drop or fill those rows."
                )
    return n


def _check_labels(y: PyTree, classes: int, name: str) -> None:
    for where, leaf in _paths("y", y):
        if not np.issubdtype(leaf.dtype, np.integer):
            raise Refused(f"{name}: {where} holds {leaf.dtype}, expected whole class numbers from 0 to {classes - 1}.")
        if leaf.ndim > 2 or (leaf.ndim == 2 and leaf.shape[1] != 1):
            raise Refused(
                f"{name}: {where} has the shape {leaf.shape}, expected one class number for each example: "
                "take the argmax of one-hot labels."
            )
        low, high = int(leaf.min()), int(leaf.max())
        if low < 0 or high >= classes:
            row = int(np.argmax(leaf == (low if low < 0 else high)))
            raise Refused(
                f"{name}: {where} holds the label {low if low < 0 else high} (row {row}), expected 0 to {classes - 1}: "
                "count labels from 0, or give the model more classes."
            )


def _class_weights(host: Batch, class_weight: Mapping[int, float], name: str) -> np.ndarray:
    """A weight for each example by its class, one-hot or not; 1 for a class that is not listed, as in Keras."""
    if host.sample_weight is not None:
        raise Refused(f"{name}: class_weight and sample_weight are both given, expected one: multiply them into sample_weight.")
    leaves = jax.tree.leaves(host.y)
    if len(leaves) != 1:
        raise Refused(
            f"{name}: class_weight needs one target, y has {len(leaves)}: give a sample_weight for each output instead."
        )
    y = leaves[0]
    labels = np.argmax(y, axis=-1) if y.ndim > 1 and y.shape[-1] > 1 else np.round(y.reshape(len(y), -1)[:, 0])
    labels = labels.astype(np.int64)
    weights = np.ones(labels.shape, np.float32)
    for label, weight in class_weight.items():
        weights[labels == label] = weight
    return weights

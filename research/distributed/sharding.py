"""A learner on many devices: `shard` and `build_sharded` for its state and steps, `shard_batches` for its data."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import keras  # noqa: F401  (for the examples in docstrings)
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.state import InvalidArgument
from research.data.batches import Batches, Resident, examples_in_batch
from research.distributed.gather import gather_at_use
from research.distributed.layouts import Layout, default_layout
from research.distributed.placement import state_shardings
from research.transforms.init import init_abstract, init_again


def shard(learner: Learner, mesh: Mesh, layout: Layout | None = None) -> Learner:
    """Returns the learner on a mesh: its state lies as a layout says before and after each step, and batches are split.

    The layout is by default the built-in one for the mesh's axes. Results are those of one device, to rounding; Dropout and
    noise draw the same numbers. Each of several processes gets its part of the state, and all predictions and logs. A weight that
    is split over `fsdp` is gathered at each use, so that few complete weights exist at a time. `init` creates the complete state
    before it splits it: for larger states see `build_sharded`. Raises `InvalidArgument` for a layout that does not fit, see
    `state_shardings`.

    >>> import research
    >>> from research.distributed import mesh
    >>> learner = research.supervised(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), loss="mse")
    >>> sharded = shard(learner, mesh(jax.devices()[:1], data=-1))
    >>> state, logs = jax.jit(sharded.train)(sharded.init(), research.Batch(np.ones((4, 2)), np.ones((4, 1))))
    >>> state.trainable[0].sharding.spec
    P()
    """
    shardings = state_shardings(learner.names, jax.eval_shape(learner.init), mesh, layout or default_layout(mesh))
    return _sharded(learner, shardings, mesh)


def build_sharded(build: Callable[[], Learner], mesh: Mesh, layout: Layout | None = None) -> tuple[Learner, Any]:
    """Returns a sharded learner and its first state, each part of which is created on the devices that hold it.

    The builder runs twice, as in `research.init_sharded`, so it must set its own seed.

    >>> import research
    >>> from research.distributed import mesh
    >>> def build():
    ...     keras.utils.set_random_seed(0)
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> learner, state = build_sharded(build, mesh(jax.devices()[:1], fsdp=-1))
    >>> state.trainable[0].shape
    (4, 2)
    """
    learner, shapes = init_abstract(build)
    shardings = state_shardings(learner.names, shapes, mesh, layout or default_layout(mesh))
    return _sharded(learner, shardings, mesh), init_again(build, shapes, shardings)


def _sharded(learner: Learner, shardings: PyTree, mesh: Mesh) -> Learner:
    at_use = jax.tree.map(_without_fsdp, shardings)
    train, evaluate, predict = (gather_at_use(f, at_use) for f in (learner.train, learner.evaluate, learner.predict))

    def constrained(state: Any) -> Any:
        return jax.lax.with_sharding_constraint(state, shardings)

    def sharded_predict(state: Any, batch: Any) -> Any:
        outputs = predict(constrained(state), shard_batch(batch, mesh))
        # One of several processes can read only what its own devices hold: so they hold everything.
        replicated = NamedSharding(mesh, P())
        return jax.lax.with_sharding_constraint(outputs, replicated) if mesh.is_multi_process else outputs

    def sharded_step(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(state: Any, batch: Any) -> Any:
            after, logs = step(constrained(state), shard_batch(batch, mesh))
            return constrained(after), jax.lax.with_sharding_constraint(logs, NamedSharding(mesh, P()))

        return call

    return learner._replace(
        init=lambda: jax.device_put(learner.init(), shardings),
        reset=lambda state: constrained(learner.reset(state)),
        train=sharded_step(train),
        evaluate=sharded_step(evaluate),
        predict=sharded_predict,
    )


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns a batch with its examples split over the mesh's `data` and `fsdp` axes; for use inside a compiled program.

    Leaves whose first axis does not divide are replicated.

    >>> from research.distributed import mesh
    >>> jax.jit(lambda x: shard_batch(x, mesh(jax.devices()[:1], data=1)))(np.ones(2)).shape
    (2,)
    """
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _batch_spec(leaf, mesh))), batch)


def shard_batches(batches: Batches, mesh: Mesh, *, divides: bool = True) -> Batches:
    """Returns the batches on a mesh: a resident data set is replicated on every device, other batches are split over the mesh.

    A batch that does not divide, an epoch's last, is replicated, and every device computes all of it. Raises `InvalidArgument`
    for a batch size that does not divide, unless `divides` is False: in evaluation that costs little, in training it would
    waste the devices.

    >>> import research
    >>> from research.distributed import mesh
    >>> shard_batches(research.from_arrays(np.arange(4.0), batch_size=2), mesh(jax.devices()[:1], data=1)).steps_per_epoch
    2
    """
    size = jax.tree.leaves(batches.shapes)[0].shape[0]
    parts = math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))
    if divides and size % parts:
        near = sorted({max(parts, size // parts * parts), -(-size // parts) * parts})
        raise InvalidArgument(
            f"shard_batches: batches of {size} examples over {parts} devices ({', '.join(_batch_axes(mesh))}); expected a "
            f"multiple of {parts}: choose {' or '.join(map(str, near))}."
        )
    resident = batches.resident
    if resident is not None:
        source = lambda: jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, P())), resident.source())  # noqa: E731
        return batches._replace(resident=Resident(source, resident.rows, NamedSharding(mesh, P())))

    def batch(step: int) -> Any:
        count = examples_in_batch(batches, step)
        if batches.part is None or count % parts:
            return jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, _batch_spec(leaf, mesh))), batches.batch(step))
        return _batch_from_parts(batches, step, count, NamedSharding(mesh, P(_batch_axes(mesh))))

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, _batch_spec(leaf, mesh)))

    return batches._replace(batch=batch, shapes=jax.tree.map(shape, batches.shapes), part=None)


def _place(leaf: Any, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(np.shape(leaf), sharding, lambda part: np.asarray(leaf)[part])


def _batch_from_parts(batches: Batches, step: int, count: int, sharding: NamedSharding) -> PyTree:
    """Returns a batch of `count` examples of which this process reads only those that its own devices hold."""
    assert batches.part is not None
    part = batches.part
    read = functools.cache(lambda start, stop: jax.tree.leaves(part(step, start, stop)))

    def array(i: int, shape: tuple[int, ...]) -> jax.Array:
        def local(where: Any) -> Any:
            start, stop, _ = where[0].indices(count)
            return read(start, stop)[i]

        return jax.make_array_from_callback(shape, sharding, local)

    leaves, structure = jax.tree.flatten(batches.shapes)
    return jax.tree.unflatten(structure, [array(i, (count, *leaf.shape[1:])) for i, leaf in enumerate(leaves)])


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)


def _batch_spec(leaf: Any, mesh: Mesh) -> P:
    axes = _batch_axes(mesh)
    replicated = not axes or not np.shape(leaf) or np.shape(leaf)[0] % math.prod(mesh.shape[axis] for axis in axes)
    return P() if replicated else P(axes)


def _without_fsdp(sharding: NamedSharding) -> NamedSharding | None:
    """Returns the sharding of a weight at its use, None for one that is not split over `fsdp`."""
    parts = [part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    if not any("fsdp" in part for part in parts):
        return None
    rest = [tuple(axis for axis in part if axis not in ("fsdp", None)) or None for part in parts]
    return NamedSharding(sharding.mesh, P(*rest))

"""One learner on many devices: a mesh, where weights lie on it, and steps that keep to that and compute the same numbers."""

import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.data import Batches, Resident, rows_in
from research.gathering import gathering
from research.state import Refused, abstract
from research.step import Learner

AXES = ("data", "fsdp", "tensor")  # over the first two batches are split, over the last two weights
SMALL = 1 << 10  # numbers: what has fewer is kept whole everywhere

Weights = Mapping[str, tuple[int, ...]]  # name -> shape
Layout = Callable[[Weights, Mesh], dict[str, P]]  # how each weight is split


def mesh(devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Devices in a grid whose axes are called `data`, `fsdp` and `tensor`, those that are given; one size may be -1: the rest.

    By default all devices that JAX sees. Raises `Refused` where the sizes do not multiply to their number.

    >>> dict(mesh(jax.devices()[:1], data=-1).shape)
    {'data': 1}
    """
    held = list(jax.devices() if devices is None else devices)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        raise Refused(
            f"mesh: {unknown[0] if unknown else 'no axis'} is given; expected some of {', '.join(AXES)}, as in data=-1."
        )
    sizes = {axis: axes[axis] for axis in AXES if axis in axes}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and fixed > 0 and len(held) % fixed == 0:
        sizes[open_axes[0]] = len(held) // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(held):
        told = ", ".join(f"{axis}={axes[axis]}" for axis in sizes)
        raise Refused(
            f"mesh: {told} on {len(held)} devices; expected sizes that multiply to {len(held)}, of which one may be -1."
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=held, axis_types=(AxisType.Auto,) * len(sizes))


def data(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Every weight whole on every device.

    >>> data({"dense/kernel": (4, 2)}, mesh(jax.devices()[:1], data=1))
    {'dense/kernel': P()}
    """
    return {name: P() for name in weights}


def fsdp(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Every weight split along its longest axis that divides, over the mesh's `fsdp`; small ones whole.

    >>> one = mesh(jax.devices()[:1], fsdp=1)
    >>> fsdp({"dense/kernel": (40, 100), "dense/bias": (100,)}, one)
    {'dense/kernel': P(None, 'fsdp'), 'dense/bias': P()}
    """
    return _split_further(data(weights, mesh), weights, mesh)


def tensor(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Attention by heads, dense layers by their wider side, embeddings by words, over `tensor`; the rest over `fsdp`, if there.

    A dense layer that widens is split by its outputs, one that narrows by its inputs, so that a pair of them meets once. Heads
    are told by the names that Keras' and KerasHub's attention layers give: query, key, value, attention_output.

    >>> one = mesh(jax.devices()[:1], tensor=1)
    >>> list(tensor({"up/kernel": (64, 256), "down/kernel": (256, 64)}, one).values())
    [P(None, 'tensor'), P('tensor', None)]
    """
    size = mesh.shape.get("tensor", 1)
    specs = {}
    for name, shape in weights.items():
        axis = _tensor_axis(name, weights)
        splits = axis is not None and math.prod(shape) >= SMALL and shape[axis] % size == 0
        specs[name] = P(*(("tensor" if splits and i == axis else None) for i in range(len(shape)))) if splits else P()
    return _split_further(specs, weights, mesh)


def rules(*pairs: tuple[str, P]) -> Layout:
    """A layout from (regular expression, spec) pairs: a weight takes the spec of the first that is found in its name.

    What none is found in is whole everywhere. Raises `Refused`, on use, for a rule that no weight takes, and for a spec that
    does not divide a weight.

    >>> layout = rules((r"kernel$", P(None, "tensor")))
    >>> layout({"dense/kernel": (4, 2), "dense/bias": (2,)}, mesh(jax.devices()[:1], tensor=1))
    {'dense/kernel': P(None, 'tensor'), 'dense/bias': P()}
    """

    def layout(weights: Weights, mesh: Mesh) -> dict[str, P]:
        taken = {name: next((i for i, (rule, _) in enumerate(pairs) if re.search(rule, name)), None) for name in weights}
        idle = [pairs[i][0] for i in range(len(pairs)) if i not in taken.values()]
        if idle:
            near = difflib.get_close_matches(idle[0], weights, n=3, cutoff=0) or ["none"]
            raise Refused(
                f"layout: the rule {idle[0]!r} is taken by no weight; expected one of them to match: {', '.join(near)} ..."
            )
        return {name: P() if i is None else pairs[i][1] for name, i in taken.items()}

    return layout


def keras_layout(layouts: keras.distribution.LayoutMap) -> Layout:
    """A `keras.distribution.LayoutMap` as a layout: its keys are found in names as Keras finds them in paths.

    >>> devices = keras.distribution.DeviceMesh((1,), ["tensor"], ["cpu:0"])
    >>> layouts = keras.distribution.LayoutMap(devices)
    >>> layouts["dense/kernel"] = (None, "tensor")
    >>> keras_layout(layouts)({"dense/kernel": (4, 2)}, mesh(jax.devices()[:1], tensor=1))
    {'dense/kernel': P(None, 'tensor')}
    """

    def layout(weights: Weights, mesh: Mesh) -> dict[str, P]:
        found = {name: layouts[name] for name in weights}
        return {name: P() if each is None else P(*each.axes) for name, each in found.items()}

    return layout


def fitting(mesh: Mesh) -> Layout:
    """The built-in layout that uses all axes of a mesh.

    >>> fitting(mesh(jax.devices()[:1], data=1)).__name__
    'data'
    """
    return tensor if "tensor" in mesh.shape else fsdp if "fsdp" in mesh.shape else data


def shardings(names: PyTree, shapes: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Where each leaf of a state lies: weights as the layout says, slots and averages as the weight that they belong to.

    `names` and `shapes` are shaped like the state. Everything else is whole everywhere. Raises `Refused` for a layout that names
    an axis which the mesh lacks or which does not divide a weight.

    >>> import research
    >>> model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(100)])
    >>> learner = research.supervised(model, loss="mse", optimizer="adam")
    >>> placed = shardings(learner.names, jax.eval_shape(learner.init), mesh(jax.devices()[:1], fsdp=1), fsdp)
    >>> [each.spec for each in placed.trainable], placed.optimizer[2].spec
    ([P(None, 'fsdp'), P()], P(None, 'fsdp'))
    """
    leaves = jax.tree_util.tree_leaves_with_path(names)
    sizes = [tuple(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    weights: dict[str, tuple[int, ...]] = {}
    owned: list[str | None] = []
    for (path, name), size in zip(leaves, sizes, strict=True):
        held = _holder(path)
        full = None if held is None else "/".join([*held, name])
        weights |= {} if full is None else {full: size}
        owned.append(full)
    specs = layout(weights, mesh)
    for name, size in weights.items():
        _check(name, size, specs[name], mesh)
    for i, ((_, name), size) in enumerate(zip(leaves, sizes, strict=True)):
        if owned[i] is None:
            owned[i] = _owner(name, size, weights)
    placed = [NamedSharding(mesh, P() if owner is None else specs[owner]) for owner in owned]
    return jax.tree.unflatten(jax.tree.structure(names), placed)


def shard(learner: Learner, mesh: Mesh, layout: Layout | None = None) -> Learner:
    """The same learner on a mesh: its state lies as a layout says, before and after each step, and batches are split.

    By default the built-in layout that fits the mesh. The numbers are those of one device, to rounding; Dropout and noise draw
    what they draw there. A weight that is split over `fsdp` is gathered where it is used, each time anew, so that no more than a
    few are whole at a time. `init` makes the whole state before it is split: for larger ones see `born`.

    >>> import research
    >>> learner = research.supervised(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), loss="mse")
    >>> sharded = shard(learner, mesh(jax.devices()[:1], data=-1))
    >>> state, logs = jax.jit(sharded.train)(sharded.init(), research.Batch(np.ones((4, 2)), np.ones((4, 1))))
    >>> state.trainable[0].sharding.spec
    P()
    """
    placed = shardings(learner.names, jax.eval_shape(learner.init), mesh, layout or fitting(mesh))
    return _sharded(learner, placed, mesh)


def born(build: Callable[[], Learner], mesh: Mesh, layout: Layout | None = None) -> tuple[Learner, Any]:
    """A sharded learner and its first state, each part of which comes into being where it is to lie.

    The builder runs twice, as in `research.born`: it sets its own seed.

    >>> import research
    >>> def build():
    ...     keras.utils.set_random_seed(0)
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> learner, state = born(build, mesh(jax.devices()[:1], fsdp=-1))
    >>> state.trainable[0].shape
    (4, 2)
    """
    learner, shapes = abstract(build)
    placed = shardings(learner.names, shapes, mesh, layout or fitting(mesh))
    return _sharded(learner, placed, mesh), jax.jit(lambda: build().init(), out_shardings=placed)()


def _sharded(learner: Learner, placed: PyTree, mesh: Mesh) -> Learner:
    whole = jax.tree.map(_without_fsdp, placed)
    gathered = [gathering(function, whole) for function in (learner.train, learner.evaluate, learner.predict)]

    def kept(state: Any) -> Any:
        return jax.lax.with_sharding_constraint(state, placed)

    def step(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(state: Any, batch: Any) -> Any:
            after, logs = function(kept(state), split(batch, mesh))
            return kept(after), jax.lax.with_sharding_constraint(logs, NamedSharding(mesh, P()))

        return call

    return Learner(
        init=lambda: jax.device_put(learner.init(), placed),
        reset=lambda state: kept(learner.reset(state)),
        train=step(gathered[0]),
        evaluate=step(gathered[1]),
        predict=lambda state, batch: gathered[2](kept(state), split(batch, mesh)),
        names=learner.names,
    )


def split(batch: PyTree, mesh: Mesh) -> PyTree:
    """A batch with its examples over the mesh's `data` and `fsdp`, inside a program; whole everywhere where they do not divide.

    >>> jax.jit(lambda x: split(x, mesh(jax.devices()[:1], data=1)))(np.ones(2)).shape
    (2,)
    """
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _batch_spec(leaf, mesh))), batch)


def spread(batches: Batches, mesh: Mesh, *, divides: bool = True) -> Batches:
    """The same batches brought to a mesh: what lives on the device lives whole on each; others come split over it.

    A batch that does not divide, an epoch's last, comes whole to each, and each computes all of it. Raises `Refused` for a batch
    size that does not divide, unless `divides` is False: of no consequence in evaluation, a waste of devices in training.

    >>> import research
    >>> spread(research.arrays(np.arange(4.0), batch_size=2), mesh(jax.devices()[:1], data=1)).steps_per_epoch
    2
    """
    size = jax.tree.leaves(batches.shapes)[0].shape[0]
    parts = math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))
    if divides and size % parts:
        near = sorted({max(parts, size // parts * parts), -(-size // parts) * parts})
        raise Refused(
            f"spread: batches of {size} examples over {parts} devices ({', '.join(_batch_axes(mesh))}); expected a multiple of "
            f"{parts}: choose {' or '.join(map(str, near))}."
        )

    def place(leaf: Any, spec: P) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda part: np.asarray(leaf)[part])

    def batch(step: int) -> Any:
        held = batches.part
        count = rows_in(batches, step)
        if held is None or count % parts:
            return jax.tree.map(lambda leaf: place(leaf, _batch_spec(leaf, mesh)), batches.batch(step))
        # What each of this process' devices is to have, and nothing else, is read.
        read = functools.cache(lambda start, stop: jax.tree.leaves(held(step, start, stop)))

        def placed(i: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
            whole = (count, *shape.shape[1:])
            sharding = NamedSharding(mesh, P(_batch_axes(mesh)))

            def own(where: Any) -> Any:
                start, stop, _ = where[0].indices(count)
                return read(start, stop)[i]

            return jax.make_array_from_callback(whole, sharding, own)

        leaves, structure = jax.tree.flatten(batches.shapes)
        return jax.tree.unflatten(structure, [placed(i, leaf) for i, leaf in enumerate(leaves)])

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, _batch_spec(leaf, mesh)))

    held = batches.resident
    if held is not None:
        source = lambda: jax.tree.map(lambda leaf: place(leaf, P()), held.source())  # noqa: E731
        return batches._replace(resident=Resident(source, held.rows, NamedSharding(mesh, P())))
    return batches._replace(
        batch=batch,
        shapes=jax.tree.map(shape, batches.shapes),
        part=None,
    )


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)


def _batch_spec(leaf: Any, mesh: Mesh) -> P:
    axes = _batch_axes(mesh)
    whole = not axes or not np.shape(leaf) or np.shape(leaf)[0] % math.prod(mesh.shape[axis] for axis in axes)
    return P() if whole else P(axes)


def _without_fsdp(sharding: NamedSharding) -> NamedSharding | None:
    """How a split weight lies where it is used; None for one that is not split over `fsdp`."""
    parts = [part if isinstance(part, tuple) else (part,) for part in sharding.spec]
    if not any("fsdp" in part for part in parts):
        return None
    rest = [tuple(axis for axis in part if axis not in ("fsdp", None)) or None for part in parts]
    return NamedSharding(sharding.mesh, P(*rest))


def _split_further(specs: dict[str, P], weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Specs with the longest axis that is left and divides split over `fsdp`."""
    if "fsdp" not in mesh.shape:
        return specs
    found = {}
    for name, shape in weights.items():
        parts = [*specs[name], *[None] * (len(shape) - len(specs[name]))]
        free = [i for i, size in enumerate(shape) if parts[i] is None and size % mesh.shape["fsdp"] == 0]
        if math.prod(shape) >= SMALL and free:
            parts[max(free, key=lambda i: shape[i])] = "fsdp"
        found[name] = P(*parts) if any(parts) else P()
    return found


def _tensor_axis(name: str, weights: Weights) -> int | None:
    """The axis of a weight that tensor parallelism splits."""
    shape, (*_, layer, kind) = weights[name], ["", *name.split("/")]
    if kind == "embeddings":
        return 0
    if layer in ("query", "key", "value"):
        if kind == "bias":
            return 0
        output = weights.get(f"{name.rpartition(f'{layer}/')[0]}attention_output/kernel")
        return 1 if len(shape) == 3 and (output is None or shape[1] == output[0]) else 0
    if layer == "attention_output":
        return 0 if kind == "kernel" else None
    kernel = weights.get(f"{name.rpartition('/')[0]}/kernel", ())
    widens = len(kernel) == 2 and kernel[1] >= kernel[0]
    if kind == "kernel" and len(shape) == 2:
        return 1 if widens else 0
    return 0 if kind == "bias" and widens else None


def _holder(path: tuple[Any, ...]) -> list[str] | None:
    """Where in a larger state the `State` is that holds this leaf among its weights; None for a leaf that is no weight."""
    keys = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path]
    for part in ("trainable", "non_trainable"):
        if part in keys:
            return [str(key) for key in keys[: keys.index(part)]]
    return None


def _owner(name: str, shape: tuple[int, ...], weights: Weights) -> str | None:
    """The weight that a leaf belongs to: of its shape, and its name ends as the leaf's does."""
    found = [weight for weight, size in weights.items() if size == shape and shape and _ends_alike(name, weight)]
    return max(found, key=len, default=None)


def _ends_alike(name: str, weight: str) -> bool:
    return name == weight or name.endswith(f"/{weight}") or weight.endswith(f"/{name}") or _tail(name) == _tail(weight)


def _tail(name: str) -> str:
    return name.partition("/")[2]


def _check(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise Refused(f"layout: {spec} for {name} of the shape {shape}; expected no more entries than the weight has axes.")
    for axis, part in enumerate(spec):
        names = part if isinstance(part, tuple) else () if part is None else (part,)
        missing = [each for each in names if each not in mesh.shape]
        if missing:
            raise Refused(f"layout: {name} is split over {missing[0]!r}, which the mesh lacks; it has {', '.join(mesh.shape)}.")
        parts = math.prod(mesh.shape[each] for each in names)
        if shape[axis] % parts:
            raise Refused(
                f"layout: {name} of the shape {shape} can't be split into {parts} parts along axis {axis}; expected a multiple "
                f"of {parts}: choose another axis, or a size of {'x'.join(names)} that divides {shape[axis]}."
            )

"""A mesh of devices, and layouts: how each weight is split over it."""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import keras
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from research.core.state import InvalidArgument

AXES = ("data", "fsdp", "tensor")  # batches are split over the first two, weights over the last two
MIN_SPLIT_SIZE = 1 << 10  # elements: the built-in layouts replicate smaller weights

Weights = Mapping[str, tuple[int, ...]]  # name -> shape
Layout = Callable[[Weights, Mesh], dict[str, P]]  # returns the spec of each weight


def mesh(devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Returns a mesh with some of the axes `data`, `fsdp` and `tensor`, in this order.

    `axes` are their sizes; one of them may be -1, which stands for the remaining devices. `devices` are all that JAX sees by
    default. Raises `InvalidArgument` for another axis, and where the product of the sizes is not the number of devices.

    >>> dict(mesh(jax.devices()[:1], data=-1).shape)
    {'data': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown or not axes:
        problem = f"unknown axis {unknown[0]!r}" if unknown else "no axis"
        raise InvalidArgument(f"mesh: {problem}; expected some of {', '.join(AXES)}, as in data=-1.")
    sizes = {axis: axes[axis] for axis in AXES if axis in axes}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        requested = ", ".join(f"{axis}={axes[axis]}" for axis in sizes)
        raise InvalidArgument(
            f"mesh: {requested} on {len(devices)} devices; expected sizes that multiply to {len(devices)}; one may be -1."
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=(AxisType.Auto,) * len(sizes))


def data(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns the layout of data parallelism: every weight is replicated on every device.

    >>> data({"dense/kernel": (4, 2)}, mesh(jax.devices()[:1], data=1))
    {'dense/kernel': P()}
    """
    return {name: P() for name in weights}


def fsdp(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns the layout of fully sharded data parallelism: weights are split along their longest divisible axis.

    They are split over the mesh's `fsdp` axis. Weights of fewer than `MIN_SPLIT_SIZE` elements are replicated.

    >>> one_device = mesh(jax.devices()[:1], fsdp=1)
    >>> fsdp({"dense/kernel": (40, 100), "dense/bias": (100,)}, one_device)
    {'dense/kernel': P(None, 'fsdp'), 'dense/bias': P()}
    """
    return _split_over_fsdp(data(weights, mesh), weights, mesh)


def members(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns the layout of a population: its members are split over the mesh's `tensor` axis, and each is complete there.

    Batches are split over the other axes. For `research.transforms.population` with as many members as the axis has devices, or a
    multiple.

    >>> members({"dense/kernel": (16, 4, 2)}, mesh(jax.devices()[:1], tensor=1))
    {'dense/kernel': P('tensor',)}
    """
    return {name: P("tensor") for name in weights}


def tensor(weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns a layout of tensor parallelism: attention by heads, dense layers by their wider side, embeddings by vocabulary.

    Weights are split over `tensor`, and further over `fsdp` where the mesh has that axis. A dense layer with at least as many
    outputs as inputs is split by its outputs, any other by its inputs, so that a pair of them needs one reduction. Attention
    heads are recognised by the layer names of Keras and KerasHub: query, key, value, attention_output.

    >>> one_device = mesh(jax.devices()[:1], tensor=1)
    >>> list(tensor({"up/kernel": (64, 256), "down/kernel": (256, 64)}, one_device).values())
    [P(None, 'tensor'), P('tensor', None)]
    """
    size = mesh.shape.get("tensor", 1)
    specs = {}
    for name, shape in weights.items():
        axis = _tensor_axis(name, weights)
        split = axis is not None and math.prod(shape) >= MIN_SPLIT_SIZE and shape[axis] % size == 0
        specs[name] = P(*(("tensor" if i == axis else None) for i in range(len(shape)))) if split else P()
    return _split_over_fsdp(specs, weights, mesh)


def rules(*pairs: tuple[str, P]) -> Layout:
    """Returns a layout from (regular expression, spec) pairs: the first expression found in a weight's name decides.

    A weight that matches none is replicated. The layout raises `InvalidArgument` for a rule that decides for no weight;
    `state_shardings` raises it for a spec that does not divide a weight.

    >>> layout = rules((r"kernel$", P(None, "tensor")))
    >>> layout({"dense/kernel": (4, 2), "dense/bias": (2,)}, mesh(jax.devices()[:1], tensor=1))
    {'dense/kernel': P(None, 'tensor'), 'dense/bias': P()}
    """

    def layout(weights: Weights, mesh: Mesh) -> dict[str, P]:
        first = {name: next((i for i, (rule, _) in enumerate(pairs) if re.search(rule, name)), None) for name in weights}
        unused = [pairs[i][0] for i in range(len(pairs)) if i not in first.values()]
        if unused:
            near = difflib.get_close_matches(unused[0], weights, n=3, cutoff=0) or ["none"]
            raise InvalidArgument(
                f"layout: the rule {unused[0]!r} decides for no weight; expected it to match one of {', '.join(near)} ..., and "
                "no earlier rule to match that."
            )
        return {name: P() if i is None else pairs[i][1] for name, i in first.items()}

    return layout


def keras_layout(layouts: keras.distribution.LayoutMap) -> Layout:
    """Returns a `keras.distribution.LayoutMap` as a layout: its keys are matched with names as Keras matches them with paths.

    >>> devices = keras.distribution.DeviceMesh((1,), ["tensor"], ["cpu:0"])
    >>> layouts = keras.distribution.LayoutMap(devices)
    >>> layouts["dense/kernel"] = (None, "tensor")
    >>> keras_layout(layouts)({"dense/kernel": (4, 2)}, mesh(jax.devices()[:1], tensor=1))
    {'dense/kernel': P(None, 'tensor')}
    """

    def layout(weights: Weights, mesh: Mesh) -> dict[str, P]:
        entries = {name: layouts[name] for name in weights}
        return {name: P() if entry is None else P(*entry.axes) for name, entry in entries.items()}

    return layout


def default_layout(mesh: Mesh) -> Layout:
    """Returns the built-in layout that uses all axes of a mesh.

    >>> default_layout(mesh(jax.devices()[:1], data=1)).__name__
    'data'
    """
    return tensor if "tensor" in mesh.shape else fsdp if "fsdp" in mesh.shape else data


def checked_specs(layout: Layout, weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns the spec of each weight under a layout.

    Raises `InvalidArgument` for a weight without a spec, and for a spec that has more entries than the weight has axes, names an
    axis which the mesh lacks, or does not divide the weight.

    >>> checked_specs(fsdp, {"dense/kernel": (40, 100)}, mesh(jax.devices()[:1], fsdp=1))
    {'dense/kernel': P(None, 'fsdp')}
    """
    specs = layout(weights, mesh)
    for name, shape in weights.items():
        if name not in specs:
            raise InvalidArgument(f"layout: no spec for {name}; expected one for each weight, P() for a replicated one.")
        _check_spec(name, shape, specs[name], mesh)
    return {name: specs[name] for name in weights}


def _check_spec(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise InvalidArgument(
            f"layout: {spec} for {name} of the shape {shape}; expected no more entries than the weight has axes."
        )
    for axis, part in enumerate(spec):
        mesh_axes = part if isinstance(part, tuple) else () if part is None else (part,)
        missing = [mesh_axis for mesh_axis in mesh_axes if mesh_axis not in mesh.shape]
        if missing:
            raise InvalidArgument(
                f"layout: {name} is split over {missing[0]!r}, which the mesh lacks; expected some of its axes "
                f"{', '.join(mesh.shape)}."
            )
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if shape[axis] % parts:
            raise InvalidArgument(
                f"layout: {name} of the shape {shape} can't be split into {parts} parts along axis {axis}; expected a multiple "
                f"of {parts}: choose another axis, or a size of {'x'.join(mesh_axes)} that divides {shape[axis]}."
            )


def _split_over_fsdp(specs: dict[str, P], weights: Weights, mesh: Mesh) -> dict[str, P]:
    """Returns the specs with the longest axis that is unsplit and divisible split over `fsdp`."""
    if "fsdp" not in mesh.shape:
        return specs
    result = {}
    for name, shape in weights.items():
        parts = [*specs[name], *[None] * (len(shape) - len(specs[name]))]
        free = [i for i, size in enumerate(shape) if parts[i] is None and size % mesh.shape["fsdp"] == 0]
        if math.prod(shape) >= MIN_SPLIT_SIZE and free:
            parts[max(free, key=lambda i: shape[i])] = "fsdp"
        result[name] = P(*parts) if any(parts) else P()
    return result


def _tensor_axis(name: str, weights: Weights) -> int | None:
    """Returns the axis of a weight that tensor parallelism splits, None for no axis."""
    shape, (*_, layer, part) = weights[name], ["", *name.split("/")]
    if part == "embeddings":
        return 0
    if layer in ("query", "key", "value"):
        if part == "bias":
            return 0
        output = weights.get(f"{name.rpartition(f'{layer}/')[0]}attention_output/kernel")
        return 1 if len(shape) == 3 and (output is None or shape[1] == output[0]) else 0
    if layer == "attention_output":
        return 0 if part == "kernel" else None
    kernel = weights.get(f"{name.rpartition('/')[0]}/kernel", ())
    widens = len(kernel) == 2 and kernel[1] >= kernel[0]
    if part == "kernel" and len(shape) == 2:
        return 1 if widens else 0
    return 0 if part == "bias" and widens else None

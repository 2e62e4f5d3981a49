"""Where each leaf of a state lies on a mesh: weights by a layout, optimizer slots and copies of weights as their weights do."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the examples in docstrings)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.core.names import unique_names
from research.core.state import InvalidArgument, State
from research.distributed.layouts import Layout, checked_specs
from research.distributed.slots import match_copies, match_slots


def state_shardings(names: PyTree, shapes: PyTree, mesh: Mesh, layout: Layout) -> PyTree:
    """Returns the sharding of each leaf of a state.

    `names` (strings) and `shapes` (anything with `shape` and `dtype`) have the structure of the state. The weights are the
    `trainable` and `non_trainable` leaves of each `State` in it; the layout decides about them, by name and shape. A
    weight's full name starts with the path of its `State` inside the state: "generator/dense/kernel". An optimizer slot lies
    as its weight, a copy of the weights elsewhere in the state (an average, a target network) as the original. They are
    recognised by structure, shapes and order, see `research.distributed.slots`; names break ties only. Everything else is
    replicated. In a state without any `State` every floating-point leaf with axes is a weight under its own name.

    Raises `InvalidArgument` where names and shapes differ in number, and for a layout that does not fit, see `checked_specs`.

    >>> import research
    >>> from research.distributed import fsdp, mesh
    >>> model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(100)])
    >>> learner = research.supervised(model, loss="mse", optimizer="adam")
    >>> one_device = mesh(jax.devices()[:1], fsdp=1)
    >>> shardings = state_shardings(learner.names, jax.eval_shape(learner.init), one_device, fsdp)
    >>> [sharding.spec for sharding in shardings.trainable], shardings.optimizer[2].spec
    ([P(None, 'fsdp'), P()], P(None, 'fsdp'))
    """
    leaf_names, leaves = jax.tree.leaves(names), jax.tree.leaves(shapes)
    if len(leaf_names) != len(leaves):
        raise InvalidArgument(
            f"state_shardings: {len(leaf_names)} names for {len(leaves)} leaves; expected names with the state's structure."
        )
    leaf_shapes = [tuple(leaf.shape) for leaf in leaves]
    positions = jax.tree.unflatten(jax.tree.structure(shapes), range(len(leaves)))
    states = list(_states(positions))
    if states:
        weights = _named_weights(states, leaf_names)
    else:
        floating = [i for i, leaf in enumerate(leaves) if leaf_shapes[i] and jnp.issubdtype(leaf.dtype, jnp.inexact)]
        weights = dict(zip(unique_names(leaf_names[i] for i in floating), floating, strict=True))
    by_name = checked_specs(layout, {name: leaf_shapes[i] for name, i in weights.items()}, mesh)
    specs = [P()] * len(leaves)
    for name, i in weights.items():
        specs[i] = by_name[name]

    originals = [part for _, state in states for part in (state.trainable, state.non_trainable)]
    matches = match_copies(positions, originals, leaf_shapes, leaf_names, skip=lambda node: isinstance(node, State))
    for _, state in states:
        matches |= match_slots(state.optimizer, state.trainable, leaf_shapes, specs, leaf_names)
    for leaf, weight in matches.items():
        specs[leaf] = specs[weight]
    return jax.tree.unflatten(jax.tree.structure(names), [NamedSharding(mesh, spec) for spec in specs])


def replicated_leaves(
    names: PyTree, state: PyTree, shardings: PyTree | None = None, minimum_bytes: int = 1 << 20
) -> list[tuple[str, int]]:
    """Returns name and bytes of large leaves that are replicated on a mesh that splits weights, the largest first.

    Such a mesh has an `fsdp` or `tensor` axis of more than one device; on any other the list is empty. `state` holds arrays or
    `jax.ShapeDtypeStruct`s; `shardings`, of the same structure, is by default that of the leaves themselves.

    >>> from research.distributed import mesh
    >>> sharding = NamedSharding(mesh(jax.devices()[:1], fsdp=1), P())
    >>> replicated_leaves({"kernel": "kernel"}, {"kernel": jax.ShapeDtypeStruct((1 << 20,), "float32", sharding=sharding)})
    []
    """
    leaves = jax.tree.leaves(state)
    placed = [leaf.sharding for leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    large = []
    for name, leaf, sharding in zip(jax.tree.leaves(names), leaves, placed, strict=True):
        split_axes = [axis for axis in ("fsdp", "tensor") if _axis_size(sharding, axis) > 1]
        size = leaf.size * leaf.dtype.itemsize
        if split_axes and sharding.is_fully_replicated and size >= minimum_bytes:
            large.append((name, size))
    return sorted(large, key=lambda entry: -entry[1])


def _axis_size(sharding: Any, axis: str) -> int:
    return int(sharding.mesh.shape.get(axis, 1)) if isinstance(sharding, NamedSharding) else 1


def _states(positions: PyTree) -> Iterator[tuple[list[str], State]]:
    """Yields each `State` in a tree, behind the path to it."""
    nodes = jax.tree_util.tree_leaves_with_path(positions, is_leaf=lambda node: isinstance(node, State))
    for path, node in nodes:
        if isinstance(node, State):
            yield [jax.tree_util.keystr((key,), simple=True) for key in path], node


def _named_weights(states: Sequence[tuple[list[str], State]], names: Sequence[str]) -> dict[str, int]:
    """Returns the position of each weight by its full name, which is made unique where it is not."""
    full: list[str] = []
    positions: list[int] = []
    for path, state in states:
        trainable = {names[i] for i in jax.tree.leaves(state.trainable)}
        for part, weights in (("trainable", state.trainable), ("non_trainable", state.non_trainable)):
            for i in jax.tree.leaves(weights):
                # A frozen layer and a trainable one may have the same name: Keras' numbers are counted within each part.
                repeated = part == "non_trainable" and names[i] in trainable
                full.append("/".join([*path, *([part] if repeated else []), names[i]]))
                positions.append(i)
    return dict(zip(unique_names(full), positions, strict=True))

"""Which weight an optimizer slot or a copy of weights belongs to, read off structure, shapes and order; names break ties only.

Trees here have integers as leaves: positions among the leaves of the state. `shapes` and `names` are indexed by them.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

Shape = tuple[int, ...]

# Costs of an alignment. Each unit outweighs all the lower ones that can occur together.
PASS = 1  # another pass over the weights
DISAGREEMENT = 1 << 20  # a slot whose name is not that of its weight
GAP = 1 << 40  # weights without a slot between two that have one
UNMATCHED = 2 * GAP  # a slot without a weight
UNREACHABLE = 1 << 60


def match_slots(
    optimizer: PyTree, trainable: PyTree, shapes: Sequence[Shape], specs: Sequence[Hashable], names: Sequence[str]
) -> dict[int, int]:
    """Returns the weight of each optimizer slot that has one: position of the slot -> position of the weight.

    A subtree with the structure of the weights, parts of which may be missing (`optax.MaskedNode`), is matched leaf by leaf; a
    leaf of another shape than its weight's (`optax.adafactor`) has none. Any other slot of a weight's shape is matched by shape
    where all weights of that shape have the same spec, otherwise by its order among the slots: see `align`. `specs` is indexed
    like `shapes`, and read for weights only.

    >>> weights, adam = {"a": 0, "b": 1}, {"count": 2, "mu": {"a": 3, "b": 4}}
    >>> match_slots(adam, weights, [(2, 2), (2, 2), (), (2, 2), (2, 2)], ["row", "column"], [""] * 5)
    {3: 0, 4: 1}
    """
    parallel = _parallel_leaves(optimizer, trainable, shapes)
    matches = {slot: weight for slot, weight in parallel.items() if shapes[slot] == shapes[weight]}
    weights = [weight for weight in jax.tree.leaves(trainable) if shapes[weight]]
    same_shape: dict[Shape, list[int]] = defaultdict(list)
    for weight in weights:
        same_shape[shapes[weight]].append(weight)
    rest = [slot for slot in jax.tree.leaves(optimizer) if slot not in parallel and shapes[slot] in same_shape]
    ambiguous = {shape for shape, group in same_shape.items() if len({specs[weight] for weight in group}) > 1}
    if any(shapes[slot] in ambiguous for slot in rest):
        aligned = align(
            [shapes[slot] for slot in rest],
            [shapes[weight] for weight in weights],
            lambda slot, weight: names_agree(names[rest[slot]], names[weights[weight]]),
        )
    else:
        aligned = [None] * len(rest)
    for slot, index in zip(rest, aligned, strict=True):
        if index is not None:
            matches[slot] = weights[index]
        elif shapes[slot] not in ambiguous:
            matches[slot] = same_shape[shapes[slot]][0]
    return matches


def match_copies(
    tree: PyTree, originals: Sequence[PyTree], shapes: Sequence[Shape], names: Sequence[str], skip: Callable[[Any], bool]
) -> dict[int, int]:
    """Returns the weight that each leaf of a copy of weights stands for: position of the leaf -> position of the weight.

    A copy is a subtree with the structure and shapes of one of `originals`: an average, a target network. Among several
    such originals the one with the most names in common is chosen, then the first. `skip` is true for nodes not to enter.

    >>> match_copies({"key": 0, "average": [1, 2]}, [[3, 4]], [(), (2,), (3,), (2,), (3,)], ["name"] * 5, lambda node: False)
    {1: 3, 2: 4}
    """
    if skip(tree) or isinstance(tree, int):
        return {}
    leaves = jax.tree.leaves(tree)
    candidates = []
    for original in originals:
        weights = jax.tree.leaves(original)
        if _same_structure(tree, original) and [shapes[i] for i in leaves] == [shapes[i] for i in weights]:
            candidates.append(weights)
    if any(shapes[i] for i in leaves) and candidates:
        closest = max(candidates, key=lambda weights: sum(map(names_agree, _at(names, leaves), _at(names, weights))))
        return dict(zip(leaves, closest, strict=True))
    return {i: j for child in _children(tree) for i, j in match_copies(child, originals, shapes, names, skip).items()}


def align(slots: Sequence[Shape], weights: Sequence[Shape], agree: Callable[[int, int], bool]) -> list[int | None]:
    """Returns the index of each slot's weight, None for a slot without one, from the order in which optimizers create slots.

    They pass over the weights once, several slots for each (Adam: momentum and velocity of the first weight, then of the
    second), or once for each sort of slot (RMSprop: all velocities, then all momentums), or both, and may leave weights out. So
    from slot to slot the weight stays, advances by one, or starts again. The alignment with the fewest exceptions wins; among
    equals that with the most names in agreement, `agree(slot, weight)`; then that with the fewest passes.

    >>> kernel, bias = (2, 2), (2,)
    >>> align([kernel, kernel, bias, bias] * 2, [kernel, bias] * 2, lambda slot, weight: False)  # like Adam
    [0, 0, 1, 1, 2, 2, 3, 3]
    >>> align([kernel, bias, kernel, bias] * 2, [kernel, bias] * 2, lambda slot, weight: False)  # like RMSprop
    [0, 1, 2, 3, 0, 1, 2, 3]
    """
    count = len(weights)
    same_shape: dict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(weights):
        same_shape[shape].append(index)
    moves = {shape: _costs_of_moves(count, np.array(group)) for shape, group in same_shape.items()}
    cost = np.full(count + 1, UNREACHABLE)  # the least cost so far, by the weight of the last matched slot
    cost[count] = 0  # no slot is matched yet
    history: list[tuple[Any, Any]] = []
    for slot, shape in enumerate(slots):
        before, matched = np.arange(count + 1), np.zeros(count + 1, bool)
        after = cost + UNMATCHED
        if shape in moves:
            group = np.array(same_shape[shape])
            total = cost[:, None] + moves[shape]
            best = total.argmin(0)
            value = total.min(0) + np.array([0 if agree(slot, weight) else DISAGREEMENT for weight in group])
            better = value < after[group]
            after[group[better]], before[group[better]], matched[group[better]] = value[better], best[better], True
        cost = after
        history.append((before, matched))
    cost[: max(count - 1, 0)] += GAP  # the last pass ends early
    last = int(cost.argmin())
    result: list[int | None] = []
    for before, matched in reversed(history):
        result.append(last if matched[last] else None)
        last = int(before[last])
    return result[::-1]


def names_agree(name: str, weight: str) -> bool:
    """Returns whether a name is that of a weight, or ends with it after a slash.

    >>> names_agree("momentum/dense/kernel", "dense/kernel"), names_agree("momentum/dense/kernel", "kernel_1")
    (True, False)
    """
    return name == weight or name.endswith(f"/{weight}")


def _costs_of_moves(count: int, group: Any) -> Any:
    """Returns the cost of moving from each of `count` weights, or from the start (the last row), to each weight of a group."""
    origin, target = np.arange(count + 1)[:, None], group[None, :]
    first_gap = np.where(target > 0, GAP, 0)
    onward = np.where(target - origin > 1, GAP, 0)
    again = PASS + first_gap + np.where(origin < count - 1, GAP, 0)
    return np.where(origin == count, PASS + first_gap, np.where(target >= origin, onward, again))


def _parallel_leaves(tree: PyTree, weights: PyTree, shapes: Sequence[Shape]) -> dict[int, int]:
    """Returns the weight in the place of each leaf, in all subtrees that have the structure of the weights."""
    if isinstance(tree, int):
        return {}
    pairs = _paired_leaves(tree, weights)
    # The list of a Keras optimizer may be as long as that of the weights: it starts with scalars.
    if pairs and all(shapes[slot] or not shapes[weight] for slot, weight in pairs):
        return dict(pairs)
    return {slot: weight for child in _children(tree) for slot, weight in _parallel_leaves(child, weights, shapes).items()}


def _paired_leaves(tree: PyTree, weights: PyTree) -> list[tuple[int, int]]:
    """Returns the leaves of a tree beside the weights in the same places; none where the structures differ.

    Where the tree has a node without leaves, as `optax.masked` leaves behind, the weights may have anything.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    try:
        parts = structure.flatten_up_to(weights)
    except (ValueError, TypeError, KeyError):
        return []
    pairs = [(leaf, part) for leaf, part in zip(leaves, parts, strict=True) if isinstance(leaf, int)]
    return pairs if all(isinstance(part, int) for _, part in pairs) else []


def _same_structure(tree: PyTree, other: PyTree) -> bool:
    structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(other)]
    return bool(structures[0] == structures[1])


def _children(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)


def _at(values: Sequence[str], positions: Sequence[int]) -> list[str]:
    return [values[position] for position in positions]

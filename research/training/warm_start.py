"""Starts a state from weights that exist already: of another run, or of a file. Each device reads only its own shards."""

import difflib
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in a docstring)
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.state import InvalidArgument, check_type, states_in
from research.training import checkpoint
from research.training.keras_files import FileError, StoredArray
from research.training.manifest import ANY, Origin
from research.training.weight_files import StoredWeights, open_weights
from research.transforms.ema import AveragedState

START = "start"  # in a run's directory: a checkpoint of the initial state, if that was not the experiment's own

Transform = tuple[int, ...] | Callable[[np.ndarray], np.ndarray]
NameInFile = str | tuple[str, Transform] | None
NameMapping = Mapping[str, NameInFile] | Callable[[str], NameInFile]


class RestoreReport(NamedTuple):
    """What `restore` took from a source: names of the state's leaves, except `left`, names in the file.

    `cast` holds those of `taken` whose dtype was changed, with both dtypes; `missing` the weights that the source does not have;
    `left` its arrays that the state does not have.

    >>> RestoreReport("a.safetensors", ["kernel"], {}, [], []).taken
    ['kernel']
    """

    source: str
    taken: list[str]
    cast: dict[str, str]
    missing: list[str]
    left: list[str]


class _Leaf(NamedTuple):
    """A leaf of the state, and where its values come from."""

    position: int
    name: str
    like: Any
    weight: bool
    key: str | None
    transform: Transform | None


def restore(
    learner: Learner,
    source: str | Path,
    state: PyTree = None,
    *,
    partial: bool = False,
    only: str | None = None,
    mapping: NameMapping | None = None,
    everything: bool = False,
    report: Callable[[str], None] = warnings.warn,
) -> tuple[Any, RestoreReport]:
    """Returns a learner's state with the weights of a run or a file, and a report of what was taken.

    `source` is a run's directory or a checkpoint, a `.keras` or `.weights.h5` file, or safetensors: one file, or a folder with
    `model.safetensors.index.json`. Taken are the weights, which are the `trainable` and `non_trainable` leaves of every `State`
    and their averages (`ema`); everything else stays as it is in `state`, so optimizers start anew. `everything=True` takes all
    leaves, from a checkpoint. A learner whose state holds no `State` has weights only.

    Every weight must be in the source, unless `partial`: the rest then keeps the values of `state`. `only`, a regular expression
    that is searched in the leaves' names, selects some of them. An average that is not in the source starts from its weight.

    Names are those of `learner.names`. `mapping`, a dict or a function, gives the name in the file for a name of the state, or
    (name, transform): a tuple of axes, as of `np.transpose`, or a function of the complete array. None: not in the file. Where it
    gives no name of the file, the leaf's own is looked up; layers of a Keras file are then found by their names.

    `state` may hold arrays or `jax.ShapeDtypeStruct`s, by default `learner.init()`. Values are read into its shapes, dtypes and
    shardings, each device's shard by itself. With several processes all have to call it. `report` is called with a line about
    each damaged checkpoint that is skipped. Raises `InvalidArgument` if a shape differs, or nothing is taken.

    >>> import tempfile, research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> path = Path(tempfile.mkdtemp()) / "model.keras"
    >>> model.save(path)
    >>> state, report = restore(research.supervised(model, loss="mse"), path)
    >>> report.taken, report.missing
    (['sequential/dense/kernel', 'sequential/dense/bias'], [])
    """
    check_type(learner, Learner, "restore: the learner", "a research.Learner: restore(learner, source)")
    check_type(source, (str, Path), "restore: the source", "the path of a run or of a file")
    state = learner.init() if state is None else state
    with open_weights(source, report) as weights:
        leaves = _match(learner, state, weights, mapping)
        selected = _selected([leaf for leaf in leaves if leaf.weight or everything], only)
        found = [leaf for leaf in selected if leaf.key is not None]
        missing = [leaf.name for leaf in selected if leaf.key is None and not _is_seed(leaf.like)]
        if not found:
            raise InvalidArgument(_nothing_taken(weights, [leaf.name for leaf in selected]))
        if missing and not partial:
            raise InvalidArgument(
                f"{weights.source}: {missing[0]!r} is not in it{_and_more(missing)}{_near(missing[0], weights.arrays)}; give a "
                "mapping of names, or partial=True to take the others."
            )
        for leaf in found:
            _check_fits(leaf, weights)
        restored = jax.tree.leaves(state)
        for leaf in found:
            restored[leaf.position] = _read(leaf, weights)
    dtypes = {leaf.name: (weights.arrays[leaf.key].dtype, _dtype(leaf.like)) for leaf in found if leaf.key is not None}
    used = {leaf.key for leaf in leaves}
    taken = RestoreReport(
        weights.source,
        [leaf.name for leaf in found],
        {name: f"{before} to {after}" for name, (before, after) in dtypes.items() if before != after},
        missing,
        [key for key in weights.arrays if key not in used],
    )
    return jax.tree.unflatten(jax.tree.structure(state), restored), taken


def restore_start(
    run_directory: Path, like: PyTree, names: PyTree, report: Callable[[str], None], origin: Origin = ANY
) -> Any | None:
    """Returns the initial state that a run saved because it was started from other weights, None if it saved none.

    `like`, `names`, `report` and `origin` are as for `checkpoint.restore_latest`.

    >>> restore_start(Path("no/such/run"), [1.0], ["rate"], print) is None
    True
    """
    start = checkpoint.restore_latest(run_directory / START, like, names, report, origin)
    return None if start is None else start.state


def _match(learner: Learner, state: PyTree, weights: StoredWeights, mapping: NameMapping | None) -> list[_Leaf]:
    """Returns all leaves of a state, each with its name in the source."""
    if str(jax.tree.structure(state)) != str(jax.tree.structure(learner.names)):
        raise InvalidArgument("restore: the state is not of this learner; expected one like learner.init().")
    names, values = jax.tree.leaves(learner.names), jax.tree.leaves(state)
    positions = jax.tree.unflatten(jax.tree.structure(state), range(len(values)))
    of_states = [i for node in states_in(positions) for i in jax.tree.leaves((node.trainable, node.non_trainable))]
    weight_positions = of_states or list(range(len(values)))
    are_weights = set(weight_positions)
    keys: list[str | None] = [name if name in weights.arrays else None for name in names]
    shapes = [tuple(np.shape(value)) for value in values]
    matched = weights.match([names[i] for i in weight_positions], [shapes[i] for i in weight_positions])
    for i, key in zip(weight_positions, matched, strict=True):
        keys[i] = key
    leaves = []
    for i, (name, like, key) in enumerate(zip(names, values, keys, strict=True)):
        target: NameInFile = key
        if callable(mapping):
            target = mapping(name)
        elif mapping is not None and name in mapping:
            target = mapping[name]
        _check_target(name, target)
        there, transform = target if isinstance(target, tuple) else (target, None)
        found = (there, transform) if there is None or there in weights.arrays else (key, None)
        leaves.append(_Leaf(i, name, like, i in are_weights, *found))
    for average, weight in _averages(positions):
        key, transform = leaves[average].key, leaves[average].transform
        if key is None:
            key, transform = leaves[weight].key, leaves[weight].transform
        leaves[average] = leaves[average]._replace(weight=True, key=key, transform=transform)
    return leaves


def _check_target(name: str, target: Any) -> None:
    """Raises `InvalidArgument` unless a mapping gave a name, None, or a name with a transform."""
    pair = isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], str)
    if target is None or isinstance(target, str) or (pair and (callable(target[1]) or isinstance(target[1], tuple))):
        return
    raise InvalidArgument(
        f"mapping: {name!r} is mapped to {target!r}, expected a name, None, or a name with a tuple of axes or a function."
    )


def _averages(positions: PyTree) -> list[tuple[int, int]]:
    """Returns the positions of each average of a weight in a state, and of the weight."""
    nodes = jax.tree.leaves(positions, is_leaf=lambda node: isinstance(node, AveragedState))
    pairs: list[tuple[int, int]] = []
    for node in nodes:
        if isinstance(node, AveragedState):
            originals = jax.tree.leaves([inner.trainable for inner in states_in(node.state)])
            pairs += [*_averages(node.state), *zip(jax.tree.leaves(node.average), originals, strict=True)]
    return pairs


def _selected(leaves: Sequence[_Leaf], only: str | None) -> list[_Leaf]:
    """Returns the leaves whose names a regular expression matches. Raises `InvalidArgument` if there are none."""
    if only is None:
        return list(leaves)
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise InvalidArgument(f"only {only!r} is no regular expression ({error}).") from error
    chosen = [leaf for leaf in leaves if pattern.search(leaf.name)]
    if not chosen:
        names = [leaf.name for leaf in leaves]
        near = difflib.get_close_matches(only, names, n=3, cutoff=0.3) or names[:3]
        raise InvalidArgument(f"only {only!r} matches none of the {len(names)} names; near it: {', '.join(map(repr, near))}.")
    return chosen


def _is_seed(leaf: Any) -> bool:
    """Returns whether a leaf is the state of a Keras seed generator, which only checkpoints hold."""
    return np.shape(leaf) == (2,) and getattr(leaf, "dtype", None) == np.uint32


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype.name


def _and_more(names: Sequence[str]) -> str:
    return f", nor are {len(names) - 1} more" if len(names) > 1 else ""


def _near(name: str, arrays: Mapping[str, StoredArray]) -> str:
    near = difflib.get_close_matches(name, list(arrays)[:10_000], n=1)
    return f" (near it: {near[0]!r})" if near else ""


def _nothing_taken(weights: StoredWeights, names: Sequence[str]) -> str:
    stored = ", ".join(map(repr, list(weights.arrays)[:3])) or "nothing"
    return (
        f"{weights.source}: none of the state's {len(names)} weights is in it: it holds {stored} ..., the state "
        f"{', '.join(map(repr, names[:3]))} ...; give a mapping of names."
    )


def _check_fits(leaf: _Leaf, weights: StoredWeights) -> None:
    """Raises `InvalidArgument` if a stored array has another shape or kind of numbers than its leaf."""
    assert leaf.key is not None
    stored = weights.arrays[leaf.key]
    shape, expected = stored.shape, tuple(np.shape(leaf.like))
    if isinstance(leaf.transform, tuple):
        if sorted(leaf.transform) != list(range(len(shape))):
            raise InvalidArgument(
                f"mapping of {leaf.name!r}: the axes {leaf.transform} are no order of those of {leaf.key!r}, {list(shape)}."
            )
        shape = tuple(shape[axis] for axis in leaf.transform)
    if shape != expected and not callable(leaf.transform):
        raise _misfit(leaf, weights, shape)
    if _is_key(leaf.like) or stored.dtype.startswith("key<"):
        fits = stored.dtype == _dtype(leaf.like)
    else:
        kinds = ("floating", "integer", "bool_", "complexfloating")
        fits = any(all(jnp.issubdtype(d, getattr(jnp, k)) for d in (stored.dtype, _dtype(leaf.like))) for k in kinds)
    if not fits:
        raise _misfit(leaf, weights, shape)


def _misfit(leaf: _Leaf, weights: StoredWeights, shape: tuple[int, ...]) -> InvalidArgument:
    assert leaf.key is not None
    stored = f"{weights.arrays[leaf.key].dtype}{list(shape)}"
    expected = f"{_dtype(leaf.like)}{list(np.shape(leaf.like))}"
    there = "" if leaf.key == leaf.name else f" ({leaf.key!r} there)"
    return InvalidArgument(
        f"{weights.source}: {leaf.name!r}{there} is {stored} in it, expected {expected}; "
        "leave it out with only, or give a mapping with a transform."
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _read(leaf: _Leaf, weights: StoredWeights) -> Any:
    """Returns a leaf's values, as an array like it: on its devices, or in NumPy."""
    assert leaf.key is not None
    stored, like, shape = weights.arrays[leaf.key], leaf.like, tuple(np.shape(leaf.like))
    complete = (slice(None),) * len(stored.shape)
    transform = leaf.transform

    @functools.cache
    def transformed() -> np.ndarray:
        assert callable(transform)
        array = np.asarray(transform(stored.read(complete)))
        if array.shape != shape:
            raise _misfit(leaf, weights, array.shape)
        return array

    def part(index: Any) -> np.ndarray:
        if callable(transform):
            array = transformed()[index]
        elif transform is not None:
            array = stored.read(tuple(index[transform.index(axis)] for axis in range(len(index)))).transpose(transform)
        else:
            array = stored.read(index)
        return array if _is_key(like) else np.asarray(array).astype(_dtype(like), copy=False)

    try:
        if _is_key(like):
            return jax.random.wrap_key_data(jnp.asarray(stored.read(())), impl=jax.random.key_impl(like))
        if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
            array = part((slice(None),) * len(shape))
            return np.array(array) if isinstance(like, np.ndarray) else array[()] if hasattr(like, "dtype") else array.item()
        if like.sharding is None or (isinstance(like, jax.Array) and not like.committed):
            return jnp.array(part((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, like.sharding, part)
    except FileError as error:
        raise InvalidArgument(f"{error.path or weights.source}: {error}; write it again.") from error

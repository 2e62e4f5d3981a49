"""Labels of sparse losses are checked on the host: a compiled step can't raise, and Keras' loss of an unknown class is 0."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import keras
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.objective import mask_of
from research.core.state import Batch, InvalidArgument, as_shapes, scope_mapping
from research.data.batches import Batches


class SparseTarget(NamedTuple):
    """Labels of a batch: leaf `position` of `y`, of this shape without the batch axis, from 0 to `classes - 1` or `ignored`.

    >>> SparseTarget(position=0, shape=(), classes=10, ignored=-1).classes
    10
    """

    position: int
    shape: tuple[int, ...]
    classes: int
    ignored: int | None


def checked_labels(learner: Learner, data: Batches, where: str, to_device: Callable[[Callable[[], PyTree]], PyTree]) -> Batches:
    """Returns the batches with checked labels: at once, and once, for data on the device, otherwise when a batch is read.

    Checked are the targets of Keras' sparse crossentropies: they must be integers, of any dtype, from 0 to one less than the
    model has classes. Exempt are labels equal to the loss' `ignore_class`, those with a sample weight of 0, and padding. Targets
    of outputs with a Keras mask are not checked, because the mask is known on the device only. `where` stands for the data in
    messages; `to_device` returns the arrays of `data.resident.source`. Raises `InvalidArgument`.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> import research
    >>> learner = research.supervised(model, loss="sparse_categorical_crossentropy")
    >>> data = research.from_arrays(np.zeros((2, 2)), np.array([0, 3]), batch_size=1)
    >>> checked_labels(learner, data, "train", lambda source: source())
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: y has label 3 in row 1, expected 0 to 2, the classes of the model: ...
    """
    if not isinstance(data.shapes, Batch) or not jax.tree.leaves(data.shapes.y):
        return data
    targets = [target for model, loss in learner.targets for target in _sparse_targets(model, loss, as_shapes(data.shapes))]
    if not targets:
        return data
    if data.resident is not None:
        source = data.resident.source
        passed = _passed.setdefault(source, [])
        if targets not in passed:
            # A source that lies on a mesh is there, or has to go there anyway; any other is read on the host.
            _check(source() if data.resident.sharding is None else to_device(source), targets, where)
            passed.append(targets)
        return data

    def batch(step: int) -> Batch:
        result = data.batch(step)
        _check(result, targets, f"{where}, step {step}")
        return result

    return data._replace(batch=batch)


def _sparse_targets(model: keras.Model, loss: Any, shapes: Batch) -> list[SparseTarget]:
    """Returns the targets of sparse losses, cached with the model."""
    if not any(map(_is_sparse, keras.tree.flatten(loss))):
        return []
    # Not the loss itself, which may hold the model.
    described = keras.tree.map_structure(lambda each: f"{_is_sparse(each)} {getattr(each, 'ignore_class', None)}", loss)
    cached = _cache.setdefault(model, [])
    found = next((targets for key, targets in cached if key == (described, shapes)), None)
    if found is None:
        found = _find_targets(model, loss, shapes)
        cached.append(((described, shapes), found))
    return found


def _find_targets(model: keras.Model, loss: Any, shapes: Batch) -> list[SparseTarget]:
    """Matches losses, outputs and targets by tracing the loss of leaves whose last axes give their positions."""
    try:
        outputs, masked = _outputs(model, shapes.x)
    except Exception:  # the batch does not fit the model, or its code fails: tracing the step says so
        return []
    y, leaves = jax.tree.leaves(shapes.y), jax.tree.leaves(outputs)
    matches: list[tuple[int, int, int | None, bool]] = []

    def recorder(each: Any) -> Any:
        sparse, ignored, by_shapes = _is_sparse(each), getattr(each, "ignore_class", None), _depends_on_shapes(each)

        def record(y_true: Any, y_pred: Any) -> Any:
            if sparse:
                matches.append((y_true.shape[-1] - 2, y_pred.shape[-1] - 2, ignored, by_shapes))
            return keras.ops.zeros(2)

        return None if each is None else record

    def numbered(tree: PyTree) -> PyTree:
        leaves = [jax.ShapeDtypeStruct((2, 2 + i), np.float32) for i in range(len(jax.tree.leaves(tree)))]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    compiled = keras.Model()
    compiled.output_names = getattr(model, "output_names", None)
    compiled.compile(optimizer=None, loss=keras.tree.map_structure(recorder, loss))
    try:
        with keras.StatelessScope():
            jax.eval_shape(lambda *args: compiled.compute_loss(None, *args), numbered(shapes.y), numbered(outputs))
    except Exception:  # they do not match: tracing the step says why
        return []
    return [
        SparseTarget(target, y[target].shape[1:], leaves[output].shape[-1], ignored)
        for target, output, ignored, by_shapes in matches
        if not masked[output]
        and not (by_shapes and leaves[output].shape[-1] == 1)  # a binary crossentropy
        and y[target].shape in (leaves[output].shape[:-1], (*leaves[output].shape[:-1], 1))
    ]


def _is_sparse(loss: Any) -> bool:
    """Returns whether a loss takes class numbers. "crossentropy" does if the targets' shapes say so, which is checked later."""
    if _depends_on_shapes(loss):
        return True
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:
            return False
    return loss is keras.losses.sparse_categorical_crossentropy or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)


def _depends_on_shapes(loss: Any) -> bool:
    return isinstance(loss, str) and loss.lower() in ("crossentropy", "ce")


def _outputs(model: keras.Model, x: PyTree) -> tuple[PyTree, list[bool]]:
    """Returns the shapes of a model's outputs, and whether each of them has a Keras mask."""
    masked: list[bool] = []

    def call(arrays: list[Any], x: PyTree) -> PyTree:
        with keras.StatelessScope(scope_mapping([(model.variables, arrays)])):
            outputs = model(x, training=False)
            masked.extend(mask_of(output) is not None for output in jax.tree.leaves(outputs))
            return outputs

    return jax.eval_shape(call, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables], x), masked


def _check(batch: Batch, targets: list[SparseTarget], where: str) -> None:
    for target in targets:
        _check_target(batch, target, where)


def _check_target(batch: Batch, target: SparseTarget, where: str) -> None:
    named = jax.tree_util.tree_leaves_with_path(batch.y)
    path, labels = named[target.position]
    labels = _to_host(labels)
    low = -1 if target.ignored == -1 else 0
    if not labels.size or (labels.dtype.kind in "biu" and labels.min() >= low and labels.max() < target.classes):
        return
    values = labels.reshape(len(labels), -1)
    wrong = ~((values >= 0) & (values < target.classes) & (values == np.floor(values)))
    if target.ignored is not None:
        wrong &= values != target.ignored
    if batch.valid is not None:
        wrong &= _to_host(batch.valid).reshape(-1, 1)
    weights = jax.tree.leaves(batch.sample_weight)
    if wrong.any() and weights:
        weight = _to_host(weights[target.position] if len(weights) == len(named) else weights[0])
        wrong &= np.broadcast_to(weight.reshape(len(weight), -1) != 0, wrong.shape)
    if not wrong.any():
        return
    row, position = (int(i) for i in np.argwhere(wrong)[0])
    within = f" at {tuple(map(int, np.unravel_index(position, labels.shape[1:])))}" if values.shape[1] > 1 else ""
    ignored = "" if target.ignored is None else f" or {target.ignored}"
    raise InvalidArgument(
        f"{where}: y{jax.tree_util.keystr(path)} has label {values[row, position]} in row {row}{within}, expected "
        f"0 to {target.classes - 1}{ignored}, the classes of the model: number labels from 0, give the model more classes, or "
        "exempt labels by the loss' ignore_class or a sample weight of 0."
    )


def _to_host(leaf: Any) -> np.ndarray:
    """Returns an array as a NumPy array; of one that spans processes the part that this one holds."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    parts = {str(shard.index): shard.data for shard in leaf.addressable_shards}
    return np.concatenate([np.asarray(part) for part in parts.values()])


_cache: weakref.WeakKeyDictionary[keras.Model, list[tuple[Any, list[SparseTarget]]]] = weakref.WeakKeyDictionary()
_passed: weakref.WeakKeyDictionary[Callable[[], PyTree], list[list[SparseTarget]]] = weakref.WeakKeyDictionary()  # by source

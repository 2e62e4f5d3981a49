"""Keras' own `fit` and a learner side by side, from the same weights on the same batches: how far each tensor is apart."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from research.core.learner import Learner
from research.core.names import slot_names, variable_names
from research.core.objective import mask_of
from research.core.state import Batch, InvalidArgument, SharedScope, State, layer_metrics, scope_mapping
from research.training.bad_steps import is_loss

# Headings of DEVIATIONS.md.
MASKS = "Training metrics use masks"
OUTER_CALL = "The outermost model's `__call__` runs, not only its `call`"
NOT_COMPILED = "Models that Keras does not compile"
PADDING = "Batches with padding"

ROUNDING = 1e-3  # of the largest number in a tensor: a step that Keras runs operation by operation rounds otherwise
Snapshot = dict[tuple[str, str], np.ndarray]  # (group, name) -> value


class Tensor(NamedTuple):
    """The largest difference between Keras' value of a tensor and that of a learner, over all steps.

    `group` is "weights", "statistics", "seeds", "slots", "metrics" or "logs". `ulps` counts the floating-point numbers of the
    tensor's dtype from one value to the other (for integers their difference; infinite if only one is NaN, for different shapes
    or dtypes, or if one of both lacks the tensor); `absolute` is the difference. `deviation` is the heading in DEVIATIONS.md that
    explains it, if one does.

    >>> Tensor("weights", "dense/kernel", 0.0, 0.0, None).is_right
    True
    """

    group: str
    name: str
    ulps: float
    absolute: float
    deviation: str | None

    @property
    def is_right(self) -> bool:
        """Whether the values are equal, or differ where they are meant to."""
        return not self.ulps or self.deviation is not None


def compare(model: keras.Model, learner: Learner, batches: Sequence[Batch]) -> list[Tensor]:
    """Returns the differences between Keras' `fit` of a compiled model and `jax.jit(learner.train)`, step by step.

    The learner is one of that model, which uses the model's own optimizer, see `supervised` and `from_keras`. Both start from
    the present values of the model's variables, which are the same afterwards.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="head")], name="model")
    >>> model.compile("adam", "mse")
    >>> rows = compare(model, research.from_keras(model), [Batch(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))])
    >>> sum(row.ulps for row in rows), [row.name for row in rows if row.group == "weights"]
    (0.0, ['model/head/kernel', 'model/head/bias'])
    """
    if layer_metrics(model):
        raise InvalidArgument(
            "check: Keras' fit fails on a model whose layers update metrics (DEVIATIONS.md, Metrics inside layers); "
            "compare the model without them."
        )
    state = learner.init()
    if not isinstance(state, State):
        raise InvalidArgument("check: the learner's state is not a State, so its parts are not those that Keras' fit changes.")
    # In the order of Keras' metrics: the state's own is another one, since JAX sorts the keys of a dictionary.
    expected = _run_keras(model, batches, [name for group in learner.names.metrics.values() for name in group])
    actual, step = [], jax.jit(learner.train)
    initial = state = learner.reset(state)
    for batch in batches:
        state, logs = step(state, batch)
        actual.append(_our_snapshot(learner, state, logs))
    rows = [_worst(name, expected, actual) for name in {**expected[0], **actual[0]}]
    if all(row.is_right for row in rows):
        return rows
    explain = _deviations(model, initial, batches)
    return [row._replace(deviation=_explanation(row, explain, expected)) if row.ulps else row for row in rows]


def ulps(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest number of steps from a number to the next one of its dtype, between two arrays' elements.

    >>> one = np.ones(2, np.float32)
    >>> ulps(one, np.nextafter(one, 2)), ulps(one, one), ulps(np.array(0.0), np.array(-0.0)), ulps(one, one * np.nan)
    (1.0, 0.0, 0.0, inf)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if not a.size:
        return 0.0
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    bits = 8 * a.dtype.itemsize
    half = np.uint64(1) << np.uint64(bits - 1)

    def order(array: np.ndarray) -> np.ndarray:
        raw = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").astype(np.uint64)
        magnitude = raw & (half - np.uint64(1))
        return np.where(raw & half, half - magnitude, half + magnitude)

    first, second = order(a), order(b)
    distance = np.where(first > second, first - second, second - first).astype(np.float64)
    missing = np.isnan(a), np.isnan(b)
    distance = np.where(missing[0] & missing[1], 0.0, np.where(missing[0] | missing[1], np.inf, distance))
    return float(np.max(distance))


def _run_keras(model: keras.Model, batches: Sequence[Batch], metrics: Sequence[str]) -> list[Snapshot]:
    """Returns what Keras' own `fit` computes in each step. The model's variables have their old values afterwards."""
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
    before = [np.array(variable.value) for variable in variables]
    recorder = _Recorder(metrics)
    model.make_train_function(force=True)  # `research.fit` may have left another
    try:
        # A step on batches with padding is one on the rows without it.
        model.fit(
            (_without_padding(batch) for batch in batches),
            steps_per_epoch=len(batches),
            shuffle=False,
            verbose=0,
            callbacks=[recorder],
        )
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        model.reset_metrics()
    return recorder.snapshots


class _Recorder(keras.callbacks.Callback):
    """Records all variables and the logs after each batch."""

    def __init__(self, metrics: Sequence[str]) -> None:
        super().__init__()
        self.metrics = metrics
        self.snapshots: list[Snapshot] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Adds a snapshot."""
        model = self.model  # which makes Keras write the state of the step into the variables
        names = _names(model, slot_names(model.optimizer, model.trainable_variables))
        variables = [*model.trainable_variables, *model.non_trainable_variables, *model.optimizer.variables]
        snapshot = {name: np.array(v.value) for name, v in zip(names, variables, strict=True)}
        metrics = itertools.zip_longest(self.metrics, model.metrics_variables)
        snapshot |= {("metrics", name or v.path): np.array(v.value) for name, v in metrics if v is not None}
        self.snapshots.append(snapshot | {("logs", name): np.asarray(value, np.float32) for name, value in (logs or {}).items()})


def _names(model: keras.Model, slots: Sequence[str]) -> list[tuple[str, str]]:
    weights, others = variable_names(model.trainable_variables), variable_names(model.non_trainable_variables)
    groups = ["seeds" if v.dtype == "uint32" else "statistics" for v in model.non_trainable_variables]
    return [*(("weights", name) for name in weights), *zip(groups, others, strict=True), *(("slots", name) for name in slots)]


def _our_snapshot(learner: Learner, state: State, logs: Any) -> Snapshot:
    seeds = ["seeds" if leaf.dtype == jnp.uint32 else "statistics" for leaf in state.non_trainable]
    names = [("weights", name) for name in learner.names.trainable]
    names += [*zip(seeds, learner.names.non_trainable, strict=True), *(("slots", name) for name in learner.names.optimizer)]
    snapshot = dict(zip(names, map(np.array, [*state.trainable, *state.non_trainable, *state.optimizer]), strict=True))
    snapshot |= {("metrics", f"{name}/{i}"): np.array(v) for name, group in state.metrics.items() for i, v in enumerate(group)}
    return snapshot | {("logs", name): np.asarray(value, np.float32) for name, value in logs.items()}


def _worst(name: tuple[str, str], expected: list[Snapshot], actual: list[Snapshot]) -> Tensor:
    pairs = [(a[name], b[name]) for a, b in zip(expected, actual, strict=True) if name in a and name in b]
    if len(pairs) < len(expected):
        return Tensor(*name, np.inf, np.inf, None)
    return Tensor(*name, max(ulps(a, b) for a, b in pairs), max(_absolute(a, b) for a, b in pairs), None)


def _absolute(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return np.inf
    with np.errstate(invalid="ignore"):
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | (np.isnan(a.astype(np.float64)) & np.isnan(b.astype(np.float64)))
    return float(np.max(np.where(same, 0.0, np.nan_to_num(difference, nan=np.inf)), initial=0.0))


def _without_padding(batch: Batch) -> Any:
    if batch.valid is not None:
        rows = np.flatnonzero(np.asarray(batch.valid))
        batch = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], batch._replace(valid=None))
    return keras.utils.pack_x_y_sample_weight(batch.x, batch.y, batch.sample_weight)


def _deviations(model: keras.Model, state: State, batches: Sequence[Batch]) -> list[str]:
    """Returns the deviations that can show on these batches."""
    shows = {
        PADDING: any(batch.valid is not None for batch in batches),
        NOT_COMPILED: not model.jit_compile or model.run_eagerly,
        MASKS: any(_has_masked_positions(model, state, batch) for batch in batches),
        OUTER_CALL: _outer_call_differs(model, state, batches[0]),
    }
    return [name for name, does in shows.items() if does]


def _explanation(row: Tensor, deviations: Sequence[str], expected: list[Snapshot]) -> str | None:
    """Returns the deviation that explains a difference."""
    size = max((float(np.max(np.abs(s[row[:2]]), initial=1.0)) for s in expected if row[:2] in s), default=1.0)
    is_metric = row.group == "metrics" and not is_loss(row.name.rpartition("/")[0])
    is_metric |= row.group == "logs" and not is_loss(row.name)
    explains = {
        PADDING: True,
        OUTER_CALL: True,
        NOT_COMPILED: row.absolute <= ROUNDING * size,
        MASKS: is_metric,
    }
    return next((name for name in deviations if explains[name]), None)


def _has_masked_positions(model: keras.Model, state: State, batch: Batch) -> bool:
    @jax.jit
    def masks(state: State, x: Any) -> Any:
        with SharedScope(_mapping(model, state)):
            return [mask for mask in map(mask_of, jax.tree.leaves(model(x, training=False))) if mask is not None]

    return any(not np.asarray(mask).all() for mask in masks(state, batch.x))


def _outer_call_differs(model: keras.Model, state: State, batch: Batch) -> bool:
    """Returns whether `call`, which Keras trains with, gives other outputs or losses than `__call__`."""

    @jax.jit
    def by_keras(state: State, slots: Any, metrics: Any, batch: Batch) -> Any:
        parts = state.trainable, state.non_trainable, metrics, batch.x, batch.y, batch.sample_weight
        _, aux = model.compute_loss_and_updates(*parts, training=True, optimizer_variables=slots)
        return aux[0], jax.tree.leaves(aux[1])

    @jax.jit
    def by_call(state: State, metrics: Any, batch: Batch) -> Any:
        mapping = [*_mapping(model, state), *scope_mapping([(model.metrics_variables, metrics)])]
        with SharedScope(mapping, collect_losses=True):
            outputs = model(batch.x, training=True)
            return model.compute_loss(batch.x, batch.y, outputs, batch.sample_weight), jax.tree.leaves(outputs)

    metrics, slots = ([jnp.array(v.value) for v in group] for group in (model.metrics_variables, model.optimizer.variables))
    pairs = zip(
        jax.tree.leaves(by_keras(state, slots, metrics, batch)), jax.tree.leaves(by_call(state, metrics, batch)), strict=True
    )
    return any(a.dtype != b.dtype or not jnp.allclose(a, b, 1e-4, 1e-6) for a, b in pairs)


def _mapping(model: keras.Model, state: State) -> Any:
    return scope_mapping([(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)])

"""Keras' losses and metrics, in every form that `model.compile` accepts, as pure functions."""

import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, Float, PyTree

from research.core.names import unique_names, without_automatic_numbers
from research.core.state import (
    Batch,
    InvalidArgument,
    SharedScope,
    as_shapes,
    copy_values,
    current_values,
    layer_metrics,
    ordered_values,
    scope_mapping,
    type_name,
)
from research.errors import user_frame

ALIASES = ["accuracy", "acc", "crossentropy", "ce", "mse", "mae", "mape", "msle", "bce", "kld"]

Logs = dict[str, Array]
MetricState = dict[str, list[Array]]  # State.metrics
Variables = Mapping[str, list[keras.Variable]]  # unique metric name -> the metric's variables


class Metrics(NamedTuple):
    """Pure functions on `State.metrics`.

    `init` returns the initial metric state and `reset` an empty one. `track_loss` adds the mean loss of a number of rows to the
    running loss. `result` reads all metrics as logs. `variables` are the Keras variables behind them, by unique metric name.

    >>> metrics = running_metrics({"loss": keras.metrics.Mean()})
    >>> float(metrics.result(metrics.track_loss(metrics.init(), jnp.asarray(2.0), 4))["loss"])
    2.0
    """

    init: Callable[[], MetricState]
    reset: Callable[[MetricState], MetricState]
    track_loss: Callable[[MetricState, Float[Array, ""], Any], MetricState]
    result: Callable[[MetricState], Logs]
    variables: Variables


class CompiledMetrics(NamedTuple):
    """Losses and metrics as `model.compile` takes them, and the variables that a state holds for them.

    `variables` are those of every metric by unique name, in this order: the loss tracker, `metrics`, `weighted_metrics`, one loss
    per output if there are several, metrics of layers. `layer_metrics` are the latter by the names they are logged under,
    `arguments` what was compiled. `model` is an empty compiled `keras.Model` with the variables. `resolve(targets, outputs)`
    returns such a model with the losses and metrics that Keras chooses for the shapes of a batch, and its own variables, in the
    order of `variables`; `resolve(targets, outputs, group)` one with "metrics" or "weighted_metrics" alone, weighted.
    """

    model: keras.Model
    variables: dict[str, list[keras.Variable]]
    layer_metrics: dict[str, keras.Metric]
    arguments: dict[str, Any]
    resolve: Callable[..., tuple[keras.Model, list[keras.Variable]]]


def compile_metrics(model: keras.Model, example: Batch | None = None, **arguments: Any) -> CompiledMetrics:
    """Returns losses and metrics, resolved as far as their variables need it: without `example.y` the targets are unknown.

    What "accuracy" or "crossentropy" stands for depends on the targets' shapes, its variables do not. Raises `InvalidArgument`
    for what Keras cannot resolve or what does not fit the example, and for a metric whose variables depend on unknown targets.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> compiled = compile_metrics(model, loss="mse", metrics=["accuracy"])
    >>> list(compiled.variables), type(compiled.resolve(jnp.zeros(2, int), jnp.zeros((2, 3)))[0].metrics[1].metrics[0]).__name__
    (['loss', 'accuracy'], 'SparseCategoricalAccuracy')
    """
    if example is None and not getattr(model, "inputs", None):  # only a model with an Input knows its output shapes
        raise InvalidArgument(
            f"model {model.name!r} does not declare the shapes of its inputs: pass example=Batch(x, y) with a batch of your data."
        )
    outputs = output_shapes(model, None if example is None else example.x)
    if not jax.tree.leaves(outputs) and any(arguments.values()):
        raise InvalidArgument(f"model {model.name!r} returns {type_name(outputs)}, expected arrays: see its `call`.")
    known = example is not None and example.y is not None
    y = as_shapes(example.y) if example is not None and known else outputs
    loss, requested = arguments.get("loss"), keras.tree.flatten([arguments.get("metrics"), arguments.get("weighted_metrics")])
    before = {metric: len(metric.variables) for metric in requested if isinstance(metric, keras.Metric)}
    try:
        losses = loss if known else keras.tree.map_structure(_placeholder, loss)
        compiled = _empty_model(model, {**arguments, "loss": losses})
        if loss is not None:
            _trace(compiled.compute_loss, y, outputs)
    except Exception as error:
        raise _unresolved(error, arguments) from error
    try:
        _trace(compiled.compute_metrics, y, outputs)
    except Exception as error:  # a metric may reject targets like the outputs, in any way
        user_metrics = _split_metrics(compiled)[0].metrics
        if known or not user_metrics:
            raise _unresolved(error, arguments) from error
        for metric in user_metrics:
            if not metric.variables:
                raise _other_targets(metric.name, "whose shapes are unknown") from error
    in_layers, own = layer_metrics(model), _metrics_of(compiled)
    logged = [*_logged_names(compiled), *(metric.name for metric in in_layers)]
    names = without_automatic_numbers(logged, [metric.name for metric in [*own, *in_layers]])
    variables = {name: list(metric.variables) for name, metric in zip(names, [*own, *in_layers], strict=True)}
    late = next((metric.name for metric, count in before.items() if len(metric.variables) != count), None)
    return CompiledMetrics(
        compiled,
        variables,
        dict(zip(unique_names(logged)[len(own) :], in_layers, strict=True)),
        arguments,
        _resolver(compiled, arguments, late, y),
    )


def _resolver(
    compiled: keras.Model, arguments: dict[str, Any], late: str | None, y: PyTree
) -> Callable[..., tuple[keras.Model, list[keras.Variable]]]:
    """Returns `CompiledMetrics.resolve`. `late` is a metric, if any, that made its variables for the targets `y`."""
    made: dict[Any, tuple[keras.Model, list[keras.Variable]]] = {}

    def variables(metrics: list[keras.Metric]) -> list[keras.Variable]:
        return [variable for metric in metrics for variable in metric.variables]

    def make(group: str | None, y_now: PyTree, outputs: PyTree) -> tuple[keras.Model, list[keras.Variable]]:
        resolved = _empty_model(compiled, arguments if group is None else {"weighted_metrics": arguments[group]})
        if group is None and _split_metrics(compiled)[1]:
            _trace(resolved.compute_loss, y_now, outputs)
        _trace(resolved.compute_metrics, y_now, outputs)
        if group is not None:
            return resolved, variables(_metrics_of(resolved)[1:])
        then, now = ([leaf.shape[1:] for leaf in jax.tree.leaves(shapes)] for shapes in (y, y_now))
        expected, found = ([(v.shape, v.dtype) for v in variables(_metrics_of(each))] for each in (compiled, resolved))
        if found != expected or (late is not None and then != now):
            problem = f"and were made for the shapes {then} (without the batch axis), but a batch has {now}"
            raise _other_targets(late or "a metric", problem)
        return resolved, variables(_metrics_of(resolved))

    def resolve(y: PyTree, outputs: PyTree, group: str | None = None) -> tuple[keras.Model, list[keras.Variable]]:
        shapes = as_shapes((y, outputs))
        key = (group, jax.tree.structure(shapes), *jax.tree.leaves(shapes))
        if key not in made:
            made[key] = make(group, *shapes)
        return made[key]

    return resolve


def pure_metrics(compiled: CompiledMetrics) -> Metrics:
    """Returns the pure functions on the metrics of a `CompiledMetrics`.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> metrics = pure_metrics(compile_metrics(model, loss="mse"))
    >>> state = metrics.track_loss(metrics.init(), jnp.asarray(3.0), 4)
    >>> float(metrics.result(state)["loss"]), float(metrics.result(metrics.reset(state))["loss"])
    (3.0, 0.0)
    """
    in_layers = compiled.layer_metrics

    def result() -> dict[str, Any]:
        return {**compiled.model.get_metrics_result(), **{name: metric.result() for name, metric in in_layers.items()}}

    tracker = compiled.model.metrics[0]
    return _pure_functions(compiled.variables, [*compiled.model.metrics, *in_layers.values()], tracker, result)


def running_metrics(metrics: Mapping[str, keras.Metric]) -> Metrics:
    """Returns the pure functions on Keras metric objects by name; the one called `loss` tracks the loss.

    >>> metrics = running_metrics({"loss": keras.metrics.Mean(), "accuracy": keras.metrics.Accuracy()})
    >>> sorted(metrics.result(metrics.init()))
    ['accuracy', 'loss']
    """

    def result() -> dict[str, Any]:
        return {name: metric.result() for name, metric in metrics.items()}

    names = without_automatic_numbers(metrics, metrics)
    variables = {name: list(metric.variables) for name, metric in zip(names, metrics.values(), strict=True)}
    return _pure_functions(variables, list(metrics.values()), metrics["loss"], result)


def _pure_functions(
    variables: Variables, metrics: Iterable[keras.Metric], tracker: keras.Metric, read: Callable[[], dict[str, Any]]
) -> Metrics:
    flat = metric_variables(variables)

    def reset(state: MetricState) -> MetricState:
        before = ordered_values(state, variables)
        with keras.StatelessScope(scope_mapping([(flat, before)])) as scope:
            for metric in metrics:
                metric.reset_state()
            return pack_metrics(variables, current_values(scope, flat, before))

    def track_loss(state: MetricState, loss: Float[Array, ""], rows: Any) -> MetricState:
        after = tracker.stateless_update_state(state["loss"], loss, sample_weight=rows)
        return {**state, "loss": [jnp.asarray(value) for value in after]}

    def result(state: MetricState) -> Logs:
        with keras.StatelessScope(scope_mapping([(flat, ordered_values(state, variables))])):
            return flat_logs(read())

    return Metrics(lambda: pack_metrics(variables, copy_values(flat)), reset, track_loss, result, variables)


def skip_padding(compiled: CompiledMetrics) -> Callable[[MetricState, MetricState, Batch, PyTree], MetricState]:
    """Returns how metrics change over a batch with padding: (before the batch, after its loss, batch, outputs) -> after it.

    `metrics` are weighted by `valid`, `weighted_metrics` by its product with the sample weights; the losses of single outputs
    count valid rows. Keras' `metrics` take no weights, so both groups are compiled once more as weighted ones on the same state.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> compiled = compile_metrics(model, loss="mse", metrics=["mae"])
    >>> state, valid = pure_metrics(compiled).init(), jnp.array([True, False])
    >>> batch, outputs = Batch(jnp.ones((2, 2)), jnp.ones((2, 1)), None, valid), jnp.ones((2, 1)) * 3
    >>> [float(v) for v in skip_padding(compiled)(state, state, batch, outputs)["mae"]]
    [2.0, 1.0]
    """

    def update(before: MetricState, after: MetricState, batch: Batch, outputs: PyTree) -> MetricState:
        assert batch.valid is not None
        valid = jnp.asarray(batch.valid, jnp.float32)
        per_output = jax.tree.map(lambda o: _broadcast_rows(valid, o.shape[: max(o.ndim - 1, 1)]), outputs)
        weights = {"metrics": per_output, "weighted_metrics": per_output}
        if batch.sample_weight is not None:
            weights["weighted_metrics"] = jax.tree.map(lambda w: w * _broadcast_rows(valid, w.shape), batch.sample_weight)
        names = iter(list(compiled.variables)[1:])
        for group in ("metrics", "weighted_metrics"):
            if not compiled.arguments.get(group):
                continue
            model, variables = compiled.resolve(batch.y, outputs, group)
            group_names = [next(names) for _ in model.metrics[1].metrics]
            values = ordered_values(before, group_names)
            # The loss tracker has no part in this, but Keras reads it, and its own values may belong to the trace that made it.
            tracker = [(v, jnp.zeros(v.shape, v.dtype)) for v in model.metrics[0].variables]
            with keras.StatelessScope([*scope_mapping([(variables, values)]), *tracker]) as scope:
                model.compute_metrics(batch.x, batch.y, outputs, weights[group])
                arrays = iter(current_values(scope, variables, values))
            after = {**after, **{name: [next(arrays) for _ in before[name]] for name in group_names}}
        fraction = jnp.mean(valid)
        for name in itertools.islice(names, len(_split_metrics(compiled.model)[1])):  # Keras counted padding as rows
            pairs = zip(before[name], after[name], strict=True)
            after = {**after, name: [old + (new - old) * fraction for old, new in pairs]}
        return after

    return update


def metric_variables(variables: Variables) -> list[keras.Variable]:
    """Returns all variables of all metrics in one list, in the mapping's order.

    >>> first, second = keras.Variable(1.0), keras.Variable(2.0)
    >>> [float(v.value) for v in metric_variables({"b": [first], "a": [second]})]
    [1.0, 2.0]
    """
    return [variable for group in variables.values() for variable in group]


def pack_metrics(variables: Variables, arrays: list[Array]) -> MetricState:
    """Returns arrays in the order of `metric_variables` as `State.metrics`.

    >>> pack_metrics({"b": [keras.Variable(0)], "a": [keras.Variable(0)]}, [jnp.array(1), jnp.array(2)])
    {'b': [Array(1, dtype=int32, weak_type=True)], 'a': [Array(2, dtype=int32, weak_type=True)]}
    """
    remaining: Iterator[Array] = iter(arrays)
    return {name: [next(remaining) for _ in group] for name, group in variables.items()}


def flat_logs(results: Mapping[str, Any]) -> Logs:
    """Returns the results of metrics as Keras logs them: the entries of a dict under their own names, a list as a vector.

    >>> flat_logs({"loss": 1.0, "report": {"precision": 0.5, "recall": [0.25, 0.75]}})["recall"].tolist()
    [0.25, 0.75]
    """
    logs: Logs = {}
    for name, value in sorted(results.items()):
        logs.update(flat_logs(value) if isinstance(value, dict) else {name: jnp.asarray(value)})
    return logs


def output_shapes(model: keras.Model, x: PyTree | None = None) -> PyTree:
    """Returns the shapes of a model's outputs for inputs `x`, or those that it declares, with 2 for every axis of any size.

    >>> output_shapes(keras.Sequential([keras.Input((2,)), keras.layers.Dense(10)]))
    ShapeDtypeStruct(shape=(2, 10), dtype=float32)
    """
    if x is None:
        declared = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
        return keras.tree.map_structure(
            lambda t: jax.ShapeDtypeStruct([2 if d is None else d for d in t.shape], t.dtype), declared
        )

    def call(arrays: list[Array], x: PyTree) -> PyTree:
        with keras.StatelessScope(scope_mapping([(model.variables, arrays)])):
            outputs = model(x, training=False)
        if any(not hasattr(leaf, "shape") for leaf in jax.tree.leaves(outputs)):
            raise InvalidArgument(f"model {model.name!r} returns {type_name(outputs)}, expected arrays: see its `call`.")
        return outputs

    return jax.eval_shape(call, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables], as_shapes(x))


def _split_metrics(compiled: keras.Model) -> tuple[Any, list[keras.Metric]]:
    """Returns a compiled model's metrics after its loss tracker: Keras' one compiled metric or None, and a loss per output."""
    rest = compiled.metrics[1:]
    split = int(any(hasattr(metric, "metrics") for metric in rest[:1]))
    return (rest[0] if split else None), rest[split:]


def _placeholder(loss: Any) -> Any:
    """Returns a loss with the name of another that accepts targets like the outputs. Raises `ValueError` for an unknown one."""
    if loss is None:
        return None
    known = loss if str(loss).lower() in ("crossentropy", "ce") else keras.losses.get(loss)

    @functools.wraps(known)  # copies the name, of a function or of a `keras.losses.Loss`
    def accept(y_true: Array, y_pred: Array) -> Array:
        return keras.ops.zeros(y_pred.shape[:1])

    if isinstance(loss, str) and not isinstance(known, keras.losses.Loss):
        accept.__dict__["name"] = loss  # Keras names such a loss as the user does
    return accept


def _empty_model(model: keras.Model, arguments: dict[str, Any]) -> keras.Model:
    """Returns a compiled model without layers, which calls its outputs as `model` does."""
    empty = keras.Model()
    if getattr(model, "output_names", None):  # only functional models name their outputs
        empty.output_names = model.output_names
    empty.compile(optimizer=None, **arguments)
    return empty


def _trace(compute: Callable[..., Any], y: PyTree, outputs: PyTree) -> None:
    """Lets Keras resolve losses or metrics, which it does when it computes them first."""

    def run(y: PyTree, outputs: PyTree) -> None:
        compute(None, y, outputs)  # a result may be a `keras.Variable`, which no trace returns

    with SharedScope():  # variables created in it get their values when it closes, outside the trace
        jax.eval_shape(run, y, outputs)


def _metrics_of(compiled: keras.Model) -> list[keras.Metric]:
    user_metrics, output_losses = _split_metrics(compiled)
    return [compiled.metrics[0], *(user_metrics.metrics if user_metrics is not None else []), *output_losses]


def _logged_names(compiled: keras.Model) -> list[str]:
    """Returns the names that Keras logs a compiled model's own metrics under."""
    user_metrics, output_losses = _split_metrics(compiled)
    names: list[str] = []
    if user_metrics is not None:
        with SharedScope():
            jax.eval_shape(lambda: names.extend(user_metrics.result()))
        if len(names) != len(user_metrics.metrics):  # two of the same name
            names = [metric.name for metric in user_metrics.metrics]
    return ["loss", *names, *(metric.name for metric in output_losses)]


def _other_targets(metric: str, problem: str) -> InvalidArgument:
    return InvalidArgument(
        f"metrics: the variables of {metric!r} depend on the targets, {problem}: pass example=Batch(x, y) with a batch of your "
        "data, or data.shapes."
    )


def _broadcast_rows(valid: Array, shape: tuple[int, ...]) -> Array:
    """Returns one number per row, repeated over the row's other axes."""
    return jnp.broadcast_to(valid.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _unresolved(error: Exception, arguments: dict[str, Any]) -> InvalidArgument:
    """Returns Keras' message on one line, with the nearest known name if one was misspelt."""
    for group, module in (("metrics", keras.metrics), ("weighted_metrics", keras.metrics), ("loss", keras.losses)):
        known = [name for name in dir(module) if not name.startswith("_")] + ALIASES
        for name in keras.tree.flatten(arguments.get(group)):
            if isinstance(name, str) and name not in known and name in str(error):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"see {module.__name__} for the names that exist."
                return InvalidArgument(f"{group}: Keras knows no {name!r}; {hint}")
    message = " ".join(str(error).split())
    frame = user_frame(error)
    if frame is not None:
        return InvalidArgument(f"{frame[0]}:{frame[1]}: {type(error).__name__}: {message} (losses and metrics of the example)")
    return InvalidArgument(f"losses and metrics do not fit the model's outputs: {message}")

"""Keras' losses and metrics, however they are named, resolved once and then used as pure functions."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, Float, PyTree

from research.state import Batch, Refused, current, in_order, layer_metrics, mapped, unique, values

NICKNAMES = ["accuracy", "acc", "crossentropy", "ce", "mse", "mae", "mape", "msle", "bce", "kld"]

Logs = dict[str, Array]
Held = dict[str, list[Array]]  # State.metrics


class Measures(NamedTuple):
    """Pure functions on `State.metrics`.

    `init` gives the first, `reset` empties them, `track` adds the mean loss of so many rows to the running loss, `result` reads
    them all as logs.
    """

    init: Callable[[], Held]
    reset: Callable[[Held], Held]
    track: Callable[[Held, Float[Array, ""], Any], Held]
    result: Callable[[Held], Logs]


class Compiled(NamedTuple):
    """Losses and metrics as Keras resolved them: what an objective needs to compute them inside a `keras.StatelessScope`.

    `head` is an empty compiled model; `variables` are those of every metric by its unique name: the loss tracker, `metrics`,
    `weighted_metrics`, a loss per output where there are several, and those inside layers. `given` is what was compiled.
    """

    head: keras.Model
    inside: dict[str, keras.Metric]
    variables: dict[str, list[keras.Variable]]
    given: dict[str, Any]


def compiled(
    model: keras.Model,
    *,
    loss: Any,
    metrics: Any,
    weighted_metrics: Any,
    loss_weights: Any,
    example: Batch | None,
) -> Compiled:
    """Resolves what `model.compile` would take against the model's outputs and the targets' shapes.

    Raises `Refused` for what Keras can't resolve.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> found = compiled(model, loss="mse", metrics=["accuracy"], weighted_metrics=None, loss_weights=None, example=None)
    >>> list(found.variables)
    ['loss', 'accuracy']
    """
    if example is None and not getattr(model, "inputs", None):  # only a model with an Input knows its own
        raise Refused(
            f"model {model.name!r} does not tell the shape of its inputs: pass example=Batch(x, y) with a batch of your data."
        )
    outputs = output_shapes(model, None if example is None else example.x)
    y = targets(outputs, loss) if example is None or example.y is None else shapes(example.y)
    weight = None if example is None else shapes(example.sample_weight)
    given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, "loss_weights": loss_weights}
    head = keras.Model()
    if getattr(model, "output_names", None):  # only Functional models name their outputs
        head.output_names = model.output_names
    names = ["loss"]

    def measure(y: PyTree, outputs: PyTree, weight: PyTree) -> None:
        if loss is not None:
            head.compute_loss(None, y, outputs, weight)
        head.compute_metrics(None, y, outputs, weight)
        named, of_outputs = _parts(head)
        names.extend(named.result() if named is not None else [])
        names.extend(metric.name for metric in of_outputs)

    try:
        head.compile(optimizer=None, **given)
        with keras.StatelessScope():  # variables made in it get their values when it closes, outside the trace
            jax.eval_shape(measure, y, outputs, weight)
    except (ValueError, TypeError, KeyError) as error:
        raise _unresolved(error, given) from error
    named, of_outputs = _parts(head)
    found = [head.metrics[0], *(named.metrics if named is not None else []), *of_outputs]
    inside = layer_metrics(model)
    names = unique([*names, *(metric.name for metric in inside)])
    return Compiled(
        head,
        dict(zip(names[len(found) :], inside, strict=True)),
        {name: list(metric.variables) for name, metric in zip(names, [*found, *inside], strict=True)},
        given,
    )


def measures(of: Compiled) -> Measures:
    """The pure functions on the metrics of a `Compiled`.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> found = measures(compiled(model, loss="mse", metrics=None, weighted_metrics=None, loss_weights=None, example=None))
    >>> held = found.track(found.init(), jnp.asarray(3.0), 4)
    >>> float(found.result(held)["loss"]), float(found.result(found.reset(held))["loss"])
    (3.0, 0.0)
    """
    flat = flat_variables(of)

    def reset(held: Held) -> Held:
        before = in_order(held, of.variables)
        with keras.StatelessScope(mapped([(flat, before)])) as scope:
            for metric in [*of.head.metrics, *of.inside.values()]:
                metric.reset_state()
            return pack(of, current(scope, flat, before))

    def track(held: Held, loss: Float[Array, ""], count: Any) -> Held:
        moved = of.head.metrics[0].stateless_update_state(held["loss"], loss, sample_weight=count)
        return {**held, "loss": [jnp.asarray(v) for v in moved]}

    def result(held: Held) -> Logs:
        with keras.StatelessScope(mapped([(flat, in_order(held, of.variables))])):
            logs = {**of.head.get_metrics_result(), **{name: m.result() for name, m in of.inside.items()}}
        return {name: jnp.asarray(value) for name, value in logs.items()}

    return Measures(lambda: pack(of, values(flat)), reset, track, result)


def without_padding(of: Compiled) -> Callable[[Held, Held, Batch, PyTree], Held]:
    """How metrics move over a batch with padding: (before the batch, after its loss, batch, outputs) -> after the batch.

    `metrics` get `valid` as a weight, `weighted_metrics` its product with the sample weights, the losses of single outputs
    count valid rows. Keras' `metrics` take no weights, so both kinds are compiled once more as weighted ones over the same state.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> of = compiled(model, loss="mse", metrics=["mae"], weighted_metrics=None, loss_weights=None, example=None)
    >>> held, valid = measures(of).init(), jnp.array([True, False])
    >>> held = without_padding(of)(held, held, Batch(jnp.ones((2, 2)), jnp.ones((2, 1)), None, valid), jnp.ones((2, 1)) * 3)
    >>> [float(v) for v in held["mae"]]
    [2.0, 1.0]
    """
    heads: dict[str, keras.Model] = {}

    def head(kind: str, batch: Batch, outputs: PyTree) -> keras.Model:
        if kind not in heads:
            heads[kind] = keras.Model()
            heads[kind].output_names = getattr(of.head, "output_names", None)
            heads[kind].compile(optimizer=None, weighted_metrics=of.given[kind])
            with keras.StatelessScope():
                jax.eval_shape(heads[kind].compute_metrics, None, shapes(batch.y), shapes(outputs), shapes(batch.valid))
        return heads[kind]

    def move(before: Held, after: Held, batch: Batch, outputs: PyTree) -> Held:
        assert batch.valid is not None
        valid = jnp.asarray(batch.valid, jnp.float32)
        of_outputs = jax.tree.map(lambda o: _spread(valid, o.shape[: max(o.ndim - 1, 1)]), outputs)
        weights = {"metrics": of_outputs, "weighted_metrics": of_outputs}
        if batch.sample_weight is not None:
            weights["weighted_metrics"] = jax.tree.map(lambda w: w * _spread(valid, w.shape), batch.sample_weight)
        names = iter(list(of.variables)[1:])
        for kind in ("metrics", "weighted_metrics"):
            if not of.given[kind]:
                continue
            model = head(kind, batch, outputs)
            mine = [next(names) for _ in model.metrics[1].metrics]
            held = in_order(before, mine)
            with keras.StatelessScope(mapped([(model.metrics[1].variables, held)])) as scope:
                model.compute_metrics(batch.x, batch.y, outputs, weights[kind])
                arrays = iter(current(scope, model.metrics[1].variables, held))
            after = {**after, **{name: [next(arrays) for _ in before[name]] for name in mine}}
        share = jnp.mean(valid)
        for name in names:  # losses of single outputs: Keras counted padding as rows
            if name not in of.inside:
                after = {**after, name: [b + (a - b) * share for b, a in zip(before[name], after[name], strict=True)]}
        return after

    return move


def flat_variables(of: Compiled) -> list[keras.Variable]:
    """All variables of all metrics, in the order of `Compiled.variables`.

    >>> first, second = keras.Variable(1.0), keras.Variable(2.0)
    >>> [float(v.value) for v in flat_variables(Compiled(keras.Model(), {}, {"b": [first], "a": [second]}, {}))]
    [1.0, 2.0]
    """
    return [variable for held in of.variables.values() for variable in held]


def pack(of: Compiled, arrays: list[Array]) -> Held:
    """Arrays in the order of `flat_variables` as `State.metrics`.

    >>> of = Compiled(keras.Model(), {}, {"b": [keras.Variable(0)], "a": [keras.Variable(0)]}, {})
    >>> pack(of, [jnp.array(1), jnp.array(2)])
    {'b': [Array(1, dtype=int32, weak_type=True)], 'a': [Array(2, dtype=int32, weak_type=True)]}
    """
    remaining: Iterator[Array] = iter(arrays)
    return {name: [next(remaining) for _ in held] for name, held in of.variables.items()}


def targets(outputs: PyTree, loss: Any) -> PyTree:
    """The shapes that targets have if nobody says otherwise: the outputs', less the last axis under a sparse loss.

    >>> outputs = jax.ShapeDtypeStruct((2, 10), "float32")
    >>> targets(outputs, "sparse_categorical_crossentropy"), targets(outputs, "mse")
    (ShapeDtypeStruct(shape=(2,), dtype=int32), ShapeDtypeStruct(shape=(2, 10), dtype=float32))
    """
    leaves, structure = jax.tree.flatten(outputs)
    losses = keras.tree.flatten(loss)
    if len(losses) != len(leaves):
        losses = [losses[0] if losses else None] * len(leaves)
    return jax.tree.unflatten(structure, [_target(o, each) for o, each in zip(leaves, losses, strict=True)])


def shapes(tree: PyTree) -> PyTree:
    """Arrays as `jax.ShapeDtypeStruct`s, in the dtypes that JAX gives them.

    >>> shapes({"x": jnp.ones((2, 3)), "y": None})
    {'x': ShapeDtypeStruct(shape=(2, 3), dtype=float32), 'y': None}
    """
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype)), tree)


def output_shapes(model: keras.Model, x: PyTree | None = None) -> PyTree:
    """The shapes of a model's outputs on inputs `x`, or on two examples of what its `keras.Input`s declare.

    >>> output_shapes(keras.Sequential([keras.Input((2,)), keras.layers.Dense(10)]))
    ShapeDtypeStruct(shape=(2, 10), dtype=float32)
    """
    if x is None:
        declared = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
        x = keras.tree.map_structure(
            lambda t: jax.ShapeDtypeStruct(tuple(2 if d is None else d for d in t.shape), t.dtype), declared
        )

    def call(arrays: list[Array], x: PyTree) -> PyTree:
        with keras.StatelessScope(mapped([(model.variables, arrays)])):
            return model(x, training=False)

    return jax.eval_shape(call, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables], shapes(x))


def _parts(head: keras.Model) -> tuple[Any, list[keras.Metric]]:
    """A head's metrics behind its loss tracker: Keras' one compiled metric (or None), and a loss for each of several outputs."""
    rest = head.metrics[1:]
    split = int(any(hasattr(metric, "metrics") for metric in rest[:1]))
    return (rest[0] if split else None), rest[split:]


def _target(output: jax.ShapeDtypeStruct, loss: Any) -> jax.ShapeDtypeStruct:
    name = loss if isinstance(loss, str) else getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if "sparse" in str(name).lower():
        return jax.ShapeDtypeStruct(output.shape[:-1], jnp.int32)
    return output


def _spread(valid: Array, shape: tuple[int, ...]) -> Array:
    """A number for each row, repeated over the row's positions."""
    return jnp.broadcast_to(valid.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _unresolved(error: Exception, given: dict[str, Any]) -> Refused:
    """Keras' message on one line, with the nearest known name where one was misspelt."""
    for kind, module in (("metrics", keras.metrics), ("weighted_metrics", keras.metrics), ("loss", keras.losses)):
        known = [name for name in dir(module) if not name.startswith("_")] + NICKNAMES
        for name in keras.tree.flatten(given[kind]):
            if isinstance(name, str) and name not in known and name in str(error):
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"see {module.__name__} for the names there are."
                return Refused(f"{kind}: Keras knows no {name!r}; {hint}")
    return Refused("losses and metrics do not fit the model's outputs: " + " ".join(str(error).split()))

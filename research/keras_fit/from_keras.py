"""A compiled Keras model's own training steps as a learner."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, PyTree

from research.core.learner import Learner
from research.core.metrics import (
    Logs,
    MetricState,
    compile_metrics,
    flat_logs,
    metric_variables,
    output_shapes,
    pack_metrics,
)
from research.core.names import slot_names, variable_names, without_automatic_numbers
from research.core.objective import ensure_built
from research.core.state import (
    Batch,
    InvalidArgument,
    Mapped,
    State,
    as_shapes,
    check_type,
    copy_values,
    current_values,
    ordered_values,
    scope_mapping,
)
from research.core.update import keras_update


def from_keras(model: keras.Model, example: Batch | None = None) -> Learner:
    """Returns a learner that runs a compiled Keras model's own `train_step`, `test_step` and `predict_step` unchanged.

    A subclass may override them with Keras' JAX signature, `train_step(self, state, data)`. The metrics are `model.metrics`, in
    which those of `compile` are one entry. The steps get a `Batch` as `fit` passes it, `(x, y)` or `(x, y, sample_weight)`, and
    any other batch as it is. `example` is needed if the model is not built yet, or if the variables of a loss or metric depend on
    the targets, as in `supervised`. Raises `InvalidArgument` for a model that is not compiled, and for a batch with padding.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    >>> learner = from_keras(model)
    >>> state, logs = jax.jit(learner.train)(learner.init(), Batch(jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> sorted(logs)
    ['loss', 'mae']
    """
    check_type(model, keras.Model, "from_keras: the model", "a compiled keras.Model")
    if not model.compiled:
        raise InvalidArgument(
            f"model {model.name!r} is not compiled: call model.compile(...) first, or use research.supervised(model, ...)."
        )
    ensure_built(model, example)
    resolve_metrics = _build_metrics(model, example)
    optimizer = model.optimizer
    update = None if optimizer is None else keras_update(optimizer, model.trainable_variables)
    expected = _shapes(model_metrics(model))

    def metrics(batch: Any = None) -> dict[str, list[keras.Variable]]:
        """Returns the model's metrics; with a batch, as they are for its targets."""
        if batch is not None:
            resolve_metrics(batch)
        found = model_metrics(model)
        if _shapes(found) != expected:
            raise InvalidArgument(
                f"model {model.name!r}: its metrics have other variables for the targets of this batch than for targets like its "
                "outputs: pass example=Batch(x, y) with a batch of your data, or data.shapes."
            )
        return found

    def init() -> State:
        trainable = copy_values(model.trainable_variables)
        slots = [] if update is None else update.init(trainable)
        metric_state = {name: copy_values(variables) for name, variables in metrics().items()}
        return State(trainable, copy_values(model.non_trainable_variables), slots, metric_state)

    def pack(arrays: list[Any]) -> MetricState:
        return pack_metrics(metrics(), [jnp.asarray(array) for array in arrays])

    def reset(state: State) -> State:
        variables, before = metric_variables(metrics()), ordered_values(state.metrics, expected)
        with keras.StatelessScope(scope_mapping([(variables, before)])) as scope:
            model.reset_metrics()
            return state._replace(metrics=pack(current_values(scope, variables, before)))

    def train(state: State, batch: Any) -> tuple[State, Logs]:
        values = ordered_values(state.metrics, metrics(batch))
        keras_state = (state.trainable, state.non_trainable, state.optimizer, values)
        logs, (trainable, non_trainable, slots, metric_values) = model.train_step(keras_state, _as_keras_data(batch))
        return State(trainable, non_trainable, slots, pack(metric_values)), flat_logs(logs)

    def evaluate(state: State, batch: Any) -> tuple[State, Logs]:
        values = ordered_values(state.metrics, metrics(batch))
        keras_state = (state.trainable, state.non_trainable, values)
        logs, (trainable, non_trainable, metric_values) = model.test_step(keras_state, _as_keras_data(batch))
        return state._replace(trainable=trainable, non_trainable=non_trainable, metrics=pack(metric_values)), flat_logs(logs)

    def predict(state: State, batch: Any) -> PyTree:
        outputs, _ = model.predict_step((state.trainable, state.non_trainable), _as_keras_data(batch))
        return outputs

    def state_mapping(state: State) -> Mapped:
        values = [(variables, state.metrics[name]) for name, variables in metrics().items()]
        weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
        return scope_mapping([*weights, *values])

    names = State(
        variable_names(model.trainable_variables),
        variable_names(model.non_trainable_variables),
        [] if optimizer is None else slot_names(optimizer, model.trainable_variables),
        {name: [f"{name}/{i}" for i in range(len(shapes))] for name, shapes in expected.items()},
    )
    own = any(
        getattr(type(model), name) is not getattr(keras.Model, name) for name in ("train_step", "test_step", "compute_loss")
    )
    targets = () if own else ((model, model.loss),)  # steps of one's own may do anything with the labels
    return Learner(init, reset, train, evaluate, predict, names, state_mapping, targets)


def model_metrics(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """Returns the metrics of a compiled model in the order of `model.metrics`: unique name -> variables.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> {name: len(variables) for name, variables in model_metrics(model).items()}
    {'loss': 2}
    """
    metrics = model.metrics
    names = [metric.name for metric in metrics]
    return dict(zip(without_automatic_numbers(names, names), (list(m.variables) for m in metrics), strict=True))


def _shapes(metrics: dict[str, list[keras.Variable]]) -> dict[str, list[Any]]:
    return {name: [(tuple(variable.shape), variable.dtype) for variable in variables] for name, variables in metrics.items()}


def _as_keras_data(batch: Any) -> Any:
    """Returns a batch in the form that Keras' steps unpack."""
    if not isinstance(batch, Batch):
        return batch
    if batch.valid is not None:
        raise InvalidArgument(
            "from_keras: Keras' own steps cannot ignore padding (Batch.valid): pass batches without padding, "
            "or use research.supervised(model, ...)."
        )
    return keras.utils.pack_x_y_sample_weight(batch.x, batch.y, batch.sample_weight)


def _build_metrics(model: keras.Model, example: Batch | None) -> Callable[[Any], None]:
    """Builds the losses and metrics of a compiled model, which Keras does on the first batch.

    Without targets the metrics are built for targets like the outputs, and the function that is returned resolves them anew for
    the targets of the first batch that it is called with: what "accuracy" stands for depends on them, its variables do not.
    """
    unbuilt = [metric for metric in model.metrics if not getattr(metric, "built", True)]
    if model.loss is None and not unbuilt:
        return lambda batch: None
    compiled = compile_metrics(model, example, loss=model.loss)
    x = None if example is None else as_shapes(example.x)
    outputs = output_shapes(model, x)
    if example is not None and example.y is not None:
        _trace(model, [model.compute_loss, model.compute_metrics], x, as_shapes((example.y, outputs, example.sample_weight)))
        return lambda batch: None
    if len(compiled.model.metrics) > 1:  # the losses of several outputs have variables
        unresolved = next((loss for loss in keras.tree.flatten(model.loss) if str(loss).lower() in ("crossentropy", "ce")), None)
        if unresolved is not None:
            raise _other_targets(model, f"what its loss {unresolved!r} stands for depends")
        with contextlib.suppress(Exception):  # a loss may reject targets like the outputs; the first batch has the right ones
            _trace(model, [model.compute_loss], x, (outputs, outputs))
    for metric in unbuilt:
        metric.build(outputs, outputs)
    early = {each: len(each.variables) for metric in unbuilt for each in metric.metrics}
    with contextlib.suppress(Exception):  # as above
        _trace(model, [model.compute_metrics], x, (outputs, outputs))
    late = [each for each, count in early.items() if len(each.variables) != count]
    for each in early:
        if not each.variables:
            raise _other_targets(model, f"the variables of {each.name!r} depend")
    resolved: list[bool] = []

    def resolve(batch: Any) -> None:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(_as_keras_data(batch))
        if y is None or resolved:
            return
        shapes = as_shapes((y, output_shapes(model, x)))
        if late and [leaf.shape[1:] for leaf in jax.tree.leaves(y)] != [leaf.shape[1:] for leaf in jax.tree.leaves(outputs)]:
            raise _other_targets(model, f"the variables of {late[0].name!r} depend")
        with jax.ensure_compile_time_eval():  # the variables are the model's: their values must not belong to a trace
            for metric in unbuilt:
                metric.build(*shapes)
            _trace(model, [model.compute_metrics], as_shapes(x), shapes)
        resolved.append(True)

    return resolve


def _other_targets(model: keras.Model, problem: str) -> InvalidArgument:
    return InvalidArgument(
        f"model {model.name!r}: {problem} on the targets, which may be shaped unlike the outputs: pass example=Batch(x, y) with "
        "a batch of your data, or data.shapes."
    )


def _trace(model: keras.Model, functions: list[Callable[..., Any]], x: PyTree, shapes: tuple[PyTree, ...]) -> None:
    """Lets Keras build what functions of (x, y, outputs, weights) compute with."""

    def compute(arrays: list[Array], x: PyTree, shapes: tuple[PyTree, ...]) -> None:
        with keras.StatelessScope(scope_mapping([(model.variables, arrays)])):
            for function in functions:
                function(x, *shapes)

    variables = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables]
    with keras.StatelessScope():  # variables created in it get their values when it closes, outside the trace
        jax.eval_shape(compute, variables, x, shapes)

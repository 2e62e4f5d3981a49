"""From a loss written as plain Keras code to a learner."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jaxtyping import Array, Float, PyTree

from research.core.learner import Learner, as_optimizer, check_transforms, from_objective
from research.core.metrics import Metrics, metric_variables, pack_metrics, running_metrics
from research.core.names import unique_names
from research.core.objective import Aux, Objective
from research.core.state import (
    InvalidArgument,
    SharedScope,
    State,
    as_shapes,
    check_type,
    current_values,
    layer_metrics,
    ordered_values,
    scope_mapping,
)
from research.core.step import Gradient, num_examples

LossFunction = Callable[..., tuple[Any, dict[str, Any]]]  # (batch, *, training) -> (loss, scalars to log)
KERAS_OBJECTS = (keras.Layer, keras.random.SeedGenerator, keras.Variable, keras.Metric)


def learner(
    loss_function: LossFunction,
    models: Any,
    optimizer: Any = "rmsprop",
    *,
    example: Any,
    predict: Callable[[Any], PyTree] | None = None,
    objective_transform: Callable[[Objective], Objective] = lambda objective: objective,
    gradient_transform: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Learner:
    """Returns a learner that minimises a loss written as plain Keras code.

    `loss_function(batch, training=...)` returns `(loss, scalars)`: a scalar that is a mean over the batch's examples, and a dict
    of further scalars, which are logged as running means weighted by examples, like the loss, in training and in evaluation. It
    calls live models and layers, and draws random numbers from live `keras.random.SeedGenerator`s; inside, all their variables
    have the values of the state. Regularizers and `add_loss` terms are not added: use `sum(model.losses)`.

    `models` lists every Keras object with variables that the loss uses: models, layers, seed generators, `keras.Variable`s, and
    `keras.Metric`s that it updates, which are then logged too. Non-trainable ones (a frozen teacher) are listed as well.
    `optimizer` is what `model.compile` takes, or optax'. `example` is a batch or its `jax.ShapeDtypeStruct`s, for example
    `data.shapes`; its shapes alone are used, to build the models and to find the names of the scalars. `predict(batch)` returns
    outputs, as plain Keras code too; by default a single model is called on `batch.x`. `objective_transform` and
    `gradient_transform` are those of `supervised`.

    The state is a `State` with the variables of all models in the order of `models`: see `part` and `write_back`. Raises
    `InvalidArgument` for a loss that is no scalar, for scalars that differ between calls, and, when the step is traced, for a
    variable that the loss uses or assigns but that belongs to no object in `models`. Warns about an object
    that the loss never uses.

    >>> import research
    >>> encoder, decoder = (keras.Sequential([keras.layers.Dense(units)]) for units in (2, 4))
    >>> noise = keras.random.SeedGenerator(0)
    >>> def denoising(batch, training):
    ...     noisy = batch.x + 0.1 * keras.random.normal(batch.x.shape, seed=noise)
    ...     code = encoder(noisy, training=training)
    ...     loss = keras.ops.mean((decoder(code, training=training) - batch.x) ** 2)
    ...     return loss, {"code_size": keras.ops.mean(keras.ops.abs(code))}
    >>> batch = research.Batch(jnp.ones((8, 4)))
    >>> autoencoder = learner(denoising, [encoder, decoder, noise], "adam", example=batch, predict=lambda b: encoder(b.x))
    >>> state, logs = jax.jit(autoencoder.train)(autoencoder.init(), batch)
    >>> sorted(logs), autoencoder.predict(state, batch).shape, research.part(autoencoder, state, decoder).trainable[0].shape
    (['code_size', 'loss'], (8, 2), (2, 4))
    """
    check_type(loss_function, Callable, "learner: the loss", "a function loss(batch, training) that returns (loss, scalars)")
    if isinstance(loss_function, keras.Layer):
        raise InvalidArgument("learner: the loss is a model; pass a function that calls it, or use research.supervised(model).")
    check_transforms("learner", objective_transform, gradient_transform)
    objects = list(models) if isinstance(models, list | tuple) else [models]
    for item in objects:
        if not isinstance(item, KERAS_OBJECTS):
            raise InvalidArgument(
                f"learner: models holds a {type(item).__name__}; expected models, layers, seed generators, variables or metrics."
            )
    optimizer = as_optimizer(optimizer, objects)
    names, used = _trace(loss_function, as_shapes(example))
    variables = _collect(objects, names)
    _warn_unused(objects, used)
    predict = predict or _call_single_layer(objects)

    def predict_outputs(state: State, batch: Any) -> PyTree:
        with variables.scope(state) as scope:
            outputs = predict(batch)
        variables.check("predict function", scope)
        return outputs

    return from_objective(
        _objective(loss_function, variables),
        variables.metrics,
        variables.trainable,
        variables.non_trainable,
        optimizer,
        predict=predict_outputs,
        objective_transform=objective_transform,
        gradient_transform=gradient_transform,
    )


class _Objects(NamedTuple):
    """The variables of a loss, in the order of a `State`, and the metrics that it logs."""

    trainable: list[keras.Variable]
    non_trainable: list[keras.Variable]
    metrics: Metrics
    trackers: dict[str, keras.metrics.Mean]  # of the scalars, by name

    def scope(self, state: State) -> SharedScope:
        """Returns a scope in which all variables have the values of a state."""
        metrics = self.metrics.variables
        values = metric_variables(metrics), ordered_values(state.metrics, metrics)
        groups = [(self.trainable, state.trainable), (self.non_trainable, state.non_trainable), values]
        return SharedScope(scope_mapping(groups), collect_losses=True)

    def check(self, function: str, scope: SharedScope) -> None:
        """Raises `InvalidArgument` if code in a scope used or assigned a variable that no state holds."""
        check_variables(
            scope,
            [*self.trainable, *self.non_trainable, *metric_variables(self.metrics.variables)],
            f"learner: the {function}",
            "nothing in `models`",
            "add its model, layer, metric or seed generator to models",
        )


def check_variables(scope: SharedScope, known: Sequence[keras.Variable], function: str, where: str, advice: str) -> None:
    """Raises `InvalidArgument` if code in a scope used or assigned another variable than the known ones and those around it.

    >>> variable = keras.Variable(1.0, name="temperature")
    >>> with SharedScope() as scope:
    ...     _ = variable * 2.0
    >>> check_variables(scope, [], "learner: the loss", "nothing in `models`", "add it to models")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: learner: the loss uses 'temperature', which belongs to nothing in `models`, so ...
    """
    own, outer = {id(variable) for variable in known}, scope.original_scope
    for variables, verb, effect in (
        (scope.written, "assigns to", "the assignment would be lost"),
        (scope.read, "uses", "its value would be a constant"),
    ):
        for key, variable in variables.items():
            if key not in own and (outer is None or outer.get_current_value(variable) is None):
                raise InvalidArgument(
                    f"{function} {verb} {variable.path!r}, which belongs to {where}, so {effect}; {advice}, or join its learner "
                    "with research.joint."
                )


def _trace(loss_function: LossFunction, batch: Any) -> tuple[list[str], set[int]]:
    """Builds what the loss calls, from shapes alone. Returns the names of the scalars and the ids of the variables used."""
    names: list[str] | None = None
    used: set[int] = set()

    def scalars(batch: Any, training: bool) -> dict[str, Array]:
        return _scalars(loss_function(batch, training=training), names)[1]

    for training in (True, False):
        with _TracingScope(collect_losses=True) as scope:  # variables created in it get their values when it closes
            found = list(jax.eval_shape(functools.partial(scalars, training=training), batch))
        names = found if names is None else names
        used |= scope.read.keys()
    assert names is not None
    return names, used


class _TracingScope(SharedScope):
    """A scope in which every variable has zeros for a value, also those created inside: only shapes are traced."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        value = super().get_current_value(variable)
        return jnp.zeros(variable.shape, variable.dtype) if value is None else value


def _scalars(result: Any, names: Sequence[str] | None) -> tuple[Array, dict[str, Array]]:
    """Returns the loss and the scalars that a loss function returned. Raises `InvalidArgument` unless that is what they are."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise InvalidArgument(
            f"learner: the loss returned {type(result).__name__}; expected a scalar and a dict of scalars to log, as in "
            "`return loss, {}`."
        )
    loss, scalars = result
    if "loss" in scalars:
        raise InvalidArgument(
            "learner: the loss returned a scalar called 'loss'; the loss is logged as that: choose another name."
        )
    for name, value in {"loss": loss, **scalars}.items():
        if jnp.shape(value) != ():
            raise InvalidArgument(
                f"learner: {name!r} has the shape {jnp.shape(value)}; expected a scalar: take the mean over the examples, "
                "keras.ops.mean(...)."
            )
    if not jnp.issubdtype(jnp.asarray(loss).dtype, jnp.floating):
        raise InvalidArgument(f"learner: the loss is {jnp.asarray(loss).dtype}; expected a floating-point scalar.")
    if names is not None and set(scalars) != set(names):
        raise InvalidArgument(
            f"learner: the loss returned the scalars {sorted(scalars)}, in another call {sorted(names)}; "
            "expected the same names for every batch, in training and in evaluation."
        )
    return jnp.asarray(loss), {name: jnp.asarray(value) for name, value in scalars.items()}


def _collect(objects: Sequence[Any], names: list[str]) -> _Objects:
    """Returns the variables and metrics of built Keras objects, each once."""
    layers = [item for item in objects if isinstance(item, keras.Layer)]
    seeds = [item.state for item in objects if isinstance(item, keras.random.SeedGenerator)]
    single = [item for item in objects if isinstance(item, keras.Variable)]
    trainable = [*(v for layer in layers for v in layer.trainable_variables), *(v for v in single if v.trainable)]
    others = [*(v for layer in layers for v in layer.non_trainable_variables), *(v for v in single if not v.trainable)]
    if not trainable:
        raise InvalidArgument(
            "learner: nothing in `models` has trainable weights; expected a layer or model with weights and trainable=True."
        )
    given = [item for item in objects if isinstance(item, keras.Metric)]
    metrics = list(dict.fromkeys([*given, *(metric for layer in layers for metric in layer_metrics(layer))]))
    trackers = {name: keras.metrics.Mean(name=name) for name in names}
    logged = ["loss", *names, *(metric.name for metric in metrics)]
    by_name = dict(zip(unique_names(logged), [keras.metrics.Mean(), *trackers.values(), *metrics], strict=True))
    unique, unique_others = (list({id(v): v for v in group}.values()) for group in (trainable, [*others, *seeds]))
    return _Objects(unique, unique_others, running_metrics(by_name), trackers)


def _objective(loss_function: LossFunction, objects: _Objects) -> Objective:
    names, variables = list(objects.trackers), objects.metrics.variables
    flat = metric_variables(variables)

    def objective(state: State, batch: Any, *, training: bool) -> tuple[Float[Array, ""], Aux]:
        count = num_examples(batch)
        with objects.scope(state) as scope:
            loss, scalars = _scalars(loss_function(batch, training=training), names)
            for name, tracker in objects.trackers.items():
                tracker.update_state(scalars[name], sample_weight=count)
            after = pack_metrics(variables, current_values(scope, flat, ordered_values(state.metrics, variables)))
            non_trainable = current_values(scope, objects.non_trainable, state.non_trainable)
        objects.check("loss", scope)
        return loss, Aux(None, non_trainable, after, jnp.asarray(count, jnp.float32))

    return objective


def variables_of(item: Any) -> list[keras.Variable]:
    """Returns the variables of a layer, a metric, a seed generator, or a variable itself.

    >>> [variable.shape for variable in variables_of(keras.random.SeedGenerator(0))]
    [(2,)]
    """
    if isinstance(item, keras.random.SeedGenerator):
        return [item.state]
    return [item] if isinstance(item, keras.Variable) else list(item.variables)


def _warn_unused(objects: Sequence[Any], used: set[int]) -> None:
    for item in objects:
        if not any(id(variable) in used for variable in variables_of(item)):
            name = f"{type(item).__name__} {item.name!r}"
            warnings.warn(f"learner: {name} is in `models`, but the loss never uses it: it is not trained.", stacklevel=3)


def _call_single_layer(objects: Sequence[Any]) -> Callable[[Any], PyTree]:
    layers = [item for item in objects if isinstance(item, keras.Layer)]

    def predict(batch: Any) -> PyTree:
        if len(layers) != 1:
            raise InvalidArgument(f"learner: {len(layers)} models do not tell what to predict; pass predict=, a batch function.")
        return layers[0](batch.x, training=False)

    return predict

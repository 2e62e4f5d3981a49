"""From an objective to a gradient, to a step, to a learner: a training algorithm as pure functions."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import keras
import optax
from jaxtyping import Array, Float, PyTree

from research.measures import Logs, Measures, output_shapes, shapes, targets
from research.objective import Objective, built, forward, keras_objective
from research.state import (
    Batch,
    Refused,
    State,
    current,
    in_order,
    mapped,
    model_metrics,
    rows,
    slot_names,
    values,
    variable_names,
)
from research.update import Gradients, Update, keras_update, loss_scale, optax_update

S = TypeVar("S")


@runtime_checkable
class Gradient(Protocol):
    """The gradient of a batch with respect to `state.trainable`; the other parts of the state move on."""

    def __call__(self, state: State, batch: Any) -> tuple[State, Gradients]:
        """The state after the forward pass, and the gradients."""
        ...


@runtime_checkable
class Step(Protocol[S]):
    """One step of a fold over batches, exactly what `jax.lax.scan` takes. Logs run since the last reset."""

    def __call__(self, state: S, batch: Any) -> tuple[S, Logs]:
        """The next state, and the logs so far."""
        ...


class Learner(NamedTuple):
    """A training algorithm as pure functions over its own state: a `State`, several of them, or a `State` and an environment.

    `init` makes the first state, `reset` empties its metrics, `train` and `evaluate` are steps, `predict` gives outputs. `names`
    is shaped like the state: what checkpoints, layouts and rules call each leaf.
    """

    init: Callable[[], Any]
    reset: Callable[[Any], Any]
    train: Step[Any]
    evaluate: Step[Any]
    predict: Callable[[Any, Any], PyTree]
    names: PyTree


def gradient(objective: Objective, scale: Callable[[State], Float[Array, ""]] | None = None) -> Gradient:
    """The gradient of an objective. `scale` multiplies the loss on the way back, against underflow in half precision.

    Gradients are of the loss itself: the scale is divided out again.

    >>> from research.objective import Aux
    >>> def half_square(state, batch, *, training):
    ...     return 0.5 * state.trainable**2, Aux(None, [], {}, jnp.ones(()))
    >>> _, gradients = gradient(half_square)(State(jnp.asarray(3.0), [], [], {}), None)
    >>> float(gradients.values), float(gradients.loss)
    (3.0, 4.5)
    """

    def of(state: State, batch: Any) -> tuple[State, Gradients]:
        factor = None if scale is None else scale(state)

        def scaled(trainable: PyTree) -> tuple[Array, Any]:
            loss, aux = objective(state._replace(trainable=trainable), batch, training=True)
            kept = (loss, aux.non_trainable, aux.metrics, aux.weight)
            return (loss if factor is None else loss * factor), kept

        grads, (loss, non_trainable, metrics, weight) = jax.grad(scaled, has_aux=True)(state.trainable)
        if factor is not None:
            grads = jax.tree.map(lambda g: g / factor, grads)
        return state._replace(non_trainable=non_trainable, metrics=metrics), Gradients(grads, loss, weight)

    return of


def step(gradient: Gradient, update: Update, measures: Measures, count: Callable[[Any], Any]) -> Step[State]:
    """The training step: gradient, update, and once per update the running loss, over `count(batch)` rows.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, measures = keras_objective(model, loss="mse")
    >>> update = keras_update(keras.optimizers.SGD(0.1), model.trainable_variables)
    >>> train = step(gradient(objective), update, measures, examples)
    >>> trainable = values(model.trainable_variables)
    >>> state = State(trainable, [], update.init(trainable), measures.init())
    >>> state, logs = train(state, Batch(jnp.ones((4, 1)), jnp.zeros((4, 1))))
    >>> float(logs["loss"]), [round(float(w.sum()), 6) for w in state.trainable]
    (1.0, [0.8, -0.2])
    """

    def train(state: State, batch: Any) -> tuple[State, Logs]:
        state, gradients = gradient(state, batch)
        state = update.apply(state, gradients)
        state = state._replace(metrics=measures.track(state.metrics, gradients.loss, count(batch)))
        return state, measures.result(state.metrics)

    return train


def examples(batch: Batch) -> Any:
    """The number of examples in a batch, padding not counted: what Keras weighs a batch's loss by.

    >>> examples(Batch(jnp.zeros((4, 2))))
    4
    """
    return rows(batch.x) if batch.valid is None else jnp.sum(batch.valid, dtype=jnp.float32)


def supervised(
    model: keras.Model,
    *,
    loss: Any = None,
    optimizer: Any = "rmsprop",
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
    example: Batch | None = None,
    gradient_transform: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Learner:
    """Supervised learning of a Keras model; the arguments are those of `model.compile`, the optimizer may be optax'.

    `gradient_transform` makes another gradient of the batch's before the update sees it: in parts, say, by
    `lambda gradient: accumulate(gradient, 4)`.

    `example`, a batch of arrays or of `jax.ShapeDtypeStruct`s, is needed where the model has no `keras.Input`, and where targets
    are shaped neither like the outputs nor, under a sparse loss, like the outputs without their last axis. Build order does
    not matter but for one thing: layers are frozen before, not after. Raises `Refused`, see `keras_objective` and
    `keras_update`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = supervised(model, loss="mse", optimizer=optax.sgd(1e-3), metrics=["mae"])
    >>> state, logs = jax.jit(learner.train)(learner.init(), Batch(jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> sorted(logs), learner.names.trainable
    (['loss', 'mae'], ['sequential/dense/kernel', 'sequential/dense/bias'])
    """
    objective, measures = keras_objective(
        model,
        loss=loss,
        metrics=metrics,
        weighted_metrics=weighted_metrics,
        loss_weights=loss_weights,
        example=example,
    )
    variables = model.trainable_variables
    if isinstance(optimizer, optax.GradientTransformation):
        update, scale = optax_update(optimizer, variables), None
    else:
        optimizer = _keras_optimizer(optimizer, model)
        update, scale = keras_update(optimizer, variables), loss_scale(optimizer)

    def init() -> State:
        trainable = values(variables)
        return State(trainable, values(model.non_trainable_variables), update.init(trainable), measures.init())

    def evaluate(state: State, batch: Batch) -> tuple[State, Logs]:
        loss, aux = objective(state, batch, training=False)
        held = measures.track(aux.metrics, loss, examples(batch))
        return state._replace(non_trainable=aux.non_trainable, metrics=held), measures.result(held)

    def predict(state: State, batch: Batch) -> PyTree:
        return forward(model, state, batch.x)

    def names() -> State:
        trainable = variable_names(variables)
        if isinstance(optimizer, keras.Optimizer):
            slots: PyTree = slot_names(optimizer, variables)
        else:
            slots = _transform_names(jax.eval_shape(update.init, [v.value for v in variables]), variables)
        held = {name: [f"{name}/{i}" for i in range(len(v))] for name, v in jax.eval_shape(measures.init).items()}
        return State(trainable, variable_names(model.non_trainable_variables), slots, held)

    return Learner(
        init=init,
        reset=lambda state: state._replace(metrics=measures.reset(state.metrics)),
        train=step(gradient_transform(gradient(objective, scale)), update, measures, examples),
        evaluate=evaluate,
        predict=predict,
        names=names(),
    )


def from_keras(model: keras.Model, example: Batch | None = None) -> Learner:
    """A compiled Keras model's own `train_step`, `test_step` and `predict_step`, verbatim, as a learner.

    A subclass' own steps, with Keras' JAX signature `train_step(self, state, data)`, run unchanged. The metrics are
    `model.metrics`, those of `compile` as one entry. A `Batch` reaches the steps as under `fit`: `(x, y)` or
    `(x, y, sample_weight)`; anything else as it is. `example` is needed where the model was not built yet or targets can't be
    told from the outputs, as in `supervised`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    >>> learner = from_keras(model)
    >>> state, logs = jax.jit(learner.train)(learner.init(), Batch(jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> sorted(logs)
    ['loss', 'mae']
    """
    if not model.compiled:
        raise Refused(
            f"model {model.name!r} is not compiled: call model.compile(...) first, or use research.supervised(model, ...)."
        )
    built(model, example)
    _measured(model, example)
    optimizer = model.optimizer
    update = None if optimizer is None else keras_update(optimizer, model.trainable_variables)
    metrics = model_metrics(model)

    def init() -> State:
        trainable = values(model.trainable_variables)
        slots = [] if update is None else update.init(trainable)
        held = {name: values(variables) for name, variables in metrics.items()}
        return State(trainable, values(model.non_trainable_variables), slots, held)

    def held(arrays: list[Array]) -> dict[str, list[Array]]:
        remaining = iter(arrays)
        return {name: [jnp.asarray(next(remaining)) for _ in variables] for name, variables in metrics.items()}

    def reset(state: State) -> State:
        before, variables = in_order(state.metrics, metrics), [v for each in metrics.values() for v in each]
        with keras.StatelessScope(mapped([(variables, before)])) as scope:
            model.reset_metrics()
            return state._replace(metrics=held(current(scope, variables, before)))

    def train(state: State, batch: Any) -> tuple[State, Logs]:
        parts = (state.trainable, state.non_trainable, state.optimizer, in_order(state.metrics, metrics))
        logs, (trainable, non_trainable, slots, moved) = model.train_step(parts, _data(batch))
        return State(trainable, non_trainable, slots, held(moved)), logs

    def evaluate(state: State, batch: Any) -> tuple[State, Logs]:
        parts = (state.trainable, state.non_trainable, in_order(state.metrics, metrics))
        logs, (trainable, non_trainable, moved) = model.test_step(parts, _data(batch))
        return state._replace(trainable=trainable, non_trainable=non_trainable, metrics=held(moved)), logs

    def predict(state: State, batch: Any) -> PyTree:
        outputs, _ = model.predict_step((state.trainable, state.non_trainable), _data(batch))
        return outputs

    names = State(
        variable_names(model.trainable_variables),
        variable_names(model.non_trainable_variables),
        [] if optimizer is None else slot_names(optimizer, model.trainable_variables),
        {name: [f"{name}/{i}" for i in range(len(variables))] for name, variables in metrics.items()},
    )
    return Learner(init, reset, train, evaluate, predict, names)


def _data(batch: Any) -> Any:
    """A batch as Keras' steps unpack it."""
    if not isinstance(batch, Batch):
        return batch
    if batch.valid is not None:
        raise Refused("from_keras: Keras' own steps can't leave padding out (Batch.valid): hand them batches without padding.")
    return keras.utils.pack_x_y_sample_weight(batch.x, batch.y, batch.sample_weight)


def _measured(model: keras.Model, example: Batch | None) -> None:
    """Lets a compiled model resolve its losses and metrics, which Keras does on the first batch."""
    unresolved = [metric for metric in model.metrics if not getattr(metric, "built", True)]
    if model.loss is None and not unresolved:
        return
    if example is None and not getattr(model, "inputs", None):  # only a model with an Input knows its own
        raise Refused(
            f"model {model.name!r} does not tell its inputs' shapes: pass example=Batch(x, y) with a batch of your data."
        )
    outputs = output_shapes(model, None if example is None else example.x)
    y = targets(outputs, model.loss) if example is None or example.y is None else shapes(example.y)
    x, weight = (None, None) if example is None else (shapes(example.x), shapes(example.sample_weight))

    def measure(held: list[Array], x: PyTree, y: PyTree, outputs: PyTree, weight: PyTree) -> None:
        with keras.StatelessScope(mapped([(model.variables, held)])):
            if model.loss is not None:
                model.compute_loss(x, y, outputs, weight)
            if unresolved:
                model.compute_metrics(x, y, outputs, weight)

    held = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.variables]
    with keras.StatelessScope():  # variables made in it get their values when it closes, outside the trace
        jax.eval_shape(measure, held, x, y, outputs, weight)


def _keras_optimizer(optimizer: Any, model: keras.Model) -> keras.Optimizer:
    """What `model.compile` makes of its `optimizer`: under mixed float16 with a dynamic loss scale."""
    try:
        optimizer = keras.optimizers.get(optimizer)
    except ValueError as error:
        near = difflib.get_close_matches(str(optimizer), [n for n in dir(keras.optimizers) if n[0].isupper()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "pass a name, a Keras optimizer or an optax transformation."
        raise Refused(f"optimizer: Keras knows no {optimizer!r}; {hint}") from error
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if model.dtype_policy.name == "mixed_float16" and not scaled:
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _transform_names(slots: PyTree, variables: Sequence[keras.Variable]) -> PyTree:
    """Names for an optax state: the path in it, with the weight's own name for the position of a leaf that belongs to one."""
    owners = variable_names(variables)

    def name(path: tuple[Any, ...], leaf: Any) -> str:
        last = path[-1] if path else None
        position = last.idx if isinstance(last, jax.tree_util.SequenceKey) else len(owners)
        owned = position < len(owners) and leaf.shape == tuple(variables[position].shape)
        where = jax.tree_util.keystr(path[:-1] if owned else path, simple=True, separator="/")
        return f"{where}/{owners[position]}" if owned else where

    return {"iterations": "iterations", "transform": jax.tree_util.tree_map_with_path(name, slots["transform"])}

"""A training algorithm as a tuple of pure functions, and the supervised one."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import keras
import optax
from jaxtyping import PyTree

from research.core.metrics import Logs, Metrics
from research.core.names import variable_names
from research.core.objective import Objective, forward, keras_objective
from research.core.state import Batch, InvalidArgument, Mapped, State, check_type, copy_values, scope_mapping
from research.core.step import Gradient, Step, gradient, num_examples, step
from research.core.update import as_update, update_names


class Learner(NamedTuple):
    """A training algorithm as pure functions over its own state `S`: a `State`, several of them, or any other tree of arrays.

    - `init() -> S` returns the initial state. No two leaves share a buffer, since training donates them.
    - `reset(S) -> S` empties the metrics; nothing else changes.
    - `train(S, batch) -> (S, logs)` is a training step, `evaluate(S, batch) -> (S, logs)` an evaluation step. Both return a state
      of the same structure, shapes and dtypes, and a dict of running values since the last reset. `evaluate` returns the weights
      unchanged.
    - `predict(S, batch) -> outputs` returns outputs whose first axis counts examples.
    - `names` has the structure of the state: a unique string per leaf, used by checkpoints, layouts and messages.
    - `state_mapping(S)` returns (Keras variable, array) pairs, one per variable whose value is in the state; empty for a learner
      without Keras objects. `write_back`, `part` and `joint` use it.
    - `targets` lists (Keras model, losses as for `compile`) pairs that compare a model's outputs with `Batch.y`: `research.train`
      and `research.evaluate` check labels by them. It may be empty.
    - `compile_args` is what `compile` of the first of these models takes for the same training by Keras' own `fit`, which
      `debugging.check` compares it with. None if Keras has no such training.

    `check_learner` verifies this contract for a learner written by hand.

    >>> def count(state, batch):
    ...     return state + 1, {"steps": state + 1}
    >>> counter = Learner(lambda: jnp.zeros((), int), lambda state: state, count, count, lambda state, batch: batch, "steps")
    >>> int(counter.train(counter.init(), None)[1]["steps"])
    1
    """

    init: Callable[[], Any]
    reset: Callable[[Any], Any]
    train: Step[Any]
    evaluate: Step[Any]
    predict: Callable[[Any, Any], PyTree]
    names: PyTree
    state_mapping: Callable[[Any], Mapped] = lambda state: []
    targets: tuple[tuple[keras.Model, Any], ...] = ()
    compile_args: dict[str, Any] | None = None


def _unchanged(function: Any) -> Any:
    return function


def supervised(
    model: keras.Model,
    *,
    loss: Any = None,
    optimizer: Any = "rmsprop",
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
    example: Batch | None = None,
    objective_transform: Callable[[Objective], Objective] = _unchanged,
    gradient_transform: Callable[[Gradient], Gradient] = _unchanged,
) -> Learner:
    """Returns supervised learning of a Keras model; the arguments are those of `model.compile`.

    `optimizer` may also be an optax transformation, or a function from the model's trainable variables to an `Update`, such as
    `research.transforms.by_path` returns.

    `objective_transform` changes what is minimised, before it is differentiated, for example `research.transforms.remat`;
    `gradient_transform` changes the gradient before the update, for example `lambda gradient: accumulate(gradient, 4)`.
    `example`, a batch of arrays or of `jax.ShapeDtypeStruct`s, is needed if the model has no `keras.Input`, or if a metric makes
    its variables from targets that are not shaped like the outputs. Freeze layers before this call. Raises `InvalidArgument`: see
    `keras_objective` and `keras_update`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = supervised(model, loss="mse", optimizer=optax.sgd(1e-3), metrics=["mae"])
    >>> state, logs = jax.jit(learner.train)(learner.init(), Batch(jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> sorted(logs), learner.names.trainable
    (['loss', 'mae'], ['sequential/dense/kernel', 'sequential/dense/bias'])
    """
    check_transforms("supervised", objective_transform, gradient_transform)
    objective, metric_state = keras_objective(
        model, loss=loss, metrics=metrics, weighted_metrics=weighted_metrics, loss_weights=loss_weights, example=example
    )
    optimizer = as_optimizer(optimizer, [model])
    learner = from_objective(
        objective,
        metric_state,
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer,
        predict=lambda state, batch: forward(model, state, batch.x),
        objective_transform=objective_transform,
        gradient_transform=gradient_transform,
    )
    compile_args = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, "loss_weights": loss_weights}
    transformed = (objective_transform, gradient_transform) != (_unchanged, _unchanged)
    as_in_keras = isinstance(optimizer, keras.Optimizer) and not transformed
    return learner._replace(
        targets=((model, loss),), compile_args={**compile_args, "optimizer": optimizer} if as_in_keras else None
    )


def from_objective(
    objective: Objective,
    metrics: Metrics,
    trainable: Sequence[keras.Variable],
    non_trainable: Sequence[keras.Variable],
    optimizer: Any,
    *,
    predict: Callable[[State, Any], PyTree],
    objective_transform: Callable[[Objective], Objective] = _unchanged,
    gradient_transform: Callable[[Gradient], Gradient] = _unchanged,
) -> Learner:
    """Returns the learner that minimises an objective over Keras variables; its state is a `State`.

    `trainable` and `non_trainable` are the variables behind `State.trainable` and `State.non_trainable`, in that order.
    `optimizer` is a Keras optimizer, an optax transformation, or a function from `trainable` to an `Update`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> objective, metrics = research.keras_objective(model, loss="mse")
    >>> weights, predict = model.trainable_variables, lambda state, batch: forward(model, state, batch.x)
    >>> learner = from_objective(objective, metrics, weights, [], keras.optimizers.SGD(), predict=predict)
    >>> learner.names.optimizer
    ['iteration', 'learning_rate']
    """
    update = as_update(optimizer, trainable)
    objective = objective_transform(objective)

    def init() -> State:
        weights = copy_values(trainable)
        return State(weights, copy_values(non_trainable), update.init(weights), metrics.init())

    def evaluate(state: State, batch: Any) -> tuple[State, Logs]:
        loss, aux = objective(state, batch, training=False)
        after = metrics.track_loss(aux.metrics, loss, num_examples(batch))
        return state._replace(non_trainable=aux.non_trainable, metrics=after), metrics.result(after)

    def names() -> State:
        metric_names = {name: [f"{name}/{i}" for i in range(len(group))] for name, group in metrics.variables.items()}
        return State(variable_names(trainable), variable_names(non_trainable), update_names(update, trainable), metric_names)

    def state_mapping(state: State) -> Mapped:
        values = [(group, state.metrics[name]) for name, group in metrics.variables.items()]
        return scope_mapping([(trainable, state.trainable), (non_trainable, state.non_trainable), *values])

    return Learner(
        init=init,
        reset=lambda state: state._replace(metrics=metrics.reset(state.metrics)),
        train=step(gradient_transform(gradient(objective, update.loss_scale)), update, metrics, num_examples),
        evaluate=evaluate,
        predict=predict,
        names=names(),
        state_mapping=state_mapping,
    )


def prediction_shapes(learner: Learner, state: Any, batch: Any) -> PyTree | None:
    """Returns the shapes of a learner's predictions for a training batch; None if `predict` takes others, as a GAN's latents.

    >>> double = Learner(list, list, lambda s, b: (s, {}), lambda s, b: (s, {}), lambda state, batch: 2 * batch["x"], [])
    >>> prediction_shapes(double, [], {"x": jnp.ones(3)}).shape, prediction_shapes(double, [], {"y": jnp.ones(3)})
    ((3,), None)
    """
    try:
        return jax.eval_shape(learner.predict, state, batch)
    except Exception:  # code of the user's raises what it likes for a batch that it does not expect
        return None


def check_transforms(function: str, objective_transform: Any, gradient_transform: Any) -> None:
    """Raises `InvalidArgument` for what is not a function, in an argument of `function`.

    >>> check_transforms("supervised", None, lambda gradient: gradient)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: supervised: objective_transform is None, expected a function from an objective to an ...
    """
    check_type(objective_transform, Callable, f"{function}: objective_transform", "a function from an objective to an objective")
    check_type(gradient_transform, Callable, f"{function}: gradient_transform", "a function from a gradient to a gradient")


def as_optimizer(optimizer: Any, models: Sequence[Any]) -> Any:
    """Returns what `model.compile` makes of its `optimizer`: with dynamic loss scaling if a model is mixed float16.

    An optax transformation and a function from variables to an `Update` stay what they are. Raises `InvalidArgument` for another
    type, and for a name that Keras does not know.

    >>> type(as_optimizer("adam", [])).__name__
    'Adam'
    """
    function = callable(optimizer) and not isinstance(optimizer, type)
    if isinstance(optimizer, optax.GradientTransformation) or function:
        return optimizer
    expected = "a name, a Keras optimizer such as keras.optimizers.Adam(), or one of optax such as optax.adam(1e-3)"
    check_type(optimizer, (str, dict, keras.Optimizer), "optimizer", expected)
    try:
        optimizer = keras.optimizers.get(optimizer)
    except ValueError as error:
        near = difflib.get_close_matches(str(optimizer), [n for n in dir(keras.optimizers) if n[0].isupper()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "pass a name, a Keras optimizer or an optax transformation."
        raise InvalidArgument(f"optimizer: Keras knows no {optimizer!r}; {hint}") from error
    half = any(isinstance(m, keras.Layer) and m.dtype_policy.name == "mixed_float16" for m in models)
    if half and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer

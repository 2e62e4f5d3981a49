"""Keras and optax optimizers as one tuple of pure functions."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import optax
from jaxtyping import Array, Float, Int, PyTree

from research.core.names import slot_names, transform_names, variable_names
from research.core.state import InvalidArgument, State, check_type, copy_leaves, copy_values, scope_mapping
from research.core.tags import LEARNING_RATE, tag


class Gradients(NamedTuple):
    """The gradient of a mean loss with respect to `State.trainable`, the loss, and the denominator of the mean (`weight`).

    >>> Gradients([jnp.ones(2)], jnp.zeros(()), jnp.ones(())).values
    [Array([1., 1.], dtype=float32)]
    """

    values: PyTree
    loss: Float[Array, ""]
    weight: Float[Array, ""]


class Update(NamedTuple):
    """An optimizer as pure functions on a `State`.

    `init(trainable)` returns `State.optimizer`. `apply(state, gradients, evaluate)` updates `trainable` and `optimizer`;
    `evaluate(trainable)` returns the `Gradients` of the same batch at other weights, for an optimizer that asks for them, and may
    be left out otherwise. `iterations` reads the number of updates so far, `learning_rate` the rate of the next update (None if
    the optimizer has none to read). Read them with these functions, never by index.

    `names(variables, names)` returns the names of the leaves of `State.optimizer`, from the Keras variables behind
    `State.trainable` and their names; None names them by their paths. `loss_scale` reads the factor that the loss is to be
    scaled by, which `apply` expects to have been divided out of the gradients again; None if there is none.

    >>> optax_update(optax.sgd(0.5)).init([jnp.ones(1)])["iterations"].item()
    0
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[..., State]
    iterations: Callable[[State], Int[Array, ""]]
    learning_rate: Callable[[State], Float[Array, ""] | None]
    names: Callable[[Sequence[keras.Variable], Sequence[str]], PyTree] | None = None
    loss_scale: Callable[[State], Float[Array, ""]] | None = None


def as_update(optimizer: Any, variables: Sequence[keras.Variable]) -> Update:
    """Returns the `Update` of variables by a Keras optimizer, an optax transformation, or a function from variables to that.

    Raises `InvalidArgument` for a function that returns something else.

    >>> as_update(optax.sgd(0.5), []).init([])["iterations"].item()
    0
    >>> as_update(lambda variables: None, [])
    Traceback (most recent call last):
    research.core.state.InvalidArgument: optimizer: what the function returned is None, expected a research.Update of ...
    """
    if isinstance(optimizer, keras.Optimizer):
        return keras_update(optimizer, variables)
    if isinstance(optimizer, optax.GradientTransformation):
        return optax_update(optimizer, variables)
    update = optimizer(list(variables))
    if isinstance(update, keras.Optimizer | optax.GradientTransformation):
        raise InvalidArgument(
            "optimizer: the function was called with the variables and returned an optimizer, expected a research.Update. "
            "Give the optimizer itself, such as keras.optimizers.Adam() or optax.adam(1e-3)."
        )
    check_type(update, Update, "optimizer: what the function returned", "a research.Update of the variables")
    return update


def update_names(update: Update, variables: Sequence[keras.Variable], names: Sequence[str] | None = None) -> PyTree:
    """Returns a name for each leaf of an update's state. `names` are those of the variables, by default `variable_names`.

    >>> weights = [keras.Variable([1.0, 2.0], name="kernel")]
    >>> jax.tree.leaves(update_names(optax_update(optax.trace(0.9)), weights))
    ['iterations', 'trace/kernel']
    """
    names = variable_names(variables) if names is None else names
    if update.names is not None:
        return update.names(variables, names)
    return transform_names(jax.eval_shape(update.init, [v.value for v in variables]), variables, names)


def keras_update(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> Update:
    """Returns a Keras optimizer over a model's trainable variables: its `stateless_apply`, bit for bit.

    Builds the optimizer if it is not built yet. Raises `InvalidArgument` if it was built for other variables.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> update = keras_update(keras.optimizers.SGD(0.5), model.trainable_variables)
    >>> state = State([jnp.ones((1, 1))], [], update.init([jnp.ones((1, 1))]), {})
    >>> state = update.apply(state, Gradients([jnp.ones((1, 1))], jnp.ones(()), jnp.ones(())))
    >>> float(state.trainable[0][0, 0]), int(update.iterations(state)), float(update.learning_rate(state))
    (0.5, 1, 0.5)
    """
    variables = list(variables)
    if optimizer.built:
        _check_known(optimizer, variables)
    else:
        optimizer.build(variables)
    scale = loss_scale(optimizer)

    def apply(state: State, gradients: Gradients, evaluate: Callable[[PyTree], Gradients] | None = None) -> State:
        tag(learning_rate(state), LEARNING_RATE)
        grads = gradients.values
        if scale is not None:  # Keras' optimizer divides by the scale itself
            factor = scale(state)
            grads = [g * factor for g in grads]
        try:
            trainable, slots = optimizer.stateless_apply(state.optimizer, grads, state.trainable)
        except ValueError as error:
            if type(error) is not ValueError:  # JAX' own errors are subclasses
                raise
            raise _built_for_others(optimizer, variables) from error
        return state._replace(trainable=list(trainable), optimizer=[jnp.asarray(s) for s in slots])

    def iterations(state: State) -> Int[Array, ""]:
        with keras.StatelessScope(scope_mapping([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.iterations)

    def learning_rate(state: State) -> Float[Array, ""]:
        with keras.StatelessScope(scope_mapping([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.learning_rate, jnp.float32)

    return Update(
        init=lambda trainable: copy_values(optimizer.variables),
        apply=apply,
        iterations=iterations,
        learning_rate=learning_rate,
        names=lambda variables, names: slot_names(optimizer, variables, names),
        loss_scale=scale,
    )


def optax_update(transformation: optax.GradientTransformation, variables: Sequence[keras.Variable] = ()) -> Update:
    """Returns an optax transformation as an `Update` that counts updates itself: not every transformation does.

    `variables` are the Keras variables behind `State.trainable`; if given, their constraints are applied after each update, as
    Keras' own optimizers do. A transformation gets those of optax' extra arguments that it takes: `value` (the loss) and `grad`;
    `value_fn`, `obj_fn` (the loss as a function of the weights) and `grad_fn` (its gradient), where `apply` is given `evaluate`.
    `optax.lbfgs`, line searches, `optax.contrib.sam` and `sophia` need them. The learning rate can be read and set if it is a
    hyper-parameter (`optax.inject_hyperparams`).

    >>> update = optax_update(optax.sgd(0.5))
    >>> state = State([jnp.ones(1)], [], update.init([jnp.ones(1)]), {})
    >>> state = update.apply(state, Gradients([jnp.ones(1)], jnp.ones(()), jnp.ones(())))
    >>> state.trainable, int(update.iterations(state)), update.learning_rate(state)
    ([Array([0.5], dtype=float32)], 1, None)
    """
    constraints = [variable.constraint for variable in variables]
    transformation = optax.with_extra_args_support(transformation)

    def init(trainable: PyTree) -> PyTree:
        transform = copy_leaves(transformation.init(trainable))  # may hold the weights themselves, or one array twice
        return {"iterations": jnp.zeros((), jnp.int32), "transform": transform}

    def apply(state: State, gradients: Gradients, evaluate: Callable[[PyTree], Gradients] | None = None) -> State:
        before, arguments = state.optimizer["transform"], _objective_arguments(gradients, evaluate)
        updates, transform = _transform(transformation, gradients.values, before, state.trainable, arguments)
        trainable = optax.apply_updates(state.trainable, updates)
        if any(constraints):
            trainable = [w if c is None else c(w) for c, w in zip(constraints, trainable, strict=True)]
        slots = {"iterations": state.optimizer["iterations"] + 1, "transform": transform}
        after = state._replace(trainable=trainable, optimizer=slots)
        tag(learning_rate(after), LEARNING_RATE)  # a schedule is evaluated in the update
        return after

    def learning_rate(state: State) -> Float[Array, ""] | None:
        # A schedule's own state has the name too.
        rate = optax.tree.get(
            state.optimizer["transform"], "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
        )
        return None if rate is None else jnp.asarray(rate, jnp.float32)

    return Update(init, apply, lambda state: state.optimizer["iterations"], learning_rate)


def _objective_arguments(gradients: Gradients, evaluate: Callable[[PyTree], Gradients] | None) -> dict[str, Any]:
    """Returns the arguments that optax' transformations may ask for, by optax' names."""
    arguments: dict[str, Any] = {"value": gradients.loss, "grad": gradients.values}
    if evaluate is None:
        return arguments

    @jax.custom_jvp
    def loss(trainable: PyTree) -> Array:
        return evaluate(trainable).loss

    @loss.defjvp
    def differentiate(primals: Any, tangents: Any) -> tuple[Array, Array]:  # by the gradient at hand, not through its computation
        here = evaluate(*primals)
        return here.loss, optax.tree.vdot(here.values, *tangents).astype(here.loss.dtype)

    def value_fn(trainable: PyTree, *, obj_fn: Any = None, grad_fn: Any = None) -> Array:  # a line search hands all of these on
        return loss(trainable)

    return {**arguments, "value_fn": value_fn, "obj_fn": loss, "grad_fn": lambda trainable, _: evaluate(trainable).values}


def _transform(transformation: Any, grads: PyTree, slots: PyTree, trainable: PyTree, arguments: dict[str, Any]) -> Any:
    """Calls `transformation.update` without those arguments that it, or one inside it, does not take."""
    try:
        return transformation.update(grads, slots, trainable, **arguments)
    except TypeError as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected is None or unexpected[1] not in arguments:
            raise
        fewer = {name: value for name, value in arguments.items() if name != unexpected[1]}
    return _transform(transformation, grads, slots, trainable, fewer)


def loss_scale(optimizer: keras.Optimizer) -> Callable[[State], Float[Array, ""]] | None:
    """Returns a function from a state to the factor that a Keras optimizer scales the loss by; None if it does not scale.

    >>> loss_scale(keras.optimizers.SGD()) is None
    True
    >>> scaled = keras.optimizers.SGD(loss_scale_factor=8.0)
    >>> scaled.build([])
    >>> float(loss_scale(scaled)(State([], [], [v.value for v in scaled.variables], {})))
    8.0
    """
    if optimizer.loss_scale_factor is None and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return None

    def scale(state: State) -> Float[Array, ""]:
        with keras.StatelessScope(scope_mapping([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.scale_loss(jnp.ones(())))

    return scale


def set_learning_rate(state: State, value: Any, optimizer: keras.Optimizer | None = None) -> State:
    """Returns the state with another learning rate, in effect from the next update on.

    Assigning to `optimizer.learning_rate` does not change a state. This writes the variable of a Keras `optimizer`, or optax'
    hyper-parameter if `optimizer` is None. Raises `InvalidArgument` if a schedule sets the rate.

    >>> update = optax_update(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    >>> state = State([jnp.ones(1)], [], update.init([jnp.ones(1)]), {})
    >>> float(update.learning_rate(set_learning_rate(state, 0.1)))
    0.10000000149011612
    """
    advice = "give the optimizer a number, not a schedule"
    if optimizer is None:
        slots = state.optimizer
        if optax.tree.get(slots, "learning_rate") is None:
            raise InvalidArgument(
                "set_learning_rate: this optax transformation has no learning rate in its state: "
                "wrap it with optax.inject_hyperparams(...)(learning_rate=...)."
            )
        return state._replace(optimizer=optax.tree.set(slots, learning_rate=jnp.asarray(value, jnp.float32)))
    rate = optimizer.learning_rate
    positions = [i for i, variable in enumerate(optimizer.variables) if variable is rate]
    if not positions:
        raise InvalidArgument(f"set_learning_rate: {optimizer.name!r} follows a schedule, so its rate cannot be set: {advice}.")
    slots = list(state.optimizer)
    slots[positions[0]] = jnp.asarray(value, slots[positions[0]].dtype)
    return state._replace(optimizer=slots)


def _built_for_others(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> InvalidArgument:
    """Returns an error: slots are matched by position, so an optimizer built for other variables would swap them silently."""
    return InvalidArgument(
        f"optimizer {optimizer.name!r}: it was built for other variables than the model's {len(variables)} trainable ones "
        "(were layers frozen, unfrozen or added since?): build the model first, then make a new optimizer."
    )


def _check_known(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Raises `InvalidArgument` unless the optimizer accepts these variables: it knows which ones it was built for."""
    inner = optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer

    def probe(grads: list[Array]) -> None:
        with keras.StatelessScope():
            inner.apply(grads, variables)

    try:
        jax.eval_shape(probe, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables])
    except ValueError as error:
        raise _built_for_others(optimizer, variables) from error

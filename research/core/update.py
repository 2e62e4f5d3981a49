"""Optimizers of Keras and of optax as one small tuple of pure functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import optax
from jaxtyping import Array, Float, Int, PyTree

from research.state import Refused, State, mapped, values


class Gradients(NamedTuple):
    """The gradient of a mean loss with respect to `State.trainable`, that loss, and the weight that the mean stands for."""

    values: PyTree
    loss: Float[Array, ""]
    weight: Float[Array, ""]


class Update(NamedTuple):
    """How gradients change a state.

    `init` gives the optimizer's part of a new state, `apply` moves `trainable` and `optimizer`. Counts and rates are read with
    `iterations` (updates done) and `learning_rate` (of the next update; None where the optimizer has none to read), never by
    index.
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[State, Gradients], State]
    iterations: Callable[[State], Int[Array, ""]]
    learning_rate: Callable[[State], Float[Array, ""] | None]


def keras_update(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> Update:
    """A Keras optimizer over a model's trainable variables: its `stateless_apply`, bit for bit.

    Builds the optimizer where it is not built yet. Raises `Refused` where it was built for other variables.

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

    def apply(state: State, gradients: Gradients) -> State:
        grads = gradients.values
        if scale is not None:  # Keras' optimizer divides by the scale itself
            factor = scale(state)
            grads = [g * factor for g in grads]
        try:
            trainable, slots = optimizer.stateless_apply(state.optimizer, grads, state.trainable)
        except ValueError as error:
            raise _built_for_others(optimizer, variables) from error
        return state._replace(trainable=list(trainable), optimizer=[jnp.asarray(s) for s in slots])

    def iterations(state: State) -> Int[Array, ""]:
        with keras.StatelessScope(mapped([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.iterations)

    def learning_rate(state: State) -> Float[Array, ""]:
        with keras.StatelessScope(mapped([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.learning_rate, jnp.float32)

    return Update(
        init=lambda trainable: values(optimizer.variables),
        apply=apply,
        iterations=iterations,
        learning_rate=learning_rate,
    )


def optax_update(transformation: optax.GradientTransformation, variables: Sequence[keras.Variable] = ()) -> Update:
    """An optax transformation as an `Update`, with a count of its own: not every transformation keeps one.

    `variables`, where given, are the Keras variables behind `State.trainable`: their constraints hold after each update, as
    with Keras' own optimizers. A transformation that asks for the loss (`optax.contrib.reduce_on_plateau`) gets it as `value`.
    The learning rate can be read (and set) where it is a hyper-parameter
    (`optax.inject_hyperparams`).

    >>> update = optax_update(optax.sgd(0.5))
    >>> state = State([jnp.ones(1)], [], update.init([jnp.ones(1)]), {})
    >>> state = update.apply(state, Gradients([jnp.ones(1)], jnp.ones(()), jnp.ones(())))
    >>> state.trainable, int(update.iterations(state)), update.learning_rate(state)
    ([Array([0.5], dtype=float32)], 1, None)
    """
    constraints = [variable.constraint for variable in variables]
    transformation = optax.with_extra_args_support(transformation)

    def init(trainable: PyTree) -> PyTree:
        return {"iterations": jnp.zeros((), jnp.int32), "transform": transformation.init(trainable)}

    def apply(state: State, gradients: Gradients) -> State:
        before = state.optimizer["transform"]
        updates, transform = transformation.update(gradients.values, before, state.trainable, value=gradients.loss)
        trainable = optax.apply_updates(state.trainable, updates)
        if any(constraints):
            trainable = [w if c is None else c(w) for c, w in zip(constraints, trainable, strict=True)]
        slots = {"iterations": state.optimizer["iterations"] + 1, "transform": transform}
        return state._replace(trainable=trainable, optimizer=slots)

    def learning_rate(state: State) -> Float[Array, ""] | None:
        rate = optax.tree.get(state.optimizer["transform"], "learning_rate")
        return None if rate is None else jnp.asarray(rate, jnp.float32)

    return Update(init, apply, lambda state: state.optimizer["iterations"], learning_rate)


def loss_scale(optimizer: keras.Optimizer) -> Callable[[State], Float[Array, ""]] | None:
    """The factor that a Keras optimizer wants the loss multiplied by, read from the threaded state; None where there is none.

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
        with keras.StatelessScope(mapped([(optimizer.variables, state.optimizer)])):
            return jnp.asarray(optimizer.scale_loss(jnp.ones(())))

    return scale


def set_learning_rate(state: State, value: Any, optimizer: keras.Optimizer | None = None) -> State:
    """The same state with another learning rate from the next update on.

    Assigning to `optimizer.learning_rate` does not reach a threaded state, so it is written here: into the variable of a Keras
    `optimizer`, or into optax's hyper-parameter where `optimizer` is None. Raises `Refused` where a schedule decides.

    >>> update = optax_update(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
    >>> state = State([jnp.ones(1)], [], update.init([jnp.ones(1)]), {})
    >>> float(update.learning_rate(set_learning_rate(state, 0.1)))
    0.10000000149011612
    """
    advice = "give the optimizer a number, not a schedule"
    if optimizer is None:
        slots = state.optimizer
        if optax.tree.get(slots, "learning_rate") is None:
            raise Refused(
                "set_learning_rate: this optax transformation has no learning rate in its state: "
                "wrap it with optax.inject_hyperparams(...)(learning_rate=...)."
            )
        return state._replace(optimizer=optax.tree.set(slots, learning_rate=jnp.asarray(value, jnp.float32)))
    rate = optimizer.learning_rate
    positions = [i for i, variable in enumerate(optimizer.variables) if variable is rate]
    if not positions:
        raise Refused(f"set_learning_rate: {optimizer.name!r} follows a schedule, its rate can't be set: {advice}.")
    slots = list(state.optimizer)
    slots[positions[0]] = jnp.asarray(value, slots[positions[0]].dtype)
    return state._replace(optimizer=slots)


def _built_for_others(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> Refused:
    """Slots go by position: an optimizer that was built for other variables would silently swap them."""
    return Refused(
        f"optimizer {optimizer.name!r}: it was built for other variables than the model's {len(variables)} trainable ones "
        "(were layers frozen, unfrozen or added since?): build the model first, then make a new optimizer."
    )


def _check_known(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> None:
    """Asks the optimizer to update these very variables, for the shapes alone: it knows which ones it was built for."""
    inner = optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer

    def probe(grads: list[Array]) -> None:
        with keras.StatelessScope():
            inner.apply(grads, variables)

    try:
        jax.eval_shape(probe, [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables])
    except ValueError as error:
        raise _built_for_others(optimizer, variables) from error

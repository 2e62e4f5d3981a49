"""From an objective to a gradient, and from a gradient to a training step."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in a docstring)
from jaxtyping import Array, Float, PyTree

from research.core.metrics import Logs, Metrics
from research.core.objective import Objective
from research.core.state import Batch, State, num_rows
from research.core.tags import GRADIENT, tag
from research.core.update import Gradients, Update

S = TypeVar("S")


@runtime_checkable
class Gradient(Protocol):
    """The gradient of a batch's loss with respect to `state.trainable`; updates `non_trainable` and `metrics` on the way.

    >>> isinstance(lambda state, batch: (state, None), Gradient)
    True
    """

    def __call__(self, state: State, batch: Any) -> tuple[State, Gradients]:
        """Returns the state after the forward pass, and the gradients."""


@runtime_checkable
class Step(Protocol[S]):
    """One step of a fold over batches, in the form that `jax.lax.scan` takes. Logs are running values since the last reset.

    >>> isinstance(lambda state, batch: (state, {}), Step)
    True
    """

    def __call__(self, state: S, batch: Any) -> tuple[S, Logs]:
        """Returns the next state and the logs."""


def gradient(objective: Objective, scale: Callable[[State], Float[Array, ""]] | None = None) -> Gradient:
    """Returns the gradient of an objective.

    `scale(state)` multiplies the loss for the backward pass, against underflow in half precision, and is divided out of the
    gradients again.

    >>> from research.core.objective import Aux
    >>> def half_square(state, batch, *, training):
    ...     return 0.5 * state.trainable**2, Aux(None, [], {}, jnp.ones(()))
    >>> _, gradients = gradient(half_square)(State(jnp.asarray(3.0), [], [], {}), None)
    >>> float(gradients.values), float(gradients.loss)
    (3.0, 4.5)
    """

    def objective_gradient(state: State, batch: Any) -> tuple[State, Gradients]:
        factor = None if scale is None else scale(state)

        def scaled_loss(trainable: PyTree) -> tuple[Array, Any]:
            loss, aux = objective(state._replace(trainable=trainable), batch, training=True)
            return (loss if factor is None else loss * factor), (loss, aux.non_trainable, aux.metrics, aux.weight)

        grads, (loss, non_trainable, metrics, weight) = jax.grad(scaled_loss, has_aux=True)(state.trainable)
        if factor is not None:
            grads = jax.tree.map(lambda g: g / factor, grads)
        return state._replace(non_trainable=non_trainable, metrics=metrics), Gradients(grads, loss, weight)

    return objective_gradient


def step(gradient: Gradient, update: Update, metrics: Metrics, count: Callable[[Any], Any]) -> Step[State]:
    """Returns the training step: gradient, update, then the running loss, weighted by `count(batch)` rows.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, metrics = research.keras_objective(model, loss="mse")
    >>> update = research.keras_update(keras.optimizers.SGD(0.1), model.trainable_variables)
    >>> train = step(gradient(objective), update, metrics, num_examples)
    >>> weights = [jnp.copy(variable.value) for variable in model.trainable_variables]
    >>> state = State(weights, [], update.init(weights), metrics.init())
    >>> state, logs = train(state, Batch(jnp.ones((4, 1)), jnp.zeros((4, 1))))
    >>> float(logs["loss"]), [round(float(w.sum()), 6) for w in state.trainable]
    (1.0, [0.8, -0.2])
    """

    def train(state: State, batch: Any) -> tuple[State, Logs]:
        def evaluate(trainable: PyTree, before: State = state) -> Gradients:
            return gradient(before._replace(trainable=trainable), batch)[1]

        state, gradients = gradient(state, batch)
        tag(gradients.values, GRADIENT)
        state = update.apply(state, gradients, evaluate)
        state = state._replace(metrics=metrics.track_loss(state.metrics, gradients.loss, count(batch)))
        return state, metrics.result(state.metrics)

    return train


def num_examples(batch: Any) -> Any:
    """Returns the number of examples in a batch, without padding: what Keras weights a batch's loss by.

    For anything but a `Batch` that is the size of the first axis of the first leaf.

    >>> num_examples(Batch(jnp.zeros((4, 2)))), num_examples({"pixels": jnp.zeros((3, 2))})
    (4, 3)
    """
    if not isinstance(batch, Batch):
        return num_rows(batch)
    return num_rows(batch.x) if batch.valid is None else jnp.sum(batch.valid, dtype=jnp.float32)

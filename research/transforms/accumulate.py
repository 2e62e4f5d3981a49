"""The gradient of a large batch from several micro-batches."""

from typing import Any

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in the docstring)
import numpy as np

from research.core.state import InvalidArgument, State, check_type, num_rows
from research.core.step import Gradient
from research.core.update import Gradients


def accumulate(gradient: Gradient, parts: int) -> Gradient:
    """Returns a gradient that splits the batch into `parts` equal micro-batches: for batches too large for the memory.

    Micro-batch i takes the examples i, i + parts, i + 2 * parts, ...: of a batch that is sharded over devices, each device holds
    an equal share of every micro-batch. Losses and gradients are averaged with the weights that their means stand for
    (`Aux.weight`). With one loss that is a mean the result equals that of the complete batch to rounding. With a loss that is a
    sum, or several losses with different weights, it is the mean over rows. Activity regularization is weighted like the loss.
    BatchNormalization and Dropout see micro-batches. There is one update per batch: schedules, moving averages and `iterations`
    count batches.

    Raises `InvalidArgument` if `parts` is no positive integer, or does not divide the number of examples.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, metrics = research.keras_objective(model, loss="mse")
    >>> state = State([v.value for v in model.trainable_variables], [], [], metrics.init())
    >>> batch = research.Batch(jnp.arange(4.0)[:, None], jnp.zeros((4, 1)))
    >>> _, gradients = accumulate(research.gradient(objective), 2)(state, batch)
    >>> float(gradients.loss), float(gradients.weight), [float(g.sum()) for g in gradients.values]
    (3.5, 4.0, [7.0, 3.0])
    """
    check_type(parts, (int, np.integer), "accumulate: parts", "a positive integer")
    if parts < 1:
        raise InvalidArgument(f"accumulate: parts is {parts}, expected a positive integer.")

    def accumulated(state: State, batch: Any) -> tuple[State, Gradients]:
        examples = num_rows(batch)
        if examples % parts:
            raise InvalidArgument(
                f"accumulate: a batch of {examples} examples cannot be split into {parts} equal micro-batches: "
                f"choose a divisor of {examples}."
            )
        micro_batches = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), batch)

        def add(carry: tuple[State, Gradients], batch: Any) -> tuple[tuple[State, Gradients], None]:
            state, sums = carry
            state, (values, loss, weight) = gradient(state, batch)
            values = jax.tree.map(lambda s, g: s + g * jnp.asarray(weight, g.dtype), sums.values, values)
            return (state, Gradients(values, sums.loss + loss * weight, sums.weight + weight)), None

        _, shapes = jax.eval_shape(gradient, state, jax.tree.map(lambda leaf: leaf[0], micro_batches))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (state, sums), _ = jax.lax.scan(add, (state, zeros), micro_batches)
        values = jax.tree.map(lambda s: s / jnp.asarray(sums.weight, s.dtype), sums.values)
        return state, Gradients(values, sums.loss / sums.weight, sums.weight)

    return accumulated

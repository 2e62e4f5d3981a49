"""Gradients of bounded norm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.state import InvalidArgument, State, check_type
from research.core.step import Gradient
from research.core.update import Gradients


def clip(gradient: Gradient, max_norm: float | int) -> Gradient:
    """Returns a gradient that is scaled down to a global norm of `max_norm` where it is longer (Pascanu et al., 2013).

    The norm is over all weights together, in float32. It is what `optax.clip_by_global_norm` does, for any optimizer and before
    anything else that the optimizer does, such as its moving averages; `global_clipnorm` of Keras' optimizers is the same.
    Raises `InvalidArgument` unless `max_norm` is positive.

    >>> def constant(state, batch):
    ...     return state, Gradients([jnp.array([3.0, 4.0])], jnp.zeros(()), jnp.ones(()))
    >>> clip(constant, 1.0)(State([], [], [], {}), None)[1].values[0].round(6).tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    check_positive(max_norm, "clip: max_norm")

    def clipped(state: State, batch: Any) -> tuple[State, Gradients]:
        state, gradients = gradient(state, batch)
        return state, gradients._replace(values=scale_to_norm(gradients.values, max_norm))

    return clipped


def scale_to_norm(values: Any, max_norm: float | int) -> Any:
    """Returns a tree of arrays, scaled down to a global norm of `max_norm` if it is longer.

    >>> scale_to_norm([jnp.array([0.0, 2.0])], 1.0)
    [Array([0., 1.], dtype=float32)]
    """
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), values))
    factor = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), values)


def check_positive(value: Any, what: str) -> None:
    """Raises `InvalidArgument` unless a value is a positive finite number.

    >>> check_positive(0, "clip: max_norm")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: clip: max_norm is 0, expected a positive number.
    """
    check_type(value, (int, float, np.number), what, "a positive number")
    if not 0 < value < float("inf"):
        raise InvalidArgument(f"{what} is {value}, expected a positive number.")

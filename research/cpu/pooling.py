"""Max-pooling on the CPU: the same bits several times as fast.

XLA's CPU compiler walks the windows of a pooling one by one, and once more on the way back. Where windows lie side by side the
same is a maximum over two axes, and the gradient goes to the first place in each window that holds it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def replacement(equation: Any) -> Callable[[Array], Array] | None:
    """What computes an equation that is a max-pooling, or the way back of one, of windows that neither overlap nor leave gaps.

    None for any other equation.
    """
    params = equation.params
    if equation.primitive.name not in _REPLACED or params["window_dimensions"] != params["window_strides"]:
        return None
    dilated = any(n != 1 for n in (*params.get("base_dilation", ()), *params.get("window_dilation", ())))
    selected = params.get("select_prim")
    if dilated or any(map(any, params["padding"])) or (selected is not None and selected.name != "ge"):
        return None
    return functools.partial(_REPLACED[equation.primitive.name], window=params["window_dimensions"])


def _windows(x: Array, window: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Every axis as windows and places in them, what is left at the end cut off; and which axes are places."""
    whole = [n // k for n, k in zip(x.shape, window, strict=True)]
    cut = jax.lax.slice(x, [0] * x.ndim, [n * k for n, k in zip(whole, window, strict=True)])
    return cut.reshape([n for pair in zip(whole, window, strict=True) for n in pair]), tuple(range(1, 2 * x.ndim, 2))


def _maximum(x: Array, window: tuple[int, ...]) -> Array:
    cut, places = _windows(x, window)
    return jax.lax.reduce_max(cut, places)


def _back(gradient: Array, x: Array, window: tuple[int, ...]) -> Array:
    """The gradient at the first place in each window that holds its maximum, zero elsewhere."""
    cut, places = _windows(x, window)
    largest = jax.lax.reduce_max(cut, places)
    size = math.prod(window)
    first_is_most = jnp.arange(size, 0, -1, dtype=jnp.int8 if size < 128 else jnp.int32)
    rank = first_is_most.reshape([k for n in window for k in (1, n)])
    score = jnp.where(cut == jnp.expand_dims(largest, places), rank, jnp.zeros((), rank.dtype))
    held = score == jnp.expand_dims(jax.lax.reduce_max(score, places), places)
    spread = jnp.where(held, jnp.expand_dims(gradient, places), jnp.zeros((), gradient.dtype))
    whole = spread.reshape([n * k for n, k in zip(gradient.shape, window, strict=True)])
    return jnp.pad(whole, [(0, n - m) for n, m in zip(x.shape, whole.shape, strict=True)])


_REPLACED: dict[str, Callable[..., Array]] = {"reduce_window_max": _maximum, "select_and_scatter_add": _back}

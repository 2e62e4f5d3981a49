"""Max-pooling on the CPU, with the same bits in a fraction of the time.

XLA's CPU compiler visits the windows of a pooling one by one, in the forward and in the backward pass. Where windows neither
overlap nor leave gaps, the forward pass is a maximum over reshaped axes, and the backward pass adds the gradient to the first
maximum of each window.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.cpu.separate import compile_separately
from research.transforms.jaxpr import own_equations, parameters  # noqa: F401  (`own_equations` for the example in a docstring)


def rule(equation: Any) -> Callable[..., Array] | None:
    """Returns the replacement for a max-pooling equation, or for the equation of its backward pass.

    The replacement takes the equation's operands and returns its result. None for every other equation, and for windows that
    overlap, leave gaps, are padded or dilated.

    >>> def pool(x):
    ...     return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (2,), "VALID")
    >>> (equation,) = own_equations(jax.make_jaxpr(pool)(jnp.zeros(4)))
    >>> rule(equation)(jnp.array([1.0, 3.0, 2.0, 0.0])).tolist()
    [3.0, 2.0]
    """
    params = parameters(equation)
    if equation.primitive.name not in _REPLACEMENTS or params["window_dimensions"] != params["window_strides"]:
        return None
    dilated = any(n != 1 for n in (*params.get("base_dilation", ()), *params.get("window_dilation", ())))
    comparison = params.get("select_prim")
    if dilated or any(map(any, params["padding"])) or (comparison is not None and comparison.name != "ge"):
        return None
    compute = functools.partial(_REPLACEMENTS[equation.primitive.name], window=params["window_dimensions"])
    return functools.partial(compile_separately, compute)


def _split_into_windows(x: Array, window: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Splits each axis into (windows, positions in a window), without the rest at its end; returns the position axes too."""
    counts = [n // k for n, k in zip(x.shape, window, strict=True)]
    covered = jax.lax.slice(x, [0] * x.ndim, [n * k for n, k in zip(counts, window, strict=True)])
    shape = [n for pair in zip(counts, window, strict=True) for n in pair]
    return covered.reshape(shape), tuple(range(1, 2 * x.ndim, 2))


def _max_pool(x: Array, window: tuple[int, ...]) -> Array:
    windows, positions = _split_into_windows(x, window)
    return jax.lax.reduce_max(windows, positions)


def _max_pool_gradient(gradient: Array, x: Array, window: tuple[int, ...]) -> Array:
    """Returns the gradient at the first maximum of each window, and zero elsewhere."""
    windows, positions = _split_into_windows(x, window)
    maximum = jax.lax.reduce_max(windows, positions)
    size = math.prod(window)
    descending = jnp.arange(size, 0, -1, dtype=jnp.int8 if size < 128 else jnp.int32)  # largest at a window's first position
    priority = descending.reshape([k for n in window for k in (1, n)])
    score = jnp.where(windows == jnp.expand_dims(maximum, positions), priority, jnp.zeros((), priority.dtype))
    is_first = score == jnp.expand_dims(jax.lax.reduce_max(score, positions), positions)
    scattered = jnp.where(is_first, jnp.expand_dims(gradient, positions), jnp.zeros((), gradient.dtype))
    covered = scattered.reshape([n * k for n, k in zip(gradient.shape, window, strict=True)])
    return jnp.pad(covered, [(0, n - m) for n, m in zip(x.shape, covered.shape, strict=True)])


_REPLACEMENTS: dict[str, Callable[..., Array]] = {
    "reduce_window_max": _max_pool,
    "select_and_scatter_add": _max_pool_gradient,
}

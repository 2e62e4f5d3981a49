"""Max-pooling on the CPU: the same bits several times as fast.

XLA's CPU compiler walks the windows of a pooling one by one, and once more on the way back. Where windows lie side by side the
same is a maximum over two axes, and the gradient goes to the first place in each window that holds it.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array

from research.transforms import equations

T = TypeVar("T")


def repooled(function: Callable[..., T]) -> Callable[..., T]:
    """The same function with every max-pooling of windows side by side computed so, derivatives too; on the CPU alone.

    Run eagerly (`jax.disable_jit`) it is the function itself.

    >>> import keras
    >>> pool = keras.layers.MaxPooling1D(2)
    >>> def peaks(x):
    ...     return jax.grad(lambda x: pool(x).sum())(x)
    >>> repooled(peaks)(jnp.array([[[1.0], [1.0], [2.0], [3.0], [9.0]]])).ravel().tolist()
    [1.0, 0.0, 0.0, 1.0, 0.0]
    """

    def call(*args: Any) -> T:
        if jax.default_backend() != "cpu" or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*args)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(program.jaxpr, program.consts, jax.tree.leaves(args)))

    call.__name__ = getattr(function, "__name__", "call")
    return call


def _run(jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
    """Runs a program, an equation after the other, with poolings replaced."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given, params = [of(atom) for atom in equation.invars], equation.params
        inner = params.get("jaxpr")
        if _side_by_side(equation):
            found = [_REPLACED[equation.primitive.name](*given, params["window_dimensions"])]
        elif equation.primitive.name == "jit" and any(map(_side_by_side, equations(inner.jaxpr))):
            found = _run(inner.jaxpr, inner.consts, given)
        else:
            with equation.ctx.manager:
                results = equation.primitive.bind(*given, **equation.primitive.get_bind_params(params))
            found = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, found, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _side_by_side(equation: Any) -> bool:
    """Whether an equation is a max-pooling, or the way back of one, of windows that neither overlap nor leave gaps."""
    params = equation.params
    if equation.primitive.name not in _REPLACED or params["window_dimensions"] != params["window_strides"]:
        return False
    dilated = any(n != 1 for n in (*params.get("base_dilation", ()), *params.get("window_dilation", ())))
    selected = params.get("select_prim")
    return not dilated and not any(map(any, params["padding"])) and (selected is None or selected.name == "ge")


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

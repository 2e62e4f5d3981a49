"""The same sums in another order: equal to rounding, and on the CPU faster. For those who choose it; Keras' bits are the default.

The gradient of a kernel is a sum over examples and places. XLA's CPU compiler first transposes what it is a sum over, computing
anew, for each such product, all the additions that lead there; or walks it as a convolution with a window as large as the image.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.kernels import rewritten

T = TypeVar("T")
PLACES = 32  # of a kernel at most, for whose gradient a matrix product is written


def reordered(function: Callable[..., T]) -> Callable[..., T]:
    """The same function with the gradients of kernels as single matrix products; on the CPU alone.

    Take a learner's step through it to choose it: `learner._replace(train=reordered(learner.train))`. It stays as fast, or as
    slow, in what it has no rule for.

    >>> def gradient(kernel, x, y):
    ...     return jax.grad(lambda kernel: jnp.sum(jnp.einsum("btd,dk->btk", x, kernel) * y))(kernel)
    >>> args = jnp.ones((2, 3)), jnp.ones((5, 4, 2)), jnp.ones((5, 4, 3))
    >>> bool(jnp.allclose(reordered(gradient)(*args), gradient(*args)))
    True
    """
    return rewritten(function, _replacement)


def _replacement(equation: Any) -> Callable[..., list[Array]] | None:
    name = equation.primitive.name
    if name == "dot_general" and _sums_over_the_first_axes(equation):
        return functools.partial(_flat_product, equation.params)
    if name == "conv_general_dilated" and _window_is_most(equation):
        return functools.partial(_places_product, equation.params)
    return None


def _sums_over_the_first_axes(equation: Any) -> bool:
    (left, right), batch = equation.params["dimension_numbers"]
    first = tuple(range(len(left)))
    return len(left) > 1 and not any(batch) and tuple(left) == tuple(right) == first


def _flat_product(params: dict[str, Any], x: Array, y: Array) -> list[Array]:
    axes = len(params["dimension_numbers"][0][0])
    length = math.prod(x.shape[:axes])
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    product = jax.lax.dot_general(x.reshape(length, -1), y.reshape(length, -1), (((0,), (0,)), ((), ())), **options)
    return [product.reshape(*x.shape[axes:], *y.shape[axes:])]


def _window_is_most(equation: Any) -> bool:
    """Whether an equation is a convolution of few places, each a sum over most of the image: the gradient of a kernel."""
    params, kernel, out = equation.params, equation.invars[1].aval, equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    places = math.prod(out.shape[axis] for axis in numbers.out_spec[2:])
    window = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    plain = params["feature_group_count"] == params["batch_group_count"] == 1 and set(params["lhs_dilation"]) <= {1}
    return plain and places <= PLACES and window > places and min(itertools.chain(*params["padding"]), default=0) >= 0


def _places_product(params: dict[str, Any], x: Array, kernel: Array) -> list[Array]:
    """The same convolution as one product: for each place of the result the part of the image that its window covers."""
    numbers = params["dimension_numbers"]
    rows, summed, *axes = numbers.lhs_spec
    columns, _, *window = numbers.rhs_spec
    widths = [(0, 0)] * x.ndim
    for axis, padding in zip(axes, params["padding"], strict=True):
        widths[axis] = padding
    padded = jnp.pad(x, widths)
    dilation, strides = params["rhs_dilation"], params["window_strides"]
    reach = [(kernel.shape[axis] - 1) * d + 1 for axis, d in zip(window, dilation, strict=True)]
    sizes = [(padded.shape[axis] - r) // s + 1 for axis, r, s in zip(axes, reach, strides, strict=True)]
    parts = []
    for place in itertools.product(*map(range, sizes)):
        cut = [slice(None)] * x.ndim
        for axis, i, r, s, d in zip(axes, place, reach, strides, dilation, strict=True):
            cut[axis] = slice(i * s, i * s + r, d)
        parts.append(padded[tuple(cut)])
    # Summed over in the order of the image's axes, so that what leads is one axis where it can be.
    over = sorted(zip((summed, *axes), (numbers.rhs_spec[1], *window), strict=True))
    left, right = zip(*over, strict=True)
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    options["dimension_numbers"] = ((left, right), ((), ()))
    covered = jnp.concatenate(parts, rows)
    if left == right == tuple(range(len(left))):
        (product,) = _flat_product(options, covered, kernel)
    else:
        product = jax.lax.dot_general(covered, kernel, **options)
    spread = product.reshape(*sizes, x.shape[rows], kernel.shape[columns])  # places, then rows and columns of the product
    where = {axis: place for place, axis in enumerate([*numbers.out_spec[2:], *numbers.out_spec[:2]])}
    return [spread.transpose([where[axis] for axis in range(x.ndim)])]

"""Kernel gradients in another order of summation: faster on the CPU, equal to rounding.

This is opt-in; the default is Keras' bits. The gradient of a kernel is a sum over examples and positions. XLA's CPU compiler
transposes the operands of such a product first and repeats, for each product, the additions that lead to them. Or it runs the
product as a convolution whose window is as large as the image.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.cpu.rewrite import rewrite
from research.transforms.jaxpr import parameters

T = TypeVar("T")
MAX_POSITIONS = 32  # of a kernel; the gradients of larger kernels stay convolutions


def fast_sums(function: Callable[..., T]) -> Callable[..., T]:
    """Wraps a function so that on the CPU each gradient of a kernel is a single matrix product.

    The results are equal to rounding. Everything else in the function stays unchanged. To use it in training, wrap the train step
    of a learner: `learner._replace(train=fast_sums(learner.train))`.

    >>> def gradient(kernel, x, y):
    ...     return jax.grad(lambda kernel: jnp.sum(jnp.einsum("btd,dk->btk", x, kernel) * y))(kernel)
    >>> args = jnp.ones((2, 3)), jnp.ones((5, 4, 2)), jnp.ones((5, 4, 3))
    >>> bool(jnp.allclose(fast_sums(gradient)(*args), gradient(*args)))
    True
    """
    return rewrite(function, _rule)


def _rule(equation: Any) -> Callable[..., list[Array]] | None:
    name = equation.primitive.name
    if name == "dot_general" and _contracts_leading_axes(equation):
        return functools.partial(_matrix_product, parameters(equation))
    if name == "conv_general_dilated" and _is_kernel_gradient(equation):
        return functools.partial(_convolution_as_product, parameters(equation))
    return None


def _contracts_leading_axes(equation: Any) -> bool:
    """Returns whether a product sums over the same two or more leading axes of both operands, without batch axes."""
    (left, right), batch = parameters(equation)["dimension_numbers"]
    leading = tuple(range(len(left)))
    return len(left) > 1 and not any(batch) and tuple(left) == tuple(right) == leading


def _matrix_product(params: dict[str, Any], x: Array, y: Array) -> list[Array]:
    """Computes a product over leading axes with these axes flattened into one."""
    axes = len(params["dimension_numbers"][0][0])
    length = math.prod(x.shape[:axes])
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    product = jax.lax.dot_general(x.reshape(length, -1), y.reshape(length, -1), (((0,), (0,)), ((), ())), **options)
    return [product.reshape(*x.shape[axes:], *y.shape[axes:])]


def _is_kernel_gradient(equation: Any) -> bool:
    """Returns whether a convolution has few output positions, each a sum over most of the image, as kernel gradients have."""
    params, kernel, out = parameters(equation), equation.invars[1].aval, equation.outvars[0].aval
    numbers = params["dimension_numbers"]
    positions = math.prod(out.shape[axis] for axis in numbers.out_spec[2:])
    window = math.prod(kernel.shape[axis] for axis in numbers.rhs_spec[2:])
    supported = params["feature_group_count"] == params["batch_group_count"] == 1 and set(params["lhs_dilation"]) <= {1}
    padding = itertools.chain(*params["padding"])
    return supported and positions <= MAX_POSITIONS and window > positions and min(padding, default=0) >= 0


def _convolution_as_product(params: dict[str, Any], x: Array, kernel: Array) -> list[Array]:
    """Computes a convolution as one product of the kernel with the parts of the image that its window covers."""
    numbers = params["dimension_numbers"]
    rows, summed, *axes = numbers.lhs_spec
    columns, _, *window = numbers.rhs_spec
    widths = [(0, 0)] * x.ndim
    for axis, padding in zip(axes, params["padding"], strict=True):
        widths[axis] = padding
    padded = jnp.pad(x, widths)
    dilation, strides = params["rhs_dilation"], params["window_strides"]
    extents = [(kernel.shape[axis] - 1) * d + 1 for axis, d in zip(window, dilation, strict=True)]
    sizes = [(padded.shape[axis] - extent) // s + 1 for axis, extent, s in zip(axes, extents, strides, strict=True)]
    patches = []
    for position in itertools.product(*map(range, sizes)):
        patch = [slice(None)] * x.ndim
        for axis, i, extent, s, d in zip(axes, position, extents, strides, dilation, strict=True):
            patch[axis] = slice(i * s, i * s + extent, d)
        patches.append(padded[tuple(patch)])
    # In the order of the image's axes, so that the summed axes lead where possible and can be flattened into one.
    contracted = sorted(zip((summed, *axes), (numbers.rhs_spec[1], *window), strict=True))
    left, right = zip(*contracted, strict=True)
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    options["dimension_numbers"] = ((left, right), ((), ()))
    stacked = jnp.concatenate(patches, rows)
    if left == right == tuple(range(len(left))):
        (product,) = _matrix_product(options, stacked, kernel)
    else:
        product = jax.lax.dot_general(stacked, kernel, **options)
    split = product.reshape(*sizes, x.shape[rows], kernel.shape[columns])  # positions, then rows and columns of the product
    order = {axis: place for place, axis in enumerate([*numbers.out_spec[2:], *numbers.out_spec[:2]])}
    return [split.transpose([order[axis] for axis in range(x.ndim)])]

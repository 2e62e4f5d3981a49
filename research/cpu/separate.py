"""Keeps XLA's CPU compiler from fusing an operation with what uses its result."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

T = TypeVar("T")


def compile_separately(compute: Callable[..., T], *operands: Array) -> T:
    """Returns `compute(*operands)`, compiled apart from the rest of the program, so that what uses it rounds as without it.

    What is fused with a computation may be vectorized differently, and then rounds differently. The result, any tree of arrays,
    cannot be differentiated in reverse mode.

    >>> jax.jit(lambda x: compile_separately(jnp.sin, x).sum())(jnp.zeros(2)).item()
    0.0
    """
    shapes = jax.eval_shape(compute, *operands)
    last = operands[-1]
    if not last.size:
        return compute(*operands)
    # The loop has one iteration, since no word has 128 bits, but the compiler cannot know that. An optimization barrier is not
    # enough: the CPU compiler drops it too early.
    word = jax.lax.bitcast_convert_type(jnp.ravel(last)[0], jnp.dtype(f"uint{8 * last.dtype.itemsize}"))
    iterations = 1 + (jax.lax.population_count(word) >> jnp.asarray(7, word.dtype)).astype(jnp.int32)
    zeros: Any = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, iterations, lambda *_: compute(*operands), zeros)

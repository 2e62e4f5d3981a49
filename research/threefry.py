"""JAX's random bits on the CPU: the same bits several times as fast.

For the CPU JAX writes the cipher that they come from as a loop, each round of which goes through all the numbers in memory. As
one expression XLA keeps a number in a register until it is done.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
from jaxtyping import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA  # with the two words of the key it gives the third


def hashed(key_0: Any, key_1: Any, x_0: Any, x_1: Any) -> list[Array]:
    """Threefry-2x32 of 20 rounds (J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): two words in, two out.

    All are uint32 and as long as one another, or single numbers.

    >>> [f"{int(word):08x}" for word in hashed(*jnp.array([0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3], jnp.uint32))]
    ['c4923a9c', '483df7a0']
    """
    first, second, x_0, x_1 = (jnp.asarray(word, jnp.uint32) for word in (key_0, key_1, x_0, x_1))
    keys = (first, second, first ^ second ^ jnp.uint32(PARITY))
    x_0, x_1 = x_0 + first, x_1 + second
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x_0 = x_0 + x_1
            x_1 = (x_1 << jnp.uint32(rotation)) | (x_1 >> jnp.uint32(32 - rotation))
            x_1 = x_0 ^ x_1
        x_0 = x_0 + keys[(group + 1) % 3]
        x_1 = x_1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return [x_0, x_1]


def spelled_out(equation: Any) -> Callable[..., Array] | None:
    """What an equation draws from a key of this cipher, down to the cipher; None for any other equation."""
    name, params = equation.primitive.name, equation.params
    if name not in ("random_bits", "random_split", "random_fold_in"):
        return None
    key = equation.invars[0].aval
    if key.shape or key.dtype.name != "key<fry>" or (name == "random_fold_in" and equation.invars[1].aval.shape):
        return None
    implementation = jax.extend.random.threefry_prng_impl

    def drawn(key: Array, *data: Array) -> Array:
        words = jax.random.key_data(key)
        if name == "random_bits":
            made = implementation.random_bits(words, params["bit_width"], params["shape"])
            return jax.lax.optimization_barrier(made)  # what uses them is compiled as it is after a loop, and rounds alike
        made = implementation.split(words, params["shape"]) if name == "random_split" else implementation.fold_in(words, *data)
        return jax.random.wrap_key_data(made, impl="threefry2x32")

    return drawn

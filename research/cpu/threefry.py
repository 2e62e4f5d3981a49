"""JAX's random bits on the CPU: the same bits in less time.

For the CPU JAX writes the cipher that they come from as a loop, each round of which goes through all the numbers in memory. As
one expression XLA keeps a number in a register until it is done.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA  # with the two words of the key it gives the third


def replacement(equation: Any) -> Callable[..., Array] | None:
    """What computes an equation that draws bits or keys from one key of this cipher; None for any other equation.

    None as well where `jax_threefry_partitionable` is off: words are paired otherwise then.
    """
    name, params = equation.primitive.name, equation.params
    counted = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if name not in ("random_bits", "random_split", "random_fold_in") or not counted:
        return None
    key = equation.invars[0].aval
    if key.shape or key.dtype.name != "key<fry>" or math.prod(params.get("shape", ())) >= 1 << 32:
        return None
    if name == "random_bits":
        width = params["bit_width"]
        return functools.partial(_bits, shape=params["shape"], width=width) if width in (8, 16, 32) else None
    if name == "random_split":
        return functools.partial(_split, shape=params["shape"])
    return None if equation.invars[1].aval.shape else _fold_in


def hashed(key: UInt[Array, "2"], x_0: Any, x_1: Any) -> tuple[Any, Any]:
    """Threefry-2x32 of 20 rounds (J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): two words in, two out.

    All are uint32, `x_0` and `x_1` of one shape.

    >>> key = jnp.array([0x13198A2E, 0x03707344], jnp.uint32)
    >>> [f"{int(word):08x}" for word in hashed(key, jnp.uint32(0x243F6A88), jnp.uint32(0x85A308D3))]
    ['c4923a9c', '483df7a0']
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x_0 = x_0 + x_1
            x_1 = (x_1 << jnp.uint32(rotation)) | (x_1 >> jnp.uint32(32 - rotation))
            x_1 = x_0 ^ x_1
        x_0 = x_0 + keys[(group + 1) % 3]
        x_1 = x_1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x_0, x_1


def _numbered(words: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The cipher of as many numbers as there are, counted from 0."""
    count = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return hashed(words, jnp.zeros(shape, jnp.uint32), count)


def _bits(key: Array, shape: tuple[int, ...], width: int) -> Array:
    words, kind = jax.random.key_data(key), jnp.dtype(f"uint{width}")

    def draw(*_: Any) -> Array:
        high, low = _numbered(words, shape)
        return (high ^ low).astype(kind)

    # A loop that is gone through once, of which the compiler can't know that: what comes after it is compiled apart, as it is
    # after JAX's own loop, and rounds as it does there. A barrier is of no use: on the CPU it is dropped before that.
    once = 1 + (jax.lax.population_count(words[0]) >> jnp.uint32(6)).astype(jnp.int32)
    return jax.lax.fori_loop(0, once, draw, jnp.zeros(shape, kind))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    made = jnp.stack(_numbered(jax.random.key_data(key), shape), -1)
    return jax.random.wrap_key_data(made, impl="threefry2x32")


def _fold_in(key: Array, data: Any) -> Array:
    made = jnp.stack(hashed(jax.random.key_data(key), jnp.uint32(0), data.astype(jnp.uint32)))
    return jax.random.wrap_key_data(made, impl="threefry2x32")

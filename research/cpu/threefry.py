"""JAX's random bits on the CPU: the same bits in less time.

For the CPU JAX lowers the threefry cipher to a loop, each round of which reads and writes all words in memory. Written as one
expression, XLA keeps a word in a register through all rounds.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from research.cpu.separate import compile_separately
from research.transforms.jaxpr import equations, parameters  # noqa: F401  (`equations` for the example in a docstring)

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA  # xor-ed with both words of the key it gives the third word


def rule(equation: Any) -> Callable[..., Array] | None:
    """Returns the replacement for an equation that draws bits, splits or folds into a threefry key, or into an array of keys.

    The replacement takes the equation's operands and returns its result. None for every other equation, and where
    `jax_threefry_partitionable` is off, because words are paired differently then.

    >>> draw, key = lambda key: jax.random.bits(key, (2,)), jax.random.key(0)
    >>> (replacement,) = filter(None, map(rule, equations(jax.make_jaxpr(draw)(key))))
    >>> bool((replacement(key) == draw(key)).all())
    True
    """
    name, params = equation.primitive.name, parameters(equation)
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if name not in ("random_bits", "random_split", "random_fold_in") or not partitionable:
        return None
    key = equation.invars[0].aval
    if key.dtype.name != "key<fry>" or math.prod(params.get("shape", ())) >= 1 << 32:
        return None
    if name == "random_bits":
        width = params["bit_width"]
        return functools.partial(_bits, shape=params["shape"], width=width) if width in (8, 16, 32) else None
    if name == "random_split":
        return functools.partial(_split, shape=params["shape"])
    return _fold_in


def threefry2x32(key: UInt[Array, "2 ..."], x_0: Any, x_1: Any) -> tuple[Any, Any]:
    """Returns Threefry-2x32 with 20 rounds of two words under a key.

    All words are uint32; `x_0` and `x_1` have the same shape, and the results the one that it broadcasts to with that of the
    keys, if there are several. Source: J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

    >>> key = jnp.array([0x13198A2E, 0x03707344], jnp.uint32)
    >>> [f"{int(word):08x}" for word in threefry2x32(key, jnp.uint32(0x243F6A88), jnp.uint32(0x85A308D3))]
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


def _encrypt_counters(words: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the cipher of the counters 0, 1, 2, ... in an array of this shape for each key, as high and low words."""
    counters = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    keys = jnp.moveaxis(words, -1, 0)
    return threefry2x32(keys.reshape(*keys.shape, *(1,) * len(shape)), jnp.zeros(shape, jnp.uint32), counters)


def _bits(key: Array, shape: tuple[int, ...], width: int) -> Array:
    # The two words are joined where the bits are used, as in JAX' own program. Else the compiler would vectorize, and round, the
    # use otherwise.
    high, low = compile_separately(functools.partial(_encrypt_counters, shape=shape), jax.random.key_data(key))
    return (high ^ low).astype(jnp.dtype(f"uint{width}"))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    words = jnp.stack(_encrypt_counters(jax.random.key_data(key), shape), -1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _fold_in(key: Array, data: Any) -> Array:
    keys = jnp.moveaxis(jax.random.key_data(key), -1, 0)
    words = jnp.stack(threefry2x32(keys, jnp.uint32(0), data.astype(jnp.uint32)), -1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")

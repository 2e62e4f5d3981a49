"""Two leaves of a state in one buffer, which an error about donation comes from."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from research.core.state import InvalidArgument


def shared_leaves(state: PyTree) -> tuple[int, int] | None:
    """Returns the positions of two leaves of a state, in tree order, that share a buffer; None if each array has its own.

    >>> array = jnp.ones(2)
    >>> shared_leaves({"average": array, "step": jnp.zeros(()), "weights": array}), shared_leaves(array)
    ((0, 2), None)
    """
    owners: dict[int, int] = {}
    for position, leaf in enumerate(jax.tree.leaves(state)):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.size:
            continue
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in data.addressable_shards[:1]:
            owner = owners.setdefault(shard.data.unsafe_buffer_pointer(), position)
            if owner != position:
                return owner, position
    return None


@contextmanager
def naming_shared_leaves(state: PyTree, names: PyTree) -> Iterator[None]:
    """Raises `InvalidArgument` with two leaves' names for JAX' error about a state that is donated with one buffer in both.

    >>> weights = jnp.ones(2)
    >>> update = jax.jit(lambda state: {name: leaf + 1 for name, leaf in state.items()}, donate_argnums=0)
    >>> with naming_shared_leaves(state := {"average": weights, "weights": weights}, {"average": "ema/w", "weights": "w"}):
    ...     update(state)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: state: 'ema/w' and 'w' share one buffer; expected an array of its own for each, ...
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        shared = shared_leaves(state) if "donate" in str(error) else None
        if shared is None:
            raise
        leaves = jax.tree.leaves(names)
        first, second = (repr(leaves[position]) if position < len(leaves) else f"leaf {position}" for position in shared)
        raise InvalidArgument(
            f"state: {first} and {second} share one buffer; expected an array of its own for each, since training donates the "
            "state: copy one with jnp.copy(...), in init or in the hook that returned it."
        ) from error

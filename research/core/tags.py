"""Names for values inside a traced step, by which `research.transforms.observe` finds them.

A tag is an equation of the traced program that nothing depends on: it changes no number, and the compiler removes it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

GRADIENT, LEARNING_RATE = "research/gradient", "research/learning_rate"
BEGIN, END = "research/begin/", "research/end"


def tag(tree: PyTree, name: str) -> None:
    """Tags the leaves of a tree with a name and their position, in the program that is being traced.

    >>> def double(weights):
    ...     tag(weights, GRADIENT)
    ...     return [2 * w for w in weights]
    >>> program = jax.make_jaxpr(double)([1.0, 2.0])
    >>> [e.params["name"] for e in program.eqns if e.primitive.name == "name"]
    ['research/gradient/0', 'research/gradient/1']
    """
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        checkpoint_name(leaf, f"{name}/{i}")


@contextmanager
def scope(name: str, tree: PyTree) -> Iterator[None]:
    """Marks what is traced inside the context as that of `name`. Any leaf of `tree` carries the mark; without one there is none.

    >>> def double(x):
    ...     with scope("actor", x):
    ...         return 2 * x
    >>> [e.params.get("name") for e in jax.make_jaxpr(double)(1.0).eqns]
    ['research/begin/actor', None, 'research/end']
    """
    first = jax.tree.leaves(tree)[:1]
    for leaf in first:
        checkpoint_name(leaf, BEGIN + name)
    yield
    for leaf in first:
        checkpoint_name(leaf, END)

"""From one pure function to another: several steps as one program."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from research.measures import Logs

S = TypeVar("S")


def fuse(step: Callable[[S, Any], tuple[S, Logs]]) -> Callable[[S, PyTree, int | Int[Array, ""]], tuple[S, Logs]]:
    """Several steps as one: (state, batches, count) -> (state, logs of the last).

    Every leaf of `batches` has one more axis in front, a batch each; the first `count` of them are used. `count` may be traced,
    so that one program serves any number of steps up to the length of that axis. Equal to as many single steps, bit for bit
    where XLA compiles a step inside a loop as it does outside: see `loops_well`.

    >>> def step(state, batch):
    ...     return state + batch, {"seen": batch}
    >>> state, logs = jax.jit(fuse(step))(jnp.zeros(()), jnp.arange(4.0), 3)
    >>> float(state), float(logs["seen"])
    (3.0, 2.0)
    """

    def fused(state: S, batches: PyTree, count: int | Int[Array, ""]) -> tuple[S, Logs]:
        one = jax.jit(step)  # traced once, for its shapes and for the loop

        def body(i: Any, carry: tuple[S, Logs]) -> tuple[S, Logs]:
            # The barriers keep XLA from mixing a step with what is around it: it rounds as it does alone.
            batch = jax.tree.map(lambda leaf: leaf[i], batches)
            after: tuple[S, Logs] = jax.lax.optimization_barrier(one(*jax.lax.optimization_barrier((carry[0], batch))))
            return after

        _, shapes = jax.eval_shape(one, state, jax.tree.map(lambda leaf: leaf[0], batches))
        logs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        after: tuple[S, Logs] = jax.lax.fori_loop(0, count, body, (state, logs))
        return after

    return fused


def loops_well(program: jax.stages.Traced) -> bool:
    """Whether a program is as fast and as exact inside a loop as outside.

    On the CPU XLA runs convolutions inside loops on one thread, by other kernels that round differently.

    >>> loops_well(jax.jit(jnp.dot).trace(jnp.ones(2), jnp.ones(2)))
    True
    """
    if jax.default_backend() != "cpu":
        return True
    return all(equation.primitive.name != "conv_general_dilated" for equation in _equations(program.jaxpr.jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)

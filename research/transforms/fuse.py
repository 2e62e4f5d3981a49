"""Several training steps as one compiled program."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from research.core.metrics import Logs

S = TypeVar("S")


def batch_at(batches: PyTree, i: Any) -> Any:
    """Returns the `i`-th of stacked batches.

    >>> batch_at({"x": jnp.arange(6).reshape(3, 2)}, 1)["x"].tolist()
    [2, 3]
    """
    return jax.tree.map(lambda leaf: leaf[i], batches)


def fuse(
    step: Callable[[S, Any], tuple[S, Logs]], select: Callable[[PyTree, Any], Any] = batch_at
) -> Callable[[S, PyTree, int | Int[Array, ""]], tuple[S, Logs]]:
    """Returns (state, batches, count) -> (state, logs), which runs `count` steps as one program.

    Each leaf of `batches` has an additional leading axis of some length n: one batch per step. The first `count` <= n of them are
    used. `count` may be traced, so that one compiled program serves any number of steps up to n. The logs have the same leading
    axis; they are zero from `count` on. `select(batches, i)` returns the batch of step i. The results equal those of single
    steps, bit for bit where XLA compiles a step the same inside a loop as outside: on the CPU see
    `research.cpu.loops.runs_well_in_loop`.

    >>> def step(state, batch):
    ...     return state + batch, {"batch": batch}
    >>> state, logs = jax.jit(fuse(step))(jnp.zeros(()), jnp.arange(4.0), 3)
    >>> float(state), logs["batch"].tolist()
    (3.0, [0.0, 1.0, 2.0, 0.0])
    """

    def fused(state: S, batches: PyTree, count: int | Int[Array, ""]) -> tuple[S, Logs]:
        jitted = jax.jit(step)  # traced once, for its shapes and for the loop
        length = len(jax.tree.leaves(batches)[0])

        def store(all_logs: Logs, i: Any, logs: Logs) -> Logs:
            return jax.tree.map(lambda values, value: values.at[i].set(value), all_logs, logs)

        # An iteration runs a step on the batch that the one before it selected, and leaves its logs for the next one to store. So
        # the loop carries all that a step reads and returns. XLA fuses nothing else with the step, which rounds as it does alone.
        def body(i: Any, carry: tuple[S, Any, Logs, Logs]) -> tuple[S, Any, Logs, Logs]:
            state, batch, logs, all_logs = carry
            all_logs = store(all_logs, jnp.maximum(i - 1, 0), logs)
            # The barriers keep XLA from computing a counter in the state from the loop's own.
            state, logs = jax.lax.optimization_barrier(jitted(*jax.lax.optimization_barrier((state, batch))))
            return state, select(batches, jnp.minimum(i + 1, length - 1)), logs, all_logs

        first = select(batches, 0)
        _, shapes = jax.eval_shape(jitted, state, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        all_zeros = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
        state, _, logs, all_logs = jax.lax.fori_loop(0, count, body, (state, first, zeros, all_zeros))
        return state, store(all_logs, jnp.maximum(jnp.asarray(count) - 1, 0), logs)

    return fused

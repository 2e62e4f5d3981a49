"""From one pure function to another: several steps as one program, one gradient from parts of a batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import keras  # noqa: F401  (for the examples in docstrings)
from jaxtyping import Array, Int, PyTree

from research.measures import Logs
from research.state import Refused, State, rows
from research.step import Gradient
from research.update import Gradients

S = TypeVar("S")


def fuse(step: Callable[[S, Any], tuple[S, Logs]]) -> Callable[[S, PyTree, int | Int[Array, ""]], tuple[S, Logs]]:
    """Several steps as one: (state, batches, count) -> (state, logs of each step).

    Every leaf of `batches` has one more axis in front, a batch each; the first `count` of them are used. `count` may be traced,
    so that one program serves any number of steps up to the length of that axis. The logs have that axis too; they are zero from
    `count` on. Equal to as many single steps, bit for bit where XLA compiles a step inside a loop as it does outside: see
    `loops_well`.

    >>> def step(state, batch):
    ...     return state + batch, {"seen": batch}
    >>> state, logs = jax.jit(fuse(step))(jnp.zeros(()), jnp.arange(4.0), 3)
    >>> float(state), logs["seen"].tolist()
    (3.0, [0.0, 1.0, 2.0, 0.0])
    """

    def fused(state: S, batches: PyTree, count: int | Int[Array, ""]) -> tuple[S, Logs]:
        one = jax.jit(step)  # traced once, for its shapes and for the loop
        length = len(jax.tree.leaves(batches)[0])

        def body(i: Any, carry: tuple[S, Logs]) -> tuple[S, Logs]:
            before, logs = carry
            batch = jax.tree.map(lambda leaf: leaf[i], batches)
            # The barriers keep XLA from mixing a step with what is around it: it rounds as it does alone.
            after, now = jax.lax.optimization_barrier(one(*jax.lax.optimization_barrier((before, batch))))
            return after, jax.tree.map(lambda all, each: all.at[i].set(each), logs, now)

        _, shapes = jax.eval_shape(one, state, jax.tree.map(lambda leaf: leaf[0], batches))
        logs = jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)
        after: tuple[S, Logs] = jax.lax.fori_loop(0, count, body, (state, logs))
        return after

    return fused


def accumulate(gradient: Gradient, parts: int) -> Gradient:
    """The gradient of a batch, taken part by part: for batches that do not fit into memory at once.

    The examples are dealt into so many equal parts, which go through the network one after the other; dealt, so that of a batch
    that is split over devices each has its share of every part. Losses and gradients are weighted by what their means stand for
    (`Aux.weight`), so with one loss that is a mean the result is that of the whole batch, to rounding; with several losses of
    different weights, or one that is a sum, it is the mean over rows. What a layer adds from its activity is weighted as the loss
    is. BatchNormalization and Dropout see parts. There is one update for the whole: schedules, averages and `iterations` count
    batches. Raises `Refused` where the batch can't be cut so.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, measures = research.keras_objective(model, loss="mse")
    >>> state = State([v.value for v in model.trainable_variables], [], [], measures.init())
    >>> batch = research.Batch(jnp.arange(4.0)[:, None], jnp.zeros((4, 1)))
    >>> _, gradients = accumulate(research.gradient(objective), 2)(state, batch)
    >>> float(gradients.loss), float(gradients.weight), [float(g.sum()) for g in gradients.values]
    (3.5, 4.0, [7.0, 3.0])
    """

    def accumulated(state: State, batch: Any) -> tuple[State, Gradients]:
        count = rows(batch)
        if count % parts:
            raise Refused(f"accumulate: a batch of {count} examples can't be cut into {parts} equal parts: choose a divisor.")
        dealt = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), batch)

        def part(carry: tuple[State, Gradients], batch: Any) -> tuple[tuple[State, Gradients], None]:
            state, sums = carry
            after, found = gradient(state, batch)
            values = jax.tree.map(lambda s, g: s + g * jnp.asarray(found.weight, g.dtype), sums.values, found.values)
            return (after, Gradients(values, sums.loss + found.loss * found.weight, sums.weight + found.weight)), None

        _, shapes = jax.eval_shape(gradient, state, jax.tree.map(lambda leaf: leaf[0], dealt))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (state, sums), _ = jax.lax.scan(part, (state, zeros), dealt)
        values = jax.tree.map(lambda s: s / jnp.asarray(sums.weight, s.dtype), sums.values)
        return state, Gradients(values, sums.loss / sums.weight, sums.weight)

    return accumulated


def loops_well(program: jax.stages.Traced) -> bool:
    """Whether a program is as fast and as exact inside a loop as outside.

    On the CPU XLA runs convolutions inside loops on one thread, by other kernels that round differently.

    >>> loops_well(jax.jit(jnp.dot).trace(jnp.ones(2), jnp.ones(2)))
    True
    """
    if jax.default_backend() != "cpu":
        return True
    return all(equation.primitive.name != "conv_general_dilated" for equation in equations(program.jaxpr.jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of the programs inside it too.

    >>> [e.primitive.name for e in equations(jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + 1)(0.0).jaxpr)]
    ['jit', 'sin', 'add']
    """
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def bound(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """What an equation of a program gives for these operands.

    >>> (equation,) = jax.make_jaxpr(jnp.sin)(0.0).eqns
    >>> [float(each) for each in bound(equation, [jnp.zeros(())])]
    [0.0]
    """
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return list(results) if equation.primitive.multiple_results else [results]


def _is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)

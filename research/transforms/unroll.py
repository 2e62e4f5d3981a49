"""Several training steps as one function with derivatives: of the weights, the data and the hyper-parameters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in the docstring)
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import InvalidArgument, check_type, states_in
from research.core.tags import GRADIENT
from research.transforms.finite_derivatives import interpret_with_finite_derivatives
from research.transforms.jaxpr import dependent_on, equations, inputs, is_literal, is_unchecked_map, outputs, parameters

Fold = Callable[[Any, PyTree], tuple[Any, Logs]]
PIECEWISE_CONSTANT = ("sign", "round", "floor", "ceil", "argmax", "argmin", "nextafter")


def unroll(learner: Learner, steps: int) -> Fold:
    """Returns (state, batches) -> (state, logs), which runs `steps` training steps and has derivatives of any order.

    Each leaf of `batches` has an additional leading axis of length `steps`: one batch per step. The logs have the same leading
    axis. Values are those of the learner's own steps. The result is an ordinary JAX function: `jax.grad` of any number computed
    from it, with respect to anything that its arguments are made from, differentiates through training. The learning rate is
    part of the state (`research.set_learning_rate`), example weights are `Batch.sample_weight`, initial weights
    `State.trainable`; of a `research.learner`, coefficients of the loss are non-trainable `keras.Variable`s in
    `State.non_trainable`. `jax.jvp`, `jax.vmap` and `jax.jit` work too.

    Reverse mode keeps about 2 * sqrt(steps) states and what one step computes on the way, and runs each step twice more. Where a
    weight's gradient is exactly 0, a square root of it in the optimizer has the derivative 0 instead of infinity: see
    `finite_derivatives`. Derivatives are those of the operations: that of a `relu` or of a maximum is piecewise.

    Raises `InvalidArgument` if `steps` is no positive integer; and when it is traced, if the batches are of another length, if
    a weight's update depends on its gradient only through operations without a derivative (rounding, sign, argmax, integers), and
    for a learner that is a `jax.pmap`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> optimizer = keras.optimizers.SGD(0.25)
    >>> learner = research.supervised(model, loss="mse", optimizer=optimizer)
    >>> batches = research.Batch(jnp.ones((3, 4, 1)), jnp.zeros((3, 4, 1)))
    >>> def final_loss(rate):  # each step multiplies the weight by 1 - 2 * rate
    ...     state = research.set_learning_rate(learner.init(), rate, optimizer)
    ...     state, logs = unroll(learner, 3)(state, batches)
    ...     return state.trainable[0].sum() ** 2
    >>> [round(float(value), 6) for value in jax.jit(jax.value_and_grad(final_loss))(0.25)]
    [0.015625, -0.375]
    """
    check_type(learner, Learner, "unroll: the learner", "a research.Learner: research.supervised(model, loss=...)")
    check_type(steps, (int, np.integer), "unroll: steps", "a positive integer")
    if steps < 1:
        raise InvalidArgument(f"unroll: steps is {steps}, expected a positive integer.")

    def unrolled(state: Any, batches: PyTree) -> tuple[Any, Logs]:
        _check_length(batches, steps)
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)), batches)
        program, shapes = jax.make_jaxpr(learner.train, return_shape=True)(state, first)
        _check_derivatives(program, state, learner.names)

        @jax.jit  # traced once
        def step(state: Any, batch: Any) -> tuple[Any, Logs]:
            results = interpret_with_finite_derivatives(program, jax.tree.leaves((state, batch)))
            return jax.tree.unflatten(jax.tree.structure(shapes), results)

        def body(state: Any, batch: Any) -> tuple[Any, Logs]:
            # Behind barriers XLA does not fuse the step with what reads its batch and stores its logs: it rounds as alone.
            after: tuple[Any, Logs] = jax.lax.optimization_barrier(step(*jax.lax.optimization_barrier((state, batch))))
            return after

        return _fold(body, state, batches, steps)

    return unrolled


def _fold(body: Fold, state: Any, batches: PyTree, steps: int) -> tuple[Any, Logs]:
    """Returns what `lax.scan` does; its backward pass computes again what lies between some of the states."""
    if steps == 1:
        state, logs = body(state, jax.tree.map(lambda leaf: leaf[0], batches))
        return state, jax.tree.map(lambda leaf: leaf[None], logs)

    def loop(state: Any, batches: PyTree, length: int) -> tuple[Any, Logs]:
        return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, batches, length)

    def chunk(state: Any, batches: PyTree) -> tuple[Any, Logs]:
        return loop(state, batches, length)

    length = _chunk_length(steps)
    count, rest = divmod(steps, length)
    if count == 1:
        return loop(state, batches, steps)
    parts = []
    if rest:
        state, logs = loop(state, jax.tree.map(lambda leaf: leaf[:rest], batches), rest)
        parts.append(logs)
    chunks = jax.tree.map(lambda leaf: jnp.reshape(leaf[rest:], (count, length, *leaf.shape[1:])), batches)
    state, logs = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), state, chunks, count)
    parts.append(jax.tree.map(lambda leaf: jnp.reshape(leaf, (count * length, *leaf.shape[2:])), logs))
    return state, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _chunk_length(steps: int) -> int:
    """Returns how many steps an inner loop has, so that the fewest states are saved at a time.

    >>> [_chunk_length(steps) for steps in (1, 4, 16, 17, 100, 200)]
    [1, 4, 4, 4, 10, 10]
    """

    def saved(length: int) -> int:  # at the starts of chunks, within one of them, and of the steps before the first
        return steps if length == steps else steps // length + length + steps % length

    return min(steps, *range(1, 2 * math.isqrt(steps) + 1), key=saved)


def _check_length(batches: PyTree, steps: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
        length = jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        if length != steps:
            found = "is a scalar" if length is None else f"has {length} batches"
            raise InvalidArgument(
                f"unroll: batches{jax.tree_util.keystr(path)} {found}, expected {steps}, one for each step: stack them with "
                "jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)."
            )


def _check_derivatives(program: Any, state: Any, names: PyTree) -> None:
    """Raises `InvalidArgument` for a step that is a `pmap`, and for one that cuts the derivative of a weight."""
    if any(map(is_unchecked_map, equations(program))):
        raise InvalidArgument(
            "unroll: the training step is a jax.pmap, through which the derivatives of sums over devices are wrong; expected a "
            "learner for one device, or one of research.distributed.shard."
        )
    gradients = _tagged_gradients(program)
    leaves, structure = jax.tree.flatten(state)
    positions = states_in(jax.tree.unflatten(structure, range(len(leaves))))
    places, labels = (jax.tree.leaves([node.trainable for node in nodes]) for nodes in (positions, states_in(names)))
    weights = dict(zip(places, labels, strict=True))
    sources = gradients or [inputs(program)[position] for position in weights]  # a step by hand tells no gradients
    known, smooth = dependent_on(program, sources), dependent_on(program, sources, _has_derivative)
    for position, name in weights.items():
        after = outputs(program)[position]
        if not is_literal(after) and after in known and after not in smooth:
            of = "its gradient" if gradients else "the weights"
            raise InvalidArgument(
                f"unroll: the derivative of the update of {name!r} is cut: it depends on {of} only through operations without a "
                "derivative (rounding, sign, argmax, comparisons, integers); expected an update such as that of SGD or Adam."
            )


def _tagged_gradients(program: Any) -> Sequence[Any]:
    tags = [equation for equation in equations(program) if equation.primitive.name == "name"]
    operands = [tag.invars[0] for tag in tags if parameters(tag)["name"].startswith(f"{GRADIENT}/")]
    return [atom for atom in operands if not is_literal(atom)]


def _has_derivative(equation: Any) -> bool:
    floating = any(jnp.issubdtype(out.aval.dtype, jnp.inexact) for out in equation.outvars)
    return floating and equation.primitive.name not in PIECEWISE_CONSTANT

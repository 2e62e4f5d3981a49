"""Data parallelism by `jax.pmap`: every device runs the same step on its part of the batch.

Replicas exchange gradients, statistics, metrics and seeds. `sharding.shard` computes what one device computes; here layers that
see the whole batch, such as BatchNormalization, see a replica's part of it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.core.learner import Learner
from research.core.state import InvalidArgument, is_seed, seed_of_part
from research.core.step import Gradient
from research.core.update import Gradients
from research.distributed.layouts import data, mesh
from research.distributed.sharding import shard
from research.transforms.jaxpr import (
    bind_equation,
    called_program,
    collective_axes,
    dependent_on,
    equations,
    inputs,
    interpret,
    is_literal,
    is_plain_call,
    outputs,
    own_equations,
    scan,
)

AXIS = "replicas"


def average_gradients(gradient: Gradient) -> Gradient:
    """Wraps a gradient so that it is averaged over replicas: for `supervised(..., gradient_transform=average_gradients)`.

    A replica's mean is weighted by `Gradients.weight`, so masks and sample weights count as in the complete batch.

    >>> from research import State
    >>> def half_square(state, batch):
    ...     return state, Gradients(batch, batch * 0.5, jnp.ones(()))
    >>> averaged = lambda x: average_gradients(half_square)(State([], [], [], {}), x)[1].values
    >>> jax.pmap(averaged, axis_name=AXIS)(jnp.array([3.0])).tolist()
    [3.0]
    """

    def averaged(state: Any, batch: Any) -> tuple[Any, Gradients]:
        after, gradients = gradient(state, batch)
        weight = jax.lax.psum(gradients.weight, AXIS)
        share = gradients.weight / weight

        def mean(value: Array) -> Array:
            return jax.lax.psum(value * jnp.asarray(share, value.dtype), AXIS)

        return after, Gradients(jax.tree.map(mean, gradients.values), mean(gradients.loss), weight)

    return averaged


def pmap(learner: Learner, devices: Sequence[Any] | None = None) -> Learner:
    """Returns a learner whose training step runs on each device with a part of the batch.

    Its gradient must be wrapped by `average_gradients`. State, names and checkpoints are those of `learner`. Dropout and noise
    draw differently in each replica, in the first as on one device. BatchNormalization normalises each part by itself; its
    moving averages are the mean over replicas. A metric must be a sum over examples, as those of Keras are; evaluation takes any
    metric. A batch that does not divide is computed completely by each replica. When a step is traced, raises `InvalidArgument`
    for a gradient that is not averaged, and for a metric that is not a sum.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = pmap(research.supervised(model, loss="mse", gradient_transform=average_gradients), jax.devices()[:1])
    >>> state, logs = jax.jit(learner.train)(learner.init(), research.Batch(np.ones((4, 2)), np.ones((4, 1))))
    >>> sorted(logs)
    ['loss']
    """
    devices = list(jax.devices() if devices is None else devices)
    count, roles = len(devices), _roles(learner)

    def train(state: Any, batch: Any) -> Any:
        indices = jnp.arange(count)
        if _divides(batch, count):
            step = functools.partial(_replica_step, learner.train, roles)
            parts = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, -1, *leaf.shape[1:])), batch)
            return jax.pmap(step, AXIS, in_axes=(0, None, 0), out_axes=None, devices=devices)(indices, state, parts)

        def complete_step(index: Array, state: Any, batch: Any) -> Any:
            return learner.train(state, batch)

        return jax.pmap(complete_step, AXIS, in_axes=(0, None, None), out_axes=None, devices=devices)(indices, state, batch)

    # Evaluation has no gradient: one sharded program computes what one device does, for any metric.
    return shard(learner, mesh(devices, data=-1), data)._replace(train=train)


def _divides(batch: Any, count: int) -> bool:
    return all(leaf.ndim and leaf.shape[0] % count == 0 for leaf in jax.tree.leaves(batch))


def _roles(learner: Learner) -> list[str]:
    """Returns how replicas treat each leaf of a state: as a key, seed, metric, statistic, or as the same everywhere."""
    shapes = jax.tree.leaves(jax.eval_shape(learner.init))
    roles = []
    for (path, name), leaf in zip(jax.tree_util.tree_leaves_with_path(learner.names), shapes, strict=True):
        keys = {getattr(key, "name", None) for key in path}
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            roles.append("key")
        elif name.endswith("seed_generator_state") or ("non_trainable" in keys and is_seed(leaf)):
            roles.append("seed")
        elif "metrics" in keys:
            roles.append("metric")
        elif "non_trainable" in keys and jnp.issubdtype(leaf.dtype, jnp.inexact):
            roles.append("statistic")
        else:
            roles.append("same")
    return roles


def _replica_step(train: Callable[[Any, Any], Any], roles: list[str], index: Array, state: Any, batch: Any) -> Any:
    """Runs a step in replica `index`. The resulting state is the same in all replicas."""
    leaves, structure = jax.tree.flatten(state)
    local = [_local_leaf(leaf, role, index) for leaf, role in zip(leaves, roles, strict=True)]
    program, shapes = jax.make_jaxpr(train, return_shape=True)(jax.tree.unflatten(structure, local), batch)
    if not any(AXIS in collective_axes(equation) for equation in equations(program)):
        raise InvalidArgument(
            "pmap: the learner's gradient is not averaged, so replicas would diverge; build it with "
            "research.supervised(..., gradient_transform=research.distributed.average_gradients)."
        )
    reductions: dict[Any, Callable[[Array], Array]] = {}
    for i, (role, before, after) in enumerate(zip(roles, inputs(program), outputs(program), strict=False)):
        if after is before:
            continue
        if role == "metric":
            if not _adds(program, after, before):
                name = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(state)[i][0])
                raise InvalidArgument(
                    f"pmap: {name} is not a sum over examples, so replicas can't be added up; use research.distributed.shard."
                )
            reductions[after] = functools.partial(_sum_of_increments, leaves[i])
        elif role == "statistic":
            reductions[after] = functools.partial(jax.lax.pmean, axis_name=AXIS)
    results = _evaluate(program, [*local, *jax.tree.leaves(batch)], reductions)
    synced = [_of_first(leaf, index) if role in ("key", "seed") else leaf for leaf, role in zip(results, roles, strict=False)]
    return jax.tree.unflatten(jax.tree.structure(shapes), [*synced, *results[len(roles) :]])


def _sum_of_increments(before: Array, after: Array) -> Array:
    return before + jax.lax.psum(after - before, AXIS)


def _local_leaf(leaf: Array, role: str, index: Array) -> Array:
    """Returns a replica's own seed or key, which in the first replica is that of the state; other leaves unchanged."""
    if role == "seed":
        return seed_of_part(leaf, index)
    if role == "key":
        folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(leaf.reshape(-1)).reshape(leaf.shape)
        return jnp.where(index == 0, leaf, folded)
    return leaf


def _of_first(leaf: Array, index: Array) -> Array:
    """Returns the first replica's value in all of them."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.lax.psum(jnp.where(index == 0, leaf, jnp.zeros_like(leaf)), AXIS)
    return jax.random.wrap_key_data(_of_first(jax.random.key_data(leaf), index), impl=jax.random.key_impl(leaf))


def _evaluate(program: Any, args: Sequence[Any], reductions: dict[Any, Callable[[Array], Array]]) -> list[Any]:
    """Evaluates a program, reducing some variables over replicas once they are computed: logs follow from reduced metrics."""

    def apply(equation: Any, operands: list[Any]) -> list[Any]:
        if is_plain_call(equation):
            inner = called_program(equation)
            pairs = zip(outputs(inner), equation.outvars, strict=True)
            return _evaluate(inner, operands, {variable: reductions[out] for variable, out in pairs if out in reductions})
        results = zip(equation.outvars, bind_equation(equation, operands), strict=True)
        return [reductions[out](result) if out in reductions else result for out, result in results]

    return interpret(program, args, apply)


def _adds(program: Any, after: Any, before: Any) -> bool:
    """Returns whether `after` is `before` plus something that does not depend on it."""
    if after is before:
        return True
    producers = {variable: equation for equation in own_equations(program) for variable in equation.outvars}
    if is_literal(after) or after not in producers:
        return False
    dependent = dependent_on(program, [before])
    equation = producers[after]
    operands = [atom for atom in equation.invars if not is_literal(atom) and atom in dependent]
    position, name, loop = list(equation.outvars).index(after), equation.primitive.name, scan(equation)
    if is_plain_call(equation) or loop is not None:
        inner = called_program(equation) if loop is None else loop.body
        if loop is not None and position >= loop.num_carry:
            return False
        carry = None if loop is None else loop.num_consts + position
        arguments = [i for i in range(len(inputs(inner))) if equation.invars[i] in operands and carry in (None, i)]
        return any(
            _adds(inner, outputs(inner)[position], inputs(inner)[i]) and _adds(program, equation.invars[i], before)
            for i in arguments
        )
    keeps = name in ("add", "add_any", "copy") or (name == "sub" and operands[0] is equation.invars[0])
    return len(operands) == 1 and keeps and _adds(program, operands[0], before)

"""Data parallelism the older way: `jax.pmap` runs the same step on each device with a part of the batch.

They tell each other gradients, statistics and metrics. `parallel.shard` gives the numbers of one device, this those of replicas.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array

from research.parallel import data, mesh, shard
from research.state import Refused
from research.step import Gradient, Learner
from research.transforms import bound, equations
from research.update import Gradients

AXIS = "replicas"
ODD = 0x9E3779B9  # between the seeds of two replicas: 2^32 over the golden ratio


def averaged(gradient: Gradient) -> Gradient:
    """The gradient of a batch whose parts lie with replicas: for `supervised(..., gradient_transform=averaged)`.

    Each replica's mean counts by what it stands for (`Aux.weight`), so masks and weights are those of the whole batch.

    >>> from research import State
    >>> def half_square(state, batch):
    ...     return state, Gradients(batch, batch * 0.5, jnp.ones(()))
    >>> one = jax.pmap(lambda x: averaged(half_square)(State([], [], [], {}), x)[1].values, axis_name=AXIS)
    >>> one(jnp.array([3.0])).tolist()
    [3.0]
    """

    def of(state: Any, batch: Any) -> tuple[Any, Gradients]:
        after, found = gradient(state, batch)
        weight = jax.lax.psum(found.weight, AXIS)
        share = found.weight / weight

        def mean(value: Array) -> Array:
            return jax.lax.psum(value * jnp.asarray(share, value.dtype), AXIS)

        return after, Gradients(jax.tree.map(mean, found.values), mean(found.loss), weight)

    return of


def pmap(learner: Learner, devices: Sequence[Any] | None = None) -> Learner:
    """A learner whose steps run on each device with its part of the batch. Its gradient has to be `averaged`.

    State, names and checkpoints are those of the learner itself. Dropout and noise draw differently in each replica, those of
    the first as on one device. BatchNormalization sees the parts, and its running averages are the mean of the replicas'. A
    metric has to be a sum over examples, as Keras' are; evaluation takes any. A batch that does not divide is computed whole by
    each. Raises `Refused`, when a step is traced, for a gradient that is not averaged and for a metric that is no sum.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = pmap(research.supervised(model, loss="mse", gradient_transform=averaged), jax.devices()[:1])
    >>> state, logs = jax.jit(learner.train)(learner.init(), research.Batch(np.ones((4, 2)), np.ones((4, 1))))
    >>> sorted(logs)
    ['loss']
    """
    held = list(jax.devices() if devices is None else devices)
    count, roles = len(held), _roles(learner)

    def train(state: Any, batch: Any) -> Any:
        indices = jnp.arange(count)
        if _divides(batch, count):
            part = functools.partial(_replica, learner.train, roles)
            cut = jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, -1, *leaf.shape[1:])), batch)
            return jax.pmap(part, AXIS, in_axes=(0, None, 0), out_axes=None, devices=held)(indices, state, cut)

        def whole(index: Array, state: Any, batch: Any) -> Any:
            return learner.train(state, batch)

        return jax.pmap(whole, AXIS, in_axes=(0, None, None), out_axes=None, devices=held)(indices, state, batch)

    # Without a gradient one program over all of them gives the numbers of one device, for any metric.
    return shard(learner, mesh(held, data=-1), data)._replace(train=train)


def _divides(batch: Any, count: int) -> bool:
    return all(leaf.ndim and leaf.shape[0] % count == 0 for leaf in jax.tree.leaves(batch))


def _roles(learner: Learner) -> list[str]:
    """What each leaf of a state is, as far as replicas are concerned."""
    shapes = jax.tree.leaves(jax.eval_shape(learner.init))
    found = []
    for (path, name), leaf in zip(jax.tree_util.tree_leaves_with_path(learner.names), shapes, strict=True):
        keys = {getattr(key, "name", None) for key in path}
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append("key")
        elif name.endswith("seed_generator_state"):
            found.append("seed")
        elif "metrics" in keys:
            found.append("metric")
        elif "non_trainable" in keys and jnp.issubdtype(leaf.dtype, jnp.inexact):
            found.append("statistic")
        else:
            found.append("same")
    return found


def _replica(train: Callable[[Any, Any], Any], roles: list[str], index: Array, state: Any, batch: Any) -> Any:
    """A step in one of the replicas: what it gives is the same in all of them."""
    leaves, structure = jax.tree.flatten(state)
    own = [_own(leaf, role, index) for leaf, role in zip(leaves, roles, strict=True)]
    program, shapes = jax.make_jaxpr(train, return_shape=True)(jax.tree.unflatten(structure, own), batch)
    if not any(AXIS in equation.params.get("axes", ()) for equation in equations(program.jaxpr)):
        raise Refused(
            "pmap: each replica would go its own way, since the learner's gradient is not averaged over them; build it with "
            "research.supervised(..., gradient_transform=replicas.averaged)."
        )
    taken = [*own, *jax.tree.leaves(batch)]
    common: dict[Any, Callable[[Array], Array]] = {}
    results = zip(roles, program.jaxpr.invars, program.jaxpr.outvars, leaves, strict=False)
    for i, (role, before, after, leaf) in enumerate(results):
        if after is before:
            continue
        if role == "metric":
            if not _adds(program.jaxpr, after, before):
                name = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(state)[i][0])
                raise Refused(f"pmap: {name} is no sum over examples, so replicas can't be added up; use parallel.shard.")
            common[after] = functools.partial(_added, leaf)
        elif role == "statistic":
            common[after] = functools.partial(jax.lax.pmean, axis_name=AXIS)
    outputs = _run(program.jaxpr, program.consts, taken, common)
    first = [_first(leaf, index) if role in ("key", "seed") else leaf for leaf, role in zip(outputs, roles, strict=False)]
    return jax.tree.unflatten(jax.tree.structure(shapes), [*first, *outputs[len(roles) :]])


def _added(before: Array, after: Array) -> Array:
    return before + jax.lax.psum(after - before, AXIS)


def _own(leaf: Array, role: str, index: Array) -> Array:
    """A seed or key of this replica's own; the first one's is the one that is handed in."""
    if role == "seed":
        return leaf.at[0].add(jnp.asarray(index, leaf.dtype) * jnp.asarray(ODD, leaf.dtype))
    if role == "key":
        folded = jax.vmap(lambda key: jax.random.fold_in(key, index))(leaf.reshape(-1)).reshape(leaf.shape)
        return jnp.where(index == 0, leaf, folded)
    return leaf


def _first(leaf: Array, index: Array) -> Array:
    """What the first replica has, in all of them."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.lax.psum(jnp.where(index == 0, leaf, jnp.zeros_like(leaf)), AXIS)
    return jax.random.wrap_key_data(_first(jax.random.key_data(leaf), index), impl=jax.random.key_impl(leaf))


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], common: dict[Any, Callable[[Array], Array]]) -> list[Any]:
    """Runs a program; as soon as one of the values is there that replicas have in common, it is made so: logs come after."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [of(atom) for atom in equation.invars]
        if equation.primitive.name == "jit":
            inner = equation.params["jaxpr"]
            inside = {i: common[o] for i, o in zip(inner.jaxpr.outvars, equation.outvars, strict=True) if o in common}
            found = _run(inner.jaxpr, inner.consts, given, inside)
        else:
            found = [common.get(o, lambda value: value)(v) for o, v in zip(equation.outvars, bound(equation, given), strict=True)]
        values.update(zip(equation.outvars, found, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _adds(jaxpr: Any, after: Any, before: Any) -> bool:
    """Whether a value is another one plus something that does not depend on it."""
    if after is before:
        return True
    made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    if isinstance(after, jax.extend.core.Literal) or after not in made:
        return False
    dependent = _dependent(jaxpr, [variable is before for variable in jaxpr.invars])
    equation = made[after]
    leading = [atom for atom in equation.invars if not isinstance(atom, jax.extend.core.Literal) and atom in dependent]
    position, name, params = list(equation.outvars).index(after), equation.primitive.name, equation.params
    if name in ("jit", "scan"):
        inner = params["jaxpr"].jaxpr
        at = params["num_consts"] + position if name == "scan" else None
        if at is not None and position >= params["num_carry"]:
            return False
        ways = [i for i in range(len(inner.invars)) if equation.invars[i] in leading and at in (None, i)]
        return any(
            _adds(inner, inner.outvars[position], inner.invars[i]) and _adds(jaxpr, equation.invars[i], before) for i in ways
        )
    plain = name in ("add", "add_any", "copy") or (name == "sub" and leading[0] is equation.invars[0])
    return len(leading) == 1 and plain and _adds(jaxpr, leading[0], before)


def _dependent(jaxpr: Any, given: Sequence[bool]) -> set[Any]:
    """The variables of a program that depend on those of its arguments."""
    found = {variable for variable, is_given in zip(jaxpr.invars, given, strict=True) if is_given}
    for equation in jaxpr.eqns:
        operands = [not isinstance(atom, jax.extend.core.Literal) and atom in found for atom in equation.invars]
        if not any(operands):
            continue
        if equation.primitive.name not in ("jit", "scan"):
            found.update(equation.outvars)
            continue
        inner, params = equation.params["jaxpr"].jaxpr, equation.params
        first, carried = (params["num_consts"], params["num_carry"]) if equation.primitive.name == "scan" else (0, 0)
        while True:  # what is carried on in one round, the next begins with
            inside = _dependent(inner, operands)
            results = [not isinstance(atom, jax.extend.core.Literal) and atom in inside for atom in inner.outvars]
            onward = [a or b for a, b in zip(operands[first : first + carried], results[:carried], strict=True)]
            if onward == operands[first : first + carried]:
                break
            operands[first : first + carried] = onward
        found.update(variable for variable, depends in zip(equation.outvars, results, strict=True) if depends)
    return found

"""What a training step computes on the way: gradients, updates, weights and learning rate, and their norms as logs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the examples in docstrings)
from jaxtyping import Array, Float, PyTree

from research.core.learner import Learner
from research.core.state import InvalidArgument, State, check_type, num_rows, states_in
from research.core.step import Step
from research.core.tags import BEGIN, END, GRADIENT, LEARNING_RATE
from research.transforms.jaxpr import (
    bind_equation,
    called_program,
    equations,
    inner_programs,
    interpret,
    is_cond,
    is_plain_call,
    parameters,
)
from research.transforms.population import MEMBERS_SUFFIX, PopulationState

Scope = tuple[str, ...]  # names of the learners that a joint learner is in, from the outermost
Tagged = dict[tuple[Scope, str], Any]  # values by scope and tag


class Observation(NamedTuple):
    """What one update of one learner computes. The trees have the structure of `State.trainable`.

    Fields:
        weights: after the update.
        updates: their change, with constraints and decay.
        gradients: as the optimizer gets them: accumulated, without loss scale, before it clips them. None if the step has none
            that are known, as with Keras' own `train_step`, or if they are computed in a loop inside the step.
        learning_rate: of this update; None where there is none to read, as with most optax optimizers.
        names: of the weights, as in `Learner.names`.

    >>> Observation([jnp.ones(2)], [jnp.zeros(2)], None, None, ["dense/bias"]).gradients is None
    True
    """

    weights: PyTree
    updates: PyTree
    gradients: PyTree | None
    learning_rate: Float[Array, ""] | None
    names: PyTree


WRAPPERS = [jax.tree_util.GetAttrKey(name) for name in ("state", "members", "population")]  # fields for a wrapped learner's state
Observe = Callable[[Observation], dict[str, Any]]  # to scalars by name


def norms(observation: Observation) -> dict[str, Any]:
    """Returns the Euclidean norms of all gradients, of the update and of all weights, and the learning rate, as far as known.

    Squares are added up in float32.

    >>> values = norms(Observation([jnp.array([3.0, 4.0])], [jnp.zeros(2)], [jnp.ones(4)], jnp.array(0.5), ["kernel"]))
    >>> {name: float(value) for name, value in values.items()}
    {'gradient_norm': 2.0, 'update_norm': 0.0, 'weight_norm': 5.0, 'learning_rate': 0.5}
    """
    trees = {"gradient": observation.gradients, "update": observation.updates, "weight": observation.weights}
    values = {f"{name}_norm": _norm(jax.tree.leaves(tree)) for name, tree in trees.items() if tree is not None}
    return values if observation.learning_rate is None else {**values, "learning_rate": observation.learning_rate}


def layer_norms(observation: Observation) -> dict[str, Any]:
    """Returns what `norms` does, and the norms of each layer, named `gradient_norm/LAYER`: of its kernel, bias, ... together.

    >>> observation = Observation([jnp.ones(4), jnp.zeros(2)], [jnp.ones(4), jnp.ones(2)], None, None, ["a/kernel", "b/kernel"])
    >>> {name: float(value) for name, value in layer_norms(observation).items() if "/" in name}
    {'update_norm/a': 2.0, 'update_norm/b': 1.4142135381698608, 'weight_norm/a': 2.0, 'weight_norm/b': 0.0}
    """
    values = norms(observation)
    layers = _layers(jax.tree.leaves(observation.names))
    for name in ("gradient", "update", "weight"):
        tree = getattr(observation, f"{name}s")
        leaves = [] if tree is None else list(zip(layers, jax.tree.leaves(tree), strict=True))
        for layer in dict.fromkeys(layer for layer, _ in leaves):
            values[f"{name}_norm/{layer}"] = _norm([leaf for other, leaf in leaves if other == layer])
    return values


def observe(learner: Learner, function: Observe) -> Callable[[Any, Any], dict[str, Array]]:
    """Returns (state, batch) -> scalars: what a function computes from the `Observation` of that training step.

    The state stays as it is: train with the learner's own step. So that one keeps its bits, and costs what it does without.
    Compiled, this function costs about one step more where it is called; `research.train(..., observe=(100, norms))` does so
    at every 100th step.

    Of a joint learner the function is called for each of its learners, and the names get that learner's as a prefix:
    `generator_gradient_norm`. If a learner is updated several times in a step, the gradients are those of the last one. Of a
    population it is called for each member, and the scalars are logged as all logs of a population are.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> learner = research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.25))
    >>> scalars = jax.jit(observe(learner, norms))(learner.init(), research.Batch(jnp.ones((2, 1)), jnp.zeros((2, 1))))
    >>> {name: float(value) for name, value in scalars.items()}
    {'gradient_norm': 2.0, 'learning_rate': 0.25, 'update_norm': 0.5, 'weight_norm': 0.5}
    """
    check_type(learner, Learner, "observe: the learner", "a research.Learner: research.supervised(model, loss=...)")
    check_type(function, Callable, "observe: the function", "a function from an Observation to scalars, such as research.norms")
    return observed_scalars(learner.train, learner.names, function)


def observed_scalars(train: Step[Any], names: PyTree, function: Observe) -> Callable[[Any, Any], dict[str, Array]]:
    """Returns what `observe` does, of a training step and the names of its state's leaves.

    >>> import research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse", optimizer="sgd")
    >>> scalars = observed_scalars(learner.train, learner.names, lambda observation: {"weights": len(observation.names)})
    >>> scalars(learner.init(), research.Batch(jnp.ones((2, 1)), jnp.ones((2, 1))))["weights"].item()
    2
    """
    many = any(map(_is_population, jax.tree.leaves(names, is_leaf=_is_population)))

    def scalars(state: Any, batch: Any) -> dict[str, Array]:
        program, shapes = jax.make_jaxpr(train, return_shape=True)(state, batch)
        results, tagged = _evaluate(program, jax.tree.leaves((state, batch)), ())
        after, _ = jax.tree.unflatten(jax.tree.structure(shapes), results)
        values: dict[str, Array] = {}
        parts = zip(_scopes(names, tagged), states_in(names), states_in(state), states_in(after), strict=True)
        for scope, labels, old, new in parts:
            updates = jax.tree.map(lambda a, b: a - b, new.trainable, old.trainable)
            gradients, rate = _tagged(tagged, scope, new.trainable)
            observation = Observation(new.trainable, updates, gradients, rate, _without_prefix(labels.trainable, scope))
            found = _of_members(function, observation) if many else _checked(function(observation))
            values |= {"_".join([*scope, name]): value for name, value in found.items()}
        return values

    return scalars


def _evaluate(program: Any, args: Sequence[Any], scope: Scope) -> tuple[list[Any], Tagged]:
    """Evaluates a program. Returns its results and what is tagged in it, also inside the programs that it calls once."""
    tagged: Tagged = {}
    scopes = [*scope]

    def apply(equation: Any, operands: list[Any]) -> Sequence[Any]:
        name = parameters(equation).get("name") if equation.primitive.name == "name" else None
        if name is not None:
            if name.startswith(BEGIN):
                scopes.append(name.removeprefix(BEGIN))
            elif name == END:
                scopes.pop()
            else:
                tagged[(*scopes,), name] = operands[0]
            return bind_equation(equation, operands)
        if not any(inner.primitive.name == "name" for each in inner_programs(equation) for inner in equations(each)):
            return bind_equation(equation, operands)
        if is_plain_call(equation):
            results, found = _evaluate(called_program(equation), operands, (*scopes,))
        elif is_cond(equation):
            results, found = _evaluate_cond(equation, operands, (*scopes,))
        else:
            return bind_equation(equation, operands)
        tagged.update(found)
        return results

    return interpret(program, args, apply), tagged


def _evaluate_cond(equation: Any, operands: list[Any], scope: Scope) -> tuple[list[Any], Tagged]:
    """Evaluates a `cond` or `switch`. What only another branch has tagged than the one that runs is zero."""
    index, *arguments = operands
    branches = [functools.partial(_evaluate, branch, scope=scope) for branch in inner_programs(equation)]
    shapes: Tagged = {}
    for branch in branches:
        shapes |= jax.eval_shape(lambda *args, branch=branch: branch(args)[1], *arguments)

    def with_all(branch: Any) -> Callable[..., tuple[list[Any], list[Any]]]:
        def call(*args: Any) -> tuple[list[Any], list[Any]]:
            results, found = branch(args)
            return results, [found[key] if key in found else jnp.zeros(leaf.shape, leaf.dtype) for key, leaf in shapes.items()]

        return call

    results, values = jax.lax.switch(index, [with_all(branch) for branch in branches], *arguments)
    return results, dict(zip(shapes, values, strict=True))


def _scopes(names: PyTree, tagged: Tagged) -> list[Scope]:
    """Returns the scope of each `State` in a learner's state: where it lies, in the words of `joint`."""
    paths = jax.tree_util.tree_leaves_with_path(names, is_leaf=lambda node: isinstance(node, State))
    scopes = [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path if key not in WRAPPERS)
        for path, node in paths
        if isinstance(node, State)
    ]
    known = {scope for scope, _ in tagged}
    return [()] if len(scopes) == 1 and scopes[0] not in known else scopes


def _tagged(tagged: Tagged, scope: Scope, weights: PyTree) -> tuple[PyTree | None, Any]:
    """Returns the gradients in a scope, with the structure of its weights, and the learning rate; None if they are not known."""
    leaves, structure = jax.tree.flatten(weights)
    gradients = [tagged.get((scope, f"{GRADIENT}/{i}")) for i in range(len(leaves))]
    known = bool(leaves) and all(g is not None and g.shape == w.shape for g, w in zip(gradients, leaves, strict=True))
    return (jax.tree.unflatten(structure, gradients) if known else None), tagged.get((scope, f"{LEARNING_RATE}/0"))


def _is_population(node: Any) -> bool:
    return isinstance(node, PopulationState)


def _of_members(function: Observe, observation: Observation) -> dict[str, Array]:
    """Returns what a function computes for each member of a population, and the means."""
    weights, updates, gradients, rate, names = observation
    if rate is not None:
        rate = jnp.broadcast_to(rate, num_rows(weights))

    def of_one(weights: PyTree, updates: PyTree, gradients: PyTree | None, rate: Any) -> dict[str, Array]:
        return _checked(function(Observation(weights, updates, gradients, rate, names)))

    each = jax.vmap(of_one)(weights, updates, gradients, rate)
    return {name: jnp.mean(value, 0) for name, value in each.items()} | {f"{name}{MEMBERS_SUFFIX}": v for name, v in each.items()}


def _without_prefix(names: PyTree, scope: Scope) -> PyTree:
    prefix = "".join(f"{name}/" for name in scope)
    return jax.tree.map(lambda name: name.removeprefix(prefix), names)


def _checked(values: Any) -> dict[str, Array]:
    """Returns what a user's function returned. Raises `InvalidArgument` unless it is a dict of scalars."""
    if not isinstance(values, dict):
        raise InvalidArgument(f"observe: the function returned {type(values).__name__}; expected a dict of scalars by name.")
    for name, value in values.items():
        if jnp.shape(value) != ():
            raise InvalidArgument(f"observe: {name!r} has the shape {jnp.shape(value)}; expected a scalar, such as a norm.")
    return {name: jnp.asarray(value) for name, value in values.items()}


def _layers(names: Sequence[str]) -> list[str]:
    """Returns the layer of each weight, without the name of the model that all of them are in."""
    paths = [name.split("/")[:-1] or [name] for name in names]
    common = len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 1
    return ["/".join(path[common:]) for path in paths]


def _norm(leaves: Sequence[Any]) -> Float[Array, ""]:
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros(())))

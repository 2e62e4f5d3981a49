"""Whether a learner written by hand keeps the contract of `Learner`."""

from collections import Counter
from typing import Any

import jax
import keras  # noqa: F401  (for the example in a docstring)
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.state import InvalidArgument, State, states_in
from research.training.errors import shared_leaves

Leaves = dict[str, Any]  # path in the state -> leaf


def check_learner(learner: Learner, state: PyTree, example: Any = None) -> None:
    """Raises `InvalidArgument`, naming the leaf, unless a learner keeps the contract of `Learner`.

    `state` is what `learner.init()` returned, or its `jax.ShapeDtypeStruct`s. `names` must have the structure of the state
    and a unique string per leaf, every `State` a dict of metrics, and no two arrays may share a buffer. With `example`, a batch
    or its shapes, `reset`, `train` and `evaluate` are traced as well: each must return a state of the same structure, shapes and
    dtypes, with logs as a dict, and `evaluate` must return the weights unchanged. Nothing is computed.

    >>> import research
    >>> learner = research.supervised(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), loss="mse")
    >>> check_learner(learner, learner.init())
    >>> check_learner(learner._replace(names=learner.names._replace(trainable=["kernel"])), learner.init())
    Traceback (most recent call last):
    research.core.state.InvalidArgument: learner: names lacks .trainable[1]; expected a name for every leaf of the state.
    """
    leaves = _leaves(state)
    _check_names(learner.names, leaves)
    for node in states_in(state):
        if not isinstance(node.metrics, dict):
            raise InvalidArgument(
                f"learner: State.metrics is a {type(node.metrics).__name__}; expected a dict, {{}} without metrics."
            )
    _check_buffers(state, leaves)
    if example is not None:
        _check_functions(learner, jax.eval_shape(lambda: state), example)


def _leaves(tree: PyTree) -> Leaves:
    return {jax.tree_util.keystr(path) or "the state": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_names(names: PyTree, leaves: Leaves) -> None:
    given = _leaves(names)
    for path in leaves:
        if path not in given:
            raise InvalidArgument(f"learner: names lacks {path}; expected a name for every leaf of the state.")
    for path, name in given.items():
        if path not in leaves:
            raise InvalidArgument(f"learner: names has {path}, which the state lacks; expected the structure of the state.")
        if not isinstance(name, str):
            raise InvalidArgument(f"learner: names{path} is a {type(name).__name__}; expected a string.")
    name, count = next(iter(Counter(given.values()).most_common(1)), ("", 0))
    if count > 1:
        twice = " and ".join(path for path, other in given.items() if other == name)
        raise InvalidArgument(f"learner: {twice} are all called {name!r}; expected a unique name per leaf.")


def _check_buffers(state: PyTree, leaves: Leaves) -> None:
    shared = shared_leaves(state)
    if shared is not None:
        first, second = (list(leaves)[position] for position in shared)
        raise InvalidArgument(
            f"learner: {first} and {second} share one buffer; expected an array of its own for each, since training "
            "donates the state: copy one in init, jnp.copy(...)."
        )


def _check_functions(learner: Learner, shapes: PyTree, example: Any) -> None:
    _check_same("reset", shapes, jax.eval_shape(learner.reset, shapes))
    for name in ("train", "evaluate"):
        result = jax.eval_shape(getattr(learner, name), shapes, example)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise InvalidArgument(
                f"learner: {name} returns {type(result).__name__}; expected (state, logs), with a dict of logs."
            )
        _check_same(name, shapes, result[0])
    program = jax.make_jaxpr(learner.evaluate)(shapes, example).jaxpr
    weights = jax.tree.leaves(_mark_weights(shapes))
    for path, is_weight, before, after in zip(_leaves(shapes), weights, program.invars, program.outvars, strict=False):
        if is_weight and before is not after:
            raise InvalidArgument(f"learner: evaluate changes {path}; expected it to return the weights unchanged.")


def _mark_weights(state: PyTree) -> PyTree:
    """Returns True for each leaf of a `State.trainable`, False for every other leaf."""

    def mark(node: Any) -> Any:
        if not isinstance(node, State):
            return False
        return jax.tree.map(lambda _: False, node)._replace(trainable=jax.tree.map(lambda _: True, node.trainable))

    return jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, State))


def _check_same(function: str, before: PyTree, after: PyTree) -> None:
    old, new = _leaves(before), _leaves(after)
    for path in {**old, **new}:
        if path not in old or path not in new:
            change = "drops" if path in old else "adds"
            raise InvalidArgument(f"learner: {function} {change} {path}; expected a state of the same structure.")
        was, now = ((tree[path].dtype, tree[path].shape) for tree in (old, new))
        if was != now:
            raise InvalidArgument(
                f"learner: {function} returns {path} as {now[0]}{list(now[1])}, the state has {was[0]}{list(was[1])}; "
                "expected the same shape and dtype: cast or reshape it."
            )

"""Checks of what users hand to `train`, `evaluate` and `predict`, before anything is compiled."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import keras

from research.core.learner import Learner
from research.core.state import InvalidArgument, State, type_name
from research.data.arrays import check_integer
from research.data.batches import Batches


def check_learner(function: str, learner: Any) -> None:
    """Raises `InvalidArgument` unless this is a `Learner`. `function` stands for the caller in messages.

    >>> check_learner("train", keras.Sequential())
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: the learner is a Sequential, expected a research.Learner: make one of a model ...
    """
    if isinstance(learner, Learner):
        return
    hint = "pass a learner first, then the data."
    if isinstance(learner, keras.Layer):
        hint = "make one of a model with research.supervised(model, loss=...), or call research.fit(model, x, y)."
    raise InvalidArgument(f"{function}: the learner is {type_name(learner)}, expected a research.Learner: {hint}")


def check_data(function: str, data: Any, name: str = "the data") -> None:
    """Raises `InvalidArgument` unless this is `Batches`. `name` stands for the data in messages.

    >>> check_data("evaluate", jnp.zeros(3))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: evaluate: the data is an array, expected research.Batches: pass research.from_arrays...
    """
    if not isinstance(data, Batches):
        hint = "pass research.from_arrays(x, y)." if _is_arrays(data) else "make some with research.from_arrays or research.data."
        hint = "the order is learner, data, state." if isinstance(data, State) else hint
        raise InvalidArgument(f"{function}: {name} is {type_name(data)}, expected research.Batches: {hint}")
    if data.steps_per_epoch < 1:
        raise InvalidArgument(f"{function}: {name} has {data.steps_per_epoch} batches, expected at least one.")


def check_state(function: str, learner: Learner, state: Any) -> None:
    """Raises `InvalidArgument` for a state of another structure than the learner's, or that holds donated arrays, which are gone.

    >>> import research
    >>> counter = research.Learner(lambda: jnp.zeros(()), None, None, None, None, names="count")
    >>> check_state("train", counter, [jnp.zeros(()), jnp.zeros(())])
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: the state is a list with 2 arrays, expected one of this learner, with 1: pass ...
    >>> state = counter.init()
    >>> state.delete()
    >>> check_state("train", counter, state)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: the state was donated to a training step, which deleted it: use the state ...
    """
    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(learner.names):
        arrays, expected = (len(jax.tree.leaves(tree)) for tree in (state, learner.names))
        raise InvalidArgument(
            f"{function}: the state is {type_name(state)} with {arrays} arrays, expected one of this learner, with {expected}: "
            "pass what learner.init() or train returned."
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        raise InvalidArgument(
            f"{function}: the state was donated to a training step, which deleted it: use the state that train, or the step, "
            "returned, or copy this one before, with jax.tree.map(jax.numpy.copy, state)."
        )


def check_schedule(
    steps: Any, epochs: Any, start: Any, log_every: Any, hooks: Any, observe: Any = None, evaluate_every: Any = None
) -> None:
    """Raises `InvalidArgument` for numbers of steps and epochs, for hooks and for `observe`, that `train` can't follow.

    >>> check_schedule(10, None, 0, None, [(-2, print)])
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: the period of hook 0 is -2, expected an integer of at least 1.
    """
    if steps is None and epochs is None:
        raise InvalidArgument("train: steps and epochs are both None, expected at least one: pass steps=1000 or epochs=5.")
    numbers = {"steps": (steps, 0), "epochs": (epochs, 0), "start": (start, 0)}
    for argument, (value, low) in {**numbers, "log_every": (log_every, 1), "evaluate_every": (evaluate_every, 1)}.items():
        if value is not None or argument == "start":
            check_integer(value, argument, "train", low)
    if callable(hooks) or isinstance(hooks, str | Mapping):
        raise InvalidArgument(f"train: hooks is {type_name(hooks)}, expected a list of pairs: hooks=[(100, hook)].")
    for position, hook in enumerate(hooks):
        if not (isinstance(hook, tuple | list) and len(hook) == 2 and callable(hook[1])):
            raise InvalidArgument(
                f"train: hook {position} is {type_name(hook)}, expected a pair of a period in steps and a function: (100, hook)."
            )
        if not callable(hook[0]):
            check_integer(hook[0], f"the period of hook {position}", "train", 1)
    if observe is not None:
        if not (isinstance(observe, tuple | list) and len(observe) == 2 and callable(observe[1])):
            raise InvalidArgument(
                f"train: observe is {type_name(observe)}, expected a pair of a period in steps and a function: "
                "observe=(100, research.norms)."
            )
        check_integer(observe[0], "the period of observe", "train", 1)


def check_evaluations(evaluations: Any) -> None:
    """Raises `InvalidArgument` unless `evaluations` maps names of splits, other than "train", to `Batches`.

    >>> check_evaluations({"train": None})
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: evaluations has a split named 'train', whose logs would be those of ...
    """
    if not isinstance(evaluations, Mapping):
        raise InvalidArgument(
            f"train: evaluations is {type_name(evaluations)}, expected a dict from names to data: {{'val': data}}."
        )
    for split, data in evaluations.items():
        if not isinstance(split, str) or not split:
            raise InvalidArgument(f"train: evaluations has the key {split!r}, expected the name of a split, such as 'val'.")
        if split == "train":
            raise InvalidArgument(
                "train: evaluations has a split named 'train', whose logs would be those of the training itself: "
                "choose another name, such as 'train_eval'."
            )
        check_data("train", data, f"evaluations[{split!r}]")


def check_callables(function: str, **arguments: Any) -> None:
    """Raises `InvalidArgument` for an argument that is neither None nor a function.

    >>> check_callables("train", log=3)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: train: log is an int, expected a function.
    """
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise InvalidArgument(f"{function}: {name} is {type_name(value)}, expected a function.")


def _is_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value) if isinstance(value, tuple | list | dict) else [value]
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)

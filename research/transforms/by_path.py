"""Rules for the weights of a model by their names: frozen ones, and an optimizer for each group of others."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import keras
from jaxtyping import Array, PyTree

from research.core.learner import as_optimizer
from research.core.names import variable_names
from research.core.state import InvalidArgument, State, check_type
from research.core.tags import scope
from research.core.update import Gradients, Update, as_update, update_names


def by_path(rules: Mapping[str, Any]) -> Callable[[Sequence[keras.Variable]], Update]:
    """Returns an optimizer that updates each weight by the first rule whose pattern is found in the weight's name.

    `rules` maps regular expressions, searched in names such as those in `learner.names.trainable`, to optimizers: what
    `model.compile` takes, or optax transformations; None freezes the weights. Each optimizer has a group of weights to itself:
    its state, its schedule, its weight decay and the norm that it clips by are of its group alone. Frozen weights have no slots,
    and their part of the backward pass is not computed. The last rule is usually `""`, which matches all that is left.

    The result is passed as `optimizer` to `supervised` and `learner`. Its state is a list with the state of each optimizer. When
    the learner is built, raises `InvalidArgument` for a weight that no rule matches, for a rule that matches no weight, and if
    all weights are frozen.

    >>> import research
    >>> body, head = (keras.layers.Dense(units, name=name) for units, name in ((3, "body"), (1, "head")))
    >>> model = keras.Sequential([keras.Input((2,)), body, head], name="net")
    >>> rules = by_path({"body/bias": None, "body/": keras.optimizers.SGD(1e-3, momentum=0.9), "": "adam"})
    >>> learner = research.supervised(model, loss="mse", optimizer=rules)
    >>> learner.names.optimizer[0]
    ['group_0/iteration', 'group_0/learning_rate', 'group_0/momentum/net/body/kernel']
    """
    check_type(rules, Mapping, "by_path: the rules", "a dict from regular expressions to optimizers")
    if not rules:
        raise InvalidArgument("by_path: there are no rules, expected a dict from regular expressions to optimizers.")
    optimizers = [None if rule is None else as_optimizer(rule, []) for rule in rules.values()]

    def of_variables(variables: Sequence[keras.Variable]) -> Update:
        groups = _groups(list(rules), variable_names(variables))
        if not any(group for group, optimizer in zip(groups, optimizers, strict=True) if optimizer is not None):
            raise InvalidArgument("by_path: the rules freeze all weights, expected an optimizer for some.")
        updates = [
            (as_update(optimizer, [variables[i] for i in group]), group)
            for optimizer, group in zip(optimizers, groups, strict=True)
            if optimizer is not None
        ]
        return _combined(updates)

    return of_variables


def _groups(patterns: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Returns the positions of the weights of each pattern."""
    groups: list[list[int]] = [[] for _ in patterns]
    for i, name in enumerate(names):
        found = next((k for k, pattern in enumerate(patterns) if _search(pattern, name)), None)
        if found is None:
            raise InvalidArgument(f'by_path: no rule matches {name!r}; add a last rule "" for all that is left.')
        groups[found].append(i)
    for pattern, group in zip(patterns, groups, strict=True):
        if not group:
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise InvalidArgument(f"by_path: {pattern!r} matches no weight that an earlier rule leaves; the weights are {shown}")
    return groups


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except (re.error, TypeError) as error:
        raise InvalidArgument(f"by_path: {pattern!r} is no regular expression ({error}).") from error


def _combined(updates: Sequence[tuple[Update, Sequence[int]]]) -> Update:
    """Returns several updates, each of the weights at some positions, as one."""
    if any(update.loss_scale is not None for update, _ in updates):
        raise InvalidArgument(
            "by_path: an optimizer scales the loss, which belongs to all weights; expected one without a scale."
        )

    def take(values: Sequence[Any], positions: Sequence[int]) -> list[Any]:
        return [values[i] for i in positions]

    def init(trainable: PyTree) -> PyTree:
        return [update.init(take(trainable, positions)) for update, positions in updates]

    def apply(state: State, gradients: Gradients, evaluate: Callable[[PyTree], Gradients] | None = None) -> State:
        trainable, slots = list(state.trainable), []

        def put(positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
            result = list(trainable)
            for i, value in zip(positions, values, strict=True):
                result[i] = value
            return result

        for number, ((update, positions), own) in enumerate(zip(updates, state.optimizer, strict=True)):
            part = gradients._replace(values=take(gradients.values, positions))

            def evaluate_part(values: PyTree, positions: Sequence[int] = positions) -> Gradients:
                assert evaluate is not None
                result = evaluate(put(positions, values))
                return result._replace(values=take(result.values, positions))

            with scope(f"group {number}", part.values):  # several learning rates are not one
                before = State(take(state.trainable, positions), [], own, {})
                after = update.apply(before, part, None if evaluate is None else evaluate_part)
            trainable = put(positions, after.trainable)
            slots.append(after.optimizer)
        return state._replace(trainable=trainable, optimizer=slots)

    def iterations(state: State) -> Array:
        return updates[0][0].iterations(state._replace(optimizer=state.optimizer[0]))

    def names(variables: Sequence[keras.Variable], names: Sequence[str]) -> PyTree:
        groups = [update_names(update, take(variables, positions), take(names, positions)) for update, positions in updates]
        return [jax.tree.map(lambda name, k=k: f"group_{k}/{name}", group) for k, group in enumerate(groups)]

    def learning_rate(state: State) -> Array | None:
        rates = [
            update.learning_rate(state._replace(optimizer=own)) for (update, _), own in zip(updates, state.optimizer, strict=True)
        ]
        return rates[0] if len(rates) == 1 else None

    return Update(init, apply, iterations, learning_rate, names)

"""Several learners as one: adversaries, teacher and student, actor and critic."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the example in a docstring)
import keras  # noqa: F401  (for the example in a docstring)
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import InvalidArgument, Mapped, SharedScope, check_type
from research.core.step import Step
from research.core.tags import scope

Joint = dict[str, Any]  # a state by learner, and what else is threaded, by name
Steps = Mapping[str, Step[Joint]]
Compose = Callable[[Steps, Joint, Any], tuple[Joint, Logs]]


def joint(
    learners: Mapping[str, Learner],
    *,
    train: Compose | None = None,
    evaluate: Compose | None = None,
    predict: Callable[[Mapping[str, Callable[[Joint, Any], PyTree]], Joint, Any], PyTree] | None = None,
    extra: Mapping[str, Callable[[], PyTree]] | None = None,
) -> Learner:
    """Returns one learner of several, each with its own models and optimizer.

    Its state is a dict: the state of each learner by name. A learner's loss may call the models of the others: it sees their
    current weights, takes no gradient with respect to them and changes nothing of them, seeds and statistics included.

    By default a training step is one step of each learner on the same batch, in the order of `learners`; each sees the updates of
    those before it. Logs are prefixed by the learner's name, as in `generator_loss`. `train(steps, state, batch)` composes steps
    freely: `steps[name](state, batch)` is that learner's step on the joint state and returns the next joint state and its
    prefixed logs. `evaluate` does the same for evaluation steps; `predict(predictions, state, batch)` combines the learners'
    predictions, by default into a dict.

    `extra` adds further entries to the state, by name with a function that makes the initial value: keys, environments, replay
    memory. `train` and `evaluate` read and replace them like any entry of a dict.

    Raises `InvalidArgument` if two learners share a variable, or if a name is used twice.

    >>> import research
    >>> def build():
    ...     critic = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="critic")
    ...     actor = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)], name="actor")
    ...     def td_error(batch, training):
    ...         return keras.ops.mean((critic(batch.x) - batch.y) ** 2), {}
    ...     def policy_loss(batch, training):
    ...         return -keras.ops.mean(critic(actor(batch.x))), {}
    ...     batch = research.Batch(jnp.ones((4, 2)), jnp.ones((4, 1)))
    ...     return batch, joint({
    ...         "critic": research.learner(td_error, critic, "sgd", example=batch),
    ...         "actor": research.learner(policy_loss, actor, "sgd", example=batch),
    ...     })
    >>> batch, both = build()
    >>> state, logs = jax.jit(both.train)(both.init(), batch)
    >>> sorted(logs), both.names["actor"].trainable
    (['actor_loss', 'critic_loss'], ['actor/dense/kernel', 'actor/dense/bias'])
    """
    check_type(learners, Mapping, "joint: the first argument", "a dict from names to learners")
    for name, each in learners.items():
        check_type(each, Learner, f"joint: {name!r}", "a research.Learner: other state belongs in `extra`")
    extra = extra or {}
    _check_names(learners, extra)
    _check_disjoint(learners)

    def others(name: str, state: Joint) -> SharedScope:
        mapping = [pair for other, each in learners.items() if other != name for pair in each.state_mapping(state[other])]
        return SharedScope(mapping)

    def on_joint_state(name: str, step: Step[Any]) -> Step[Joint]:
        def call(state: Joint, batch: Any) -> tuple[Joint, Logs]:
            with others(name, state), scope(name, state[name]):
                after, logs = step(state[name], batch)
            return {**state, name: after}, {f"{name}_{key}": value for key, value in logs.items()}

        return call

    def prediction(name: str, function: Callable[[Any, Any], PyTree]) -> Callable[[Joint, Any], PyTree]:
        def call(state: Joint, batch: Any) -> PyTree:
            with others(name, state):
                return function(state[name], batch)

        return call

    training = {name: on_joint_state(name, each.train) for name, each in learners.items()}
    evaluation = {name: on_joint_state(name, each.evaluate) for name, each in learners.items()}
    predictions = {name: prediction(name, each.predict) for name, each in learners.items()}
    compose_train, compose_evaluate = train or _in_order, evaluate or _in_order
    combine = predict or (lambda functions, state, batch: {name: call(state, batch) for name, call in functions.items()})

    def state_mapping(state: Joint) -> Mapped:
        return [pair for name, each in learners.items() for pair in each.state_mapping(state[name])]

    return Learner(
        init=lambda: {name: each.init() for name, each in learners.items()} | {name: make() for name, make in extra.items()},
        reset=lambda state: {**state, **{name: each.reset(state[name]) for name, each in learners.items()}},
        train=lambda state, batch: compose_train(training, state, batch),
        evaluate=lambda state, batch: compose_evaluate(evaluation, state, batch),
        predict=lambda state, batch: combine(predictions, state, batch),
        names={name: _prefixed(name, each.names) for name, each in learners.items()}
        | {name: _extra_names(name, make) for name, make in extra.items()},
        state_mapping=state_mapping,
        # Steps that are composed freely may get other batches than the joint one.
        targets=() if train or evaluate else tuple(pair for each in learners.values() for pair in each.targets),
    )


def _in_order(steps: Steps, state: Joint, batch: Any) -> tuple[Joint, Logs]:
    logs: Logs = {}
    for step in steps.values():
        state, step_logs = step(state, batch)
        logs |= step_logs
    return state, logs


def _prefixed(name: str, names: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if leaf.startswith(f"{name}/") else f"{name}/{leaf}", names)


def _extra_names(name: str, make: Callable[[], PyTree]) -> PyTree:
    def path_name(path: tuple[Any, ...], _: Any) -> str:
        return "/".join([name, *filter(None, [jax.tree_util.keystr(path, simple=True, separator="/")])])

    return jax.tree_util.tree_map_with_path(path_name, jax.eval_shape(make))


def _check_names(learners: Mapping[str, Learner], extra: Iterable[str]) -> None:
    twice = sorted(set(learners) & set(extra))
    if not learners or twice:
        problem = f"{twice[0]!r} names a learner and an entry of extra" if twice else "there is no learner"
        raise InvalidArgument(f"joint: {problem}; expected learners and extra entries by names of their own.")


def _check_disjoint(learners: Mapping[str, Learner]) -> None:
    owners: dict[int, str] = {}
    for name, each in learners.items():
        for variable, _ in each.state_mapping(jax.eval_shape(each.init)):
            owner = owners.setdefault(id(variable), name)
            if owner != name:
                raise InvalidArgument(
                    f"joint: {variable.path!r} belongs to {owner!r} and to {name!r}; expected each model in one learner; "
                    "the others may still call it, and see its current weights."
                )

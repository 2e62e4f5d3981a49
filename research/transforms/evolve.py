"""Population-based training: members that do badly go on from those that do well."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import InvalidArgument, check_type
from research.transforms.population import MEMBERS_SUFFIX, PopulationState, population_size, take_members


class EvolvingState(NamedTuple):
    """The state of a population, the key that changes are drawn from, and the number of steps so far.

    >>> EvolvingState(None, jnp.zeros(2, jnp.uint32), jnp.zeros((), jnp.int32)).steps.item()
    0
    """

    population: PopulationState
    key: Any
    steps: Any


def evolve(
    learner: Learner,
    *,
    every: int,
    metric: str,
    mode: Literal["min", "max"],
    share: float = 0.25,
    explore: Callable[[Any, Array], Any] | None = None,
    seed: int = 0,
) -> Learner:
    """Returns a population whose worst members take over the states of its best (Jaderberg et al., 2017, arXiv:1711.09846).

    Every `every` steps, a `share` of the members with the worst values of the logged `metric` (the largest if `mode` is "min";
    values that are not finite are worse) become copies of as many of the best: weights, optimizer slots, seeds, numbers and
    metrics. `explore(state, key)` then changes the state of each copy, for example its learning rate by `set_learning_rate`; by
    default nothing. All of it is part of the training step. Copies share their seeds: with shared batches they stay equal unless
    `explore` changes something.

    `learner` is what `population` returns. Raises `InvalidArgument` for a share outside of (0, 0.5].

    >>> import keras, research
    >>> def build(seed):
    ...     keras.utils.set_random_seed(seed)
    ...     model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    ...     return research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.0))
    >>> batch = research.Batch(jnp.ones((4, 1)), jnp.ones((4, 1)))
    >>> many = evolve(research.transforms.population(build, 4, example=batch), every=2, metric="loss", mode="min")
    >>> state = many.init()
    >>> losses = lambda: many.evaluate(many.reset(state), batch)[1]["loss_of_members"]
    >>> before = losses()
    >>> for _ in range(2):
    ...     state, _ = jax.jit(many.train)(state, batch)
    >>> bool(losses().max() < before.max()), float(losses().min()) == float(before.min())
    (True, True)
    """
    check_type(learner, Learner, "evolve: the learner", "a research.Learner: research.transforms.population(build, 16, ...)")
    check_type(learner.names, PopulationState, "evolve: the learner's state", "that of research.transforms.population")
    check_type(every, (int, np.integer), "evolve: every", "a number of steps")
    if every < 1 or not 0 < share <= 0.5 or mode not in ("min", "max"):
        raise InvalidArgument(
            f"evolve: every is {every}, share {share}, mode {mode!r}; expected a positive number of steps, a share of the "
            "members above 0 and up to 0.5, and 'min' or 'max'."
        )

    def init() -> EvolvingState:
        return EvolvingState(learner.init(), jax.random.key_data(jax.random.key(seed)), jnp.zeros((), jnp.int32))

    def exploit(state: PopulationState, scores: Array, key: Array) -> PopulationState:
        members = population_size(state)
        count = max(1, int(members * share))
        costs = scores if mode == "min" else -scores
        order = jnp.argsort(jnp.where(jnp.isfinite(costs), costs, jnp.inf))
        best, worst = order[:count], order[members - count :]
        state = take_members(state, jnp.arange(members).at[worst].set(best))
        if explore is None:
            return state
        keys = jax.random.split(jax.random.wrap_key_data(key), members)
        explored = jax.vmap(explore)(state.members, keys)
        copied = jnp.zeros(members, bool).at[worst].set(True)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(copied.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        return state._replace(members=jax.tree.map(choose, explored, state.members))

    def train(state: EvolvingState, batch: Any) -> tuple[EvolvingState, Logs]:
        after, logs = learner.train(state.population, batch)
        if f"{metric}{MEMBERS_SUFFIX}" not in logs:
            known = ", ".join(sorted(name for name in logs if not name.endswith(MEMBERS_SUFFIX)))
            raise InvalidArgument(f"evolve: there is no metric {metric!r}, expected one of {known}.")
        steps = state.steps + 1
        key, now = jax.random.split(jax.random.wrap_key_data(state.key))
        arguments = (after, logs[f"{metric}{MEMBERS_SUFFIX}"], jax.random.key_data(now))
        after = jax.lax.cond(steps % every == 0, exploit, lambda state, *_: state, *arguments)
        return EvolvingState(after, jax.random.key_data(key), steps), logs

    def evaluate(state: EvolvingState, batch: Any) -> tuple[EvolvingState, Logs]:
        after, logs = learner.evaluate(state.population, batch)
        return state._replace(population=after), logs

    return learner._replace(
        init=init,
        reset=lambda state: state._replace(population=learner.reset(state.population)),
        train=train,
        evaluate=evaluate,
        predict=lambda state, batch: learner.predict(state.population, batch),
        names=EvolvingState(learner.names, "evolve/key", "evolve/steps"),
        state_mapping=lambda state: [],
    )

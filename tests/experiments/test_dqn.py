"""DQN: its memory is a queue of fixed length, its targets by hand, and what an update and a short training change."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from experiments import dqn

SMALL = {"updates": 3, "minibatch": 16, "units": 8, "capacity": 20}


def transitions(first: int, count: int) -> dqn.Transitions:
    """Transitions with consecutive numbers for everything."""
    numbers = jnp.arange(first, first + count)
    observations = jnp.stack([numbers.astype(jnp.float32)] * 4, -1)
    return dqn.Transitions(observations, numbers, observations[:, 0], observations + 1, numbers % 3 == 0)


def test_the_memory_is_a_queue_that_forgets_the_oldest_transitions() -> None:
    memory, queue = dqn.empty_memory(dqn.Config(capacity=20)), deque(maxlen=20)
    write = jax.jit(dqn.write)
    for first in range(0, 56, 8):
        memory = write(memory, transitions(first, 8))
        queue.extend(range(first, first + 8))
        held = np.asarray(memory.transitions.action)[: len(queue)]
        assert sorted(held) == list(queue)
        assert memory.written == first + 8
        drawn = dqn.draw(memory, jax.random.key(first), 400)
        assert set(np.asarray(drawn.action).tolist()) == set(queue)
        for leaf, every in zip(drawn, transitions(0, 56), strict=True):
            np.testing.assert_array_equal(leaf, every[drawn.action])


def test_targets_are_the_target_networks_values_of_the_actions_that_the_network_prefers() -> None:
    online, target = np.random.default_rng(0).normal(size=(2, 32, 2)).astype(np.float32)
    batch = transitions(0, 32)
    found = dqn.targets(dqn.Config(discount=0.9), batch, jnp.asarray(online), jnp.asarray(target))
    for i in range(32):
        best = 0 if online[i, 0] > online[i, 1] else 1
        np.testing.assert_allclose(found[i], i if i % 3 == 0 else i + 0.9 * target[i, best], rtol=1e-6)


@pytest.mark.slow
def test_a_step_fills_the_memory_trains_against_frozen_targets_and_then_renews_them() -> None:
    config = dqn.Config(**SMALL)
    learner, splits = dqn.build(config), dqn.data(config)
    state = learner.init()
    research.check_learner(learner, state, splits["train"].shapes)
    train = jax.jit(learner.train)
    for step in range(2):
        before = state
        state, logs = train(before, splits["train"].batch(step))
        assert state.memory.written == 8 * 3 * (step + 1)
        jax.tree.map(np.testing.assert_array_equal, state.target, state.agent.trainable)
        assert not np.array_equal(state.target[0], before.target[0])
        assert np.isfinite(logs["loss"])
    rows = state.memory.transitions  # of a full memory of 20, whose oldest row is that of transition 28
    order = (np.arange(20) + 48) % 20
    for old, new in zip(order[:-8], order[8:], strict=True):  # the same environment, one step later
        if not rows.terminated[old]:
            np.testing.assert_array_equal(rows.next_observation[old], rows.observation[new])


@pytest.mark.slow
def test_after_2_epochs_greedy_episodes_are_longer_than_those_of_a_random_policy() -> None:
    config = dqn.Config(epochs=2)
    learner, splits = dqn.build(config), dqn.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    assert research.evaluate(learner, splits["test"], state)["return"] >= 80  # 22 by chance

"""PPO and the environment that it shares with DQN: CartPole by NumPy's formulas, estimates and losses by hand, returns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from experiments import _cartpole, ppo

SMALL = {"batch_size": 8, "rollout": 16, "units": 8, "passes": 2}


def numpy_step(physics: np.ndarray, action: int) -> np.ndarray:
    """The formulas of Gymnasium's CartPole, with its names."""
    x, x_dot, theta, theta_dot = np.float64(physics)
    gravity, masscart, masspole, length, tau = 9.8, 1.0, 0.1, 0.5, 0.02
    total_mass, polemass_length, force = masspole + masscart, masspole * length, 10.0 if action == 1 else -10.0
    costheta, sintheta = np.cos(theta), np.sin(theta)
    temp = (force + polemass_length * theta_dot**2 * sintheta) / total_mass
    thetaacc = (gravity * sintheta - costheta * temp) / (length * (4.0 / 3.0 - masspole * costheta**2 / total_mass))
    xacc = temp - polemass_length * thetaacc * costheta / total_mass
    return np.array([x + tau * x_dot, x_dot + tau * xacc, theta + tau * theta_dot, theta_dot + tau * thetaacc])


def test_cartpole_moves_ends_and_begins_again_as_by_the_formulas_in_numpy() -> None:
    environments = _cartpole.first(3, 8)
    # The last two are about to reach the limit of steps: one of them falls in the same step.
    physics = environments.physics.at[6].set(0.0).at[7].set(jnp.array([0.0, 0.0, 0.2094, 1.0]))
    environments = _cartpole.CartPole(physics, environments.steps.at[6:].set(499))
    keys = jax.random.split(jax.random.key(0), (2, 8))
    roll = jax.jit(lambda: _cartpole.rollout(lambda x: jnp.zeros((8, 2)), environments, keys, 100))
    after, (before, actions, _, outcome) = jax.tree.map(np.asarray, roll())
    ends = 0
    for t in range(100):
        for i in range(8):
            expected = numpy_step(before.physics[t, i], actions[t, i])
            terminated = bool(abs(expected[0]) > 2.4 or abs(expected[2]) > 12 * 2 * np.pi / 360)
            truncated = not terminated and before.steps[t, i] == 499
            np.testing.assert_allclose(outcome.observation[t, i], expected, rtol=1e-5, atol=1e-6)
            assert (outcome.terminated[t, i], outcome.truncated[t, i], outcome.reward[t, i]) == (terminated, truncated, 1)
            following = after if t == 99 else jax.tree.map(lambda leaf, t=t: leaf[t + 1], before)
            if terminated or truncated:
                ends += 1
                assert following.steps[i] == 0
                assert (np.abs(following.physics[i]) <= 0.05).all()
            else:
                assert following.steps[i] == before.steps[t, i] + 1
                np.testing.assert_array_equal(following.physics[i], outcome.observation[t, i])
    assert outcome.truncated.sum() == outcome.truncated[0, 6] == 1
    assert outcome.terminated[0, 7]
    assert ends > 20
    assert 0.4 < actions.mean() < 0.6


def test_no_two_splits_steps_or_environments_have_a_key_in_common() -> None:
    splits = _cartpole.key_batches(seed=1, environments=4, steps_per_epoch=3)
    batches = [*(splits["train"].batch(step) for step in range(7)), splits["val"].batch(0), splits["test"].batch(0)]
    rows = np.concatenate([batch.x for batch in batches])
    assert len(np.unique(rows, axis=0)) == len(rows) == 7 * 4 + 2 * 128
    np.testing.assert_array_equal(splits["val"].batch(5).x, splits["val"].batch(0).x)


def test_a_greedy_episode_ends_where_the_pole_falls() -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    physics, mask = jax.jit(lambda: _cartpole.episodes(lambda x: jnp.ones(len(x), jnp.int32), keys))()
    for i in range(3):
        state, steps = np.asarray(physics[i, 0]), 0
        while abs(state[0]) <= 2.4 and abs(state[2]) <= 12 * 2 * np.pi / 360:
            np.testing.assert_allclose(physics[i, steps], state, rtol=1e-4, atol=1e-5)
            state, steps = numpy_step(state, 1), steps + 1
        assert mask[i].sum() == steps
        assert mask[i, :steps].all()


def test_advantages_are_sums_of_discounted_errors_until_the_episode_ends() -> None:
    config, rng = ppo.Config(discount=0.9, trace=0.8), np.random.default_rng(0)
    rewards, values, next_values = rng.normal(size=(3, 6, 2)).astype(np.float32)
    terminated, truncated = np.zeros((2, 6, 2), bool)
    terminated[2, 0] = truncated[3, 1] = True
    outcome = _cartpole.Outcome(jnp.zeros((6, 2, 4)), *map(jnp.asarray, (rewards, terminated, truncated)))
    estimates = ppo.advantages(config, outcome, jnp.asarray(values), jnp.asarray(next_values))
    for i in range(2):
        for t in range(6):
            expected, weight = 0.0, 1.0
            for k in range(t, 6):
                error = rewards[k, i] - values[k, i] + (0.0 if terminated[k, i] else 0.9 * next_values[k, i])
                expected, weight = expected + weight * error, weight * 0.9 * 0.8
                if terminated[k, i] or truncated[k, i]:
                    break
            np.testing.assert_allclose(estimates[t, i], expected, rtol=1e-5)


def test_the_loss_is_the_clipped_objective_by_hand() -> None:
    config, rng = ppo.Config(**SMALL), np.random.default_rng(0)
    actor, critic = ppo.networks(config)
    x = rng.normal(size=(32, 4)).astype(np.float32)
    action, old = rng.integers(0, 2, 32).astype(np.int32), rng.uniform(-1.2, -0.3, 32).astype(np.float32)
    advantage, target = rng.normal(size=(2, 32)).astype(np.float32)
    total, scalars = ppo.objective(config, actor, critic)(ppo.Samples(x, action, old, advantage, target), training=True)
    logits, value = np.float64(actor(x)), np.float64(critic(x))[:, 0]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    normal = (advantage - advantage.mean()) / advantage.std()
    surrogate, clipped = [], 0
    for i in range(32):
        ratio = probabilities[i, action[i]] / np.exp(old[i])
        clipped += abs(ratio - 1) > 0.2
        surrogate.append(min(ratio * normal[i], min(max(ratio, 0.8), 1.2) * normal[i]))
    assert 0 < clipped < 32
    entropy = -np.mean(np.sum(probabilities * np.log(probabilities), 1))
    value_loss = np.mean((value - target) ** 2) / 2
    expected = {"policy_loss": -np.mean(surrogate), "value_loss": value_loss, "entropy": entropy}
    for name, number in expected.items():
        np.testing.assert_allclose(scalars[name], number, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(total, -np.mean(surrogate) + 0.5 * value_loss - 0.01 * entropy, rtol=1e-4)


@pytest.mark.slow
def test_a_step_acts_by_the_weights_before_it_continues_the_episodes_and_logs_the_returns_of_finished_ones() -> None:
    config = ppo.Config(**SMALL)
    (learner, networks), splits = ppo.algorithm(config), ppo.data(config)
    state, totals = learner.init(), np.zeros(2)
    research.check_learner(learner, state, splits["train"].shapes)

    @jax.jit
    def rollout(state: ppo.State, batch: research.Batch) -> Any:
        weights = research.part(learner, state, networks["actor"]).trainable
        policy = lambda x: networks["actor"].stateless_call(weights, [], x)[0]  # noqa: E731
        return _cartpole.rollout(policy, state.environments, _cartpole.keys(batch, 3)[:2], config.rollout)

    step = jax.jit(learner.train)
    for index in range(4):
        batch = splits["train"].batch(index)
        environments, (before, _, _, outcome) = rollout(state, batch)
        done = np.asarray(outcome.terminated | outcome.truncated)
        totals += [np.asarray(before.steps + 1)[done].sum(), done.sum()]
        state, logs = step(state, batch)
        np.testing.assert_allclose(state.environments.physics, environments.physics, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.returns, totals)
        np.testing.assert_allclose(logs["return"], totals[0] / max(totals[1], 1), rtol=1e-6)


@pytest.mark.slow
def test_after_10_epochs_greedy_episodes_have_a_mean_return_of_at_least_475() -> None:
    config = ppo.Config(epochs=10)
    learner, splits = ppo.build(config), ppo.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    mean = research.evaluate(learner, splits["test"], state)["return"]
    _, mask = research.predict(learner, splits["test"], state)
    np.testing.assert_allclose(mean, mask.sum(1).mean(), rtol=1e-6)
    assert mean >= 475

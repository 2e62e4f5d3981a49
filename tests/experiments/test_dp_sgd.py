"""Private training: the noise is what the accountant needs, and batches are drawn by chance."""

import pytest

import research
from experiments import dp_sgd

CONFIG = dp_sgd.Config(epochs=2, batch_size=64)


def test_the_noise_spends_the_epsilon_of_the_config() -> None:
    steps = dp_sgd.num_steps(CONFIG)
    assert steps == 2 * 23
    found = dp_sgd.results(CONFIG, None, None, {})
    assert found == {"epsilon": pytest.approx(3.0, rel=1e-3), "noise": dp_sgd.noise(CONFIG)}
    assert dp_sgd.spent(CONFIG, 2 * steps) > 3.5


def test_each_example_is_in_a_batch_by_chance() -> None:
    data = dp_sgd.data(CONFIG)["train"]
    assert len({int(data.batch(step).valid.sum()) for step in range(5)}) > 1


def test_without_privacy_the_network_is_trained_by_plain_sgd() -> None:
    config = dp_sgd.Config(epsilon=None, epochs=1, batch_size=64)
    state = dp_sgd.build(config).init()
    assert isinstance(state, research.State)
    assert not isinstance(state.optimizer, dict)
    assert dp_sgd.results(config, None, None, {}) == {}

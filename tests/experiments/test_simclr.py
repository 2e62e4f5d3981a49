"""SimCLR: its loss is the paper's, its views are those of the authors' example, and features that a linear probe can read."""

import jax
import keras
import numpy as np
import pytest

import research
from experiments import _data, simclr
from research.distributed import mesh, shard

pytestmark = pytest.mark.slow

SMALL = simclr.Config(channels=4, units=32, projection=8, batch_size=8)


def test_the_loss_is_that_of_algorithm_1_of_the_paper() -> None:
    rng, temperature = np.random.default_rng(0), 0.3
    pairs = rng.normal(size=(5, 2, 3)).astype(np.float32)
    pairs /= np.linalg.norm(pairs, axis=-1, keepdims=True)
    z = np.float64(pairs).reshape(10, 3)  # z[2k] and z[2k + 1] are the views of example k
    losses, nearest = [], []
    for i in range(10):
        j = i + 1 if i % 2 == 0 else i - 1
        similarities = {k: z[i] @ z[k] / temperature for k in range(10) if k != i}
        losses.append(-similarities[j] + np.log(sum(np.exp(value) for value in similarities.values())))
        nearest.append(max(similarities, key=similarities.__getitem__) == j)
    loss, accuracy = simclr.nt_xent(np.concatenate([pairs[:, 0], pairs[:, 1]]), temperature)
    np.testing.assert_allclose(float(loss), np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(float(accuracy), np.mean(nearest), rtol=1e-6)


def test_a_view_is_the_signal_without_its_trend_shifted_around() -> None:
    config = simclr.Config(slope=0.0, offset=0.0)
    signals = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    views = np.asarray(simclr.random_view(config, signals, keras.random.SeedGenerator(0)))
    time, shifts = np.arange(40), []
    for signal, view in zip(signals, views, strict=True):
        flat = signal - np.polyval(np.polyfit(time, signal, 1), time)
        (shift,) = (shift for shift in range(40) if np.allclose(np.roll(flat, shift), view, atol=1e-5))
        shifts.append(shift)
    assert set(shifts) <= set(range(10))
    assert len(set(shifts)) > 5


def test_random_trends_have_the_deviations_of_the_config() -> None:
    config = simclr.Config(slope=0.2, offset=0.7)
    views = np.asarray(simclr.random_view(config, np.zeros((4000, 40), np.float32), keras.random.SeedGenerator(0)))
    slopes = np.diff(views, axis=1)
    np.testing.assert_allclose(slopes, slopes[:, :1].repeat(39, 1), atol=1e-5)
    np.testing.assert_allclose([slopes[:, 0].std(), views.mean(1).std()], [0.2, 0.7], rtol=0.05)


@pytest.fixture(scope="module")
def learner() -> research.Learner:
    return simclr.build(SMALL)


@pytest.fixture(scope="module")
def batch() -> research.Batch:
    return simclr.data(SMALL)["train"].batch(0)


def test_views_come_from_the_state_and_differ_within_a_step_and_from_step_to_step(
    learner: research.Learner, batch: research.Batch
) -> None:
    state, evaluate = learner.init(), jax.jit(learner.evaluate)
    after, first = evaluate(state, batch)
    _, again = evaluate(state, batch)
    _, second = evaluate(learner.reset(after), batch)
    assert float(first["loss"]) == float(again["loss"]) != float(second["loss"])
    networks, seed = simclr.models(SMALL, state), keras.random.SeedGenerator(0)
    project = jax.jit(lambda views: networks["projection"](networks["encoder"](views)))

    def loss(*seeds: keras.random.SeedGenerator) -> float:
        views = np.concatenate([simclr.random_view(SMALL, batch.x, seed) for seed in seeds])
        return float(simclr.nt_xent(project(views), SMALL.temperature)[0])

    # One generator draws the second view after the first; two with the same seed draw the same view twice.
    np.testing.assert_allclose(float(first["loss"]), loss(seed, seed), rtol=1e-4)
    same = [keras.random.SeedGenerator(0) for _ in range(2)]
    assert loss(*same) < float(first["loss"]) - 0.01


def test_on_eight_devices_a_view_is_compared_with_those_of_the_complete_batch(
    learner: research.Learner, batch: research.Batch
) -> None:
    sharded = shard(learner, mesh(data=8))  # one example for each device
    losses = [float(jax.jit(each.train)(each.init(), batch)[1]["loss"]) for each in (learner, sharded)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_twins_become_more_similar_than_other_views(learner: research.Learner, batch: research.Batch) -> None:
    state, train, accuracies = learner.init(), jax.jit(learner.train), []
    for _ in range(400):
        state, logs = train(learner.reset(state), batch)
        accuracies.append(float(logs["contrastive_accuracy"]))
    assert np.mean(accuracies[-50:]) > 4 * np.mean(accuracies[:10])  # at first by chance, 1 of 15


def test_the_probe_of_the_signals_is_that_of_the_authors() -> None:
    x, y = _data.load_mnist1d()
    assert simclr.probe((x[:4000], y[:4000]), (x[4000:], y[4000:])) == pytest.approx(0.328, abs=0.01)

"""Flow matching: the regression of the paper, the solver of the ODE, and what a short training draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from experiments import _data, _judge, flow

pytestmark = pytest.mark.slow

SMALL = flow.Config(units=16, blocks=1, batch_size=8, solver_steps=4, averaging=0.5)


@pytest.fixture(scope="module")
def learner() -> research.Learner:
    return flow.build(SMALL)


def test_the_loss_is_the_regression_on_the_velocities_of_straight_paths(learner: research.Learner) -> None:
    batch = flow.data(SMALL)["val"].batch(0)
    state = learner.init()
    _, logs = jax.jit(learner.evaluate)(state, batch)
    # The initial network returns 0, so that the loss is the mean square of image - noise, whose noise has the variance 1.
    expected = np.mean(np.square(batch.x, dtype=np.float64)) + 1
    np.testing.assert_allclose(float(logs["loss"]), expected, rtol=0.03)
    rng = np.random.default_rng(0)
    weights = [average + rng.normal(0, 0.2, average.shape).astype(np.float32) for average in state.average[0]]
    trained = state._replace(average=[weights])
    _, logs = jax.jit(learner.evaluate)(trained, batch)
    model, (seed,) = flow.models(SMALL, trained)["velocity"], state.state.non_trainable
    noise = np.asarray(jax.random.normal(jax.random.wrap_key_data(seed), batch.x.shape))
    time = np.asarray(jax.random.uniform(jax.random.wrap_key_data(seed + jnp.array([0, 1], seed.dtype)), (len(noise), 1)))
    point = (1 - time[..., None]) * noise + time[..., None] * batch.x  # equation 22 of the paper with sigma_min = 0
    loss = np.mean((np.asarray(model([point, time])) - (batch.x - noise)) ** 2)
    np.testing.assert_allclose(float(logs["loss"]), loss, rtol=1e-5)


def test_the_solver_has_the_second_order() -> None:
    start = jnp.ones((2, 3, 3))
    errors = []
    for steps in (8, 16):
        path = flow.integrate(lambda point, time: point * time[..., None], start, steps)  # x' = t x: x(t) = exp(t^2 / 2)
        assert path.shape == (steps + 1, 2, 3, 3)
        np.testing.assert_array_equal(path[0], start)
        errors.append(float(jnp.abs(path[-1] - jnp.exp(0.5)).max()))
    assert errors[0] < 2e-3
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_samples_are_the_ends_of_the_averaged_networks_paths(learner: research.Learner) -> None:
    train = flow.data(SMALL)["train"]
    state, noise = learner.init(), flow.noise(3)
    np.testing.assert_array_equal(learner.predict(state, research.Batch(noise)), noise)  # the initial velocity is 0
    step_once = jax.jit(learner.train)
    for step in range(3):
        state, _ = step_once(state, train.batch(step))
    model, point = flow.models(SMALL, state)["velocity"], noise
    for average, weight, last in zip(state.average[0], model.weights, state.state.trainable, strict=True):
        np.testing.assert_array_equal(weight, average)
        assert np.any(weight != last)
    for step in range(4):
        start, end = (np.full((3, 1), time, np.float32) for time in (step / 4, (step + 1) / 4))
        first = np.asarray(model([point, start]))
        point = point + (first + np.asarray(model([point + first / 4, end]))) / 8
    np.testing.assert_allclose(learner.predict(state, research.Batch(noise)), point, rtol=1e-4, atol=1e-5)
    assert np.abs(point - noise).max() > 1e-3


def test_after_20_epochs_samples_are_near_to_images_and_no_copies() -> None:
    config = flow.Config(units=128, blocks=1, epochs=20, averaging=0.98, solver_steps=8)
    learner, splits = flow.build(config), flow.data(config)
    train, test = (_data.all_examples(splits[split]).x for split in ("train", "test"))

    def novelty(samples: np.ndarray) -> float:
        distances, of_test = (np.median(_judge.nearest_images(images, train)[0]) for images in (samples, test))
        return float(distances / of_test)

    noise = flow.noise(200)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    assert novelty(noise) > 4
    assert 1.0 <= novelty(np.asarray(learner.predict(state, research.Batch(noise)))) <= 2.5

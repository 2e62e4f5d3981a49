"""Learning rates: the data are those of the authors' package, and both starts move to the best rate."""

import hashlib

import jax
import numpy as np
import pytest

import research
from experiments import _data, hypergradient

pytestmark = pytest.mark.slow


def test_the_data_are_those_of_the_package_mnist1d() -> None:
    x, y = _data.load_mnist1d()
    # Of `mnist1d.data.make_dataset()`, version 0.0.2.post1: compared once, equal as float32.
    np.testing.assert_allclose(x[0, :4], [-0.3320057, -0.4719104, -0.7786971, -1.0097408], rtol=1e-6)
    np.testing.assert_allclose(np.float64(x[:4000]).sum(), -51.7875, rtol=1e-5)
    assert y[:12].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1, 6, 9]
    assert hashlib.sha256(y.tobytes()).hexdigest()[:16] == "343d27bb023cbbfe"


@pytest.mark.complete
def test_the_gradient_is_that_of_central_differences_and_both_rates_move_to_the_best_one() -> None:
    config = hypergradient.Config(inner_steps=40, epochs=25)
    learner, mean_loss = hypergradient.algorithm(config)
    train = hypergradient.data(config)["train"]
    loss, batches = jax.jit(mean_loss), train.batch(0)
    difference = (float(loss(0.52, batches)) - float(loss(0.48, batches))) / 0.04
    np.testing.assert_allclose(jax.jit(jax.grad(mean_loss))(0.5, batches), difference, rtol=1e-2)
    state, _ = research.train(learner, train, epochs=config.epochs)
    rates = np.asarray(state.trainable[0])
    losses = [float(loss(rate, batches)) for rate in np.linspace(0.1, 2.0, 39)]
    assert max(float(loss(rate, batches)) for rate in rates) < min(losses) + 1e-3

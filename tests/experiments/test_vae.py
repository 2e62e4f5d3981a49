"""The variational autoencoder: its loss is the paper's, and what a short training reaches."""

import jax
import numpy as np
import pytest

import research
from experiments import _data, vae

pytestmark = pytest.mark.slow


def test_the_loss_is_the_negative_evidence_lower_bound() -> None:
    config = vae.Config(latent=4, units=16, batch_size=8)
    learner, splits = vae.build(config), vae.data(config)
    state, batch = learner.init(), splits["train"].batch(0)
    networks = vae.models(config, state)
    mean, log_variance = np.split(np.asarray(networks["encoder"](batch.x), np.float64), 2, axis=-1)
    kl = -0.5 * np.sum(1 + log_variance - mean**2 - np.exp(log_variance), axis=-1)  # appendix B of the paper
    _, logs = jax.jit(learner.evaluate)(state, batch)
    np.testing.assert_allclose(float(logs["kl"]), kl.mean(), rtol=1e-5)
    np.testing.assert_allclose(float(logs["loss"]), float(logs["reconstruction"]) + float(logs["kl"]), rtol=1e-6)
    weighted = vae.build(vae.Config(latent=4, units=16, batch_size=8, beta=3.0))
    _, logs = weighted.evaluate(weighted.init(), batch)
    np.testing.assert_allclose(float(logs["loss"]), float(logs["reconstruction"]) + 3 * float(logs["kl"]), rtol=1e-6)


def test_noise_differs_from_step_to_step_and_comes_from_the_state() -> None:
    config = vae.Config(latent=4, units=16, batch_size=8)
    learner, batch = vae.build(config), vae.data(config)["train"].batch(0)
    state = learner.init()
    after, first = learner.evaluate(state, batch)
    _, again = learner.evaluate(state, batch)
    _, second = learner.evaluate(learner.reset(after), batch)
    assert float(first["reconstruction"]) == float(again["reconstruction"]) != float(second["reconstruction"])


def test_after_30_epochs_it_draws_digits_of_all_classes() -> None:
    config = vae.Config(epochs=30)
    learner, splits = vae.build(config), vae.data(config)
    state, logs = research.train(learner, splits["train"], epochs=config.epochs, evaluations={"val": splits["val"]})
    scores = vae.results(config, learner, state, splits)
    assert logs["val_loss"] < 26
    assert scores["confidence"] >= 0.75
    assert scores["classes"] == _data.CLASSES
    assert scores["novelty"] >= 0.9

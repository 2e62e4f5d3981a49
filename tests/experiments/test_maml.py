"""MAML: its loss is the error after a step of SGD by hand, and what a short training reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import research
from experiments import maml

pytestmark = pytest.mark.slow


def test_the_loss_is_the_error_after_one_step_and_its_gradient_goes_through_the_step() -> None:
    config = maml.Config(batch_size=4)
    learner, batch = maml.build(config), maml.data(config)["train"].batch(0)
    state = learner.init()

    def network(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for kernel, bias in zip(weights[:4:2], weights[1:4:2], strict=True):
            x = jnp.maximum(x @ kernel + bias, 0)
        return x @ weights[4] + weights[5]

    def error(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((network(weights, x) - y) ** 2)

    def after_step(weights: list[jax.Array]) -> jax.Array:
        errors = []
        for i in range(4):
            gradients = jax.grad(error)(weights, batch.x[0][i], batch.y[0][i])
            moved = [w - config.inner_learning_rate * g for w, g in zip(weights, gradients, strict=True)]
            errors.append(error(moved, batch.x[1][i], batch.y[1][i]))
        return sum(errors) / 4

    expected, gradients = jax.jit(jax.value_and_grad(after_step))(state.trainable)
    norms = jax.jit(research.transforms.observe(learner, research.norms))(state, batch)
    _, logs = jax.jit(learner.evaluate)(state, batch)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(norms["gradient_norm"], jnp.sqrt(sum(jnp.sum(g**2) for g in gradients)), rtol=1e-4)


def test_after_6_epochs_one_step_on_10_points_has_an_error_of_at_most_0_67() -> None:
    config = maml.Config(epochs=6)
    learner, splits = maml.build(config), maml.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    scores = research.evaluate(learner, splits["test"], state)
    assert scores["loss"] <= 0.67
    assert scores["before_step"] >= 2

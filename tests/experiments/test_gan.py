"""The GAN's step against the Keras documents' own, and what each half of it may touch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import research
from experiments import gan

pytestmark = pytest.mark.slow

SMALL = {"latent": 4, "units": 16, "batch_size": 8}
STEPS = 3


def batches(config: gan.Config) -> list[research.Batch]:
    train = gan.data(config)["train"]
    return [train.batch(step) for step in range(STEPS)]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def documents_step(config: gan.Config, discriminator: keras.Model, generator: keras.Model) -> Callable[..., Any]:
    """The step of the Keras documents: both losses, both gradients and both updates written out."""
    d_optimizer = keras.optimizers.Adam(config.discriminator_rate, beta_1=0.5)
    g_optimizer = keras.optimizers.Adam(config.generator_rate, beta_1=0.5)
    d_optimizer.build(discriminator.trainable_variables)
    g_optimizer.build(generator.trainable_variables)
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

    def d_loss_fn(d_weights: Any, d_rest: Any, images: Any, labels: Any) -> Any:
        predictions, d_rest = discriminator.stateless_call(d_weights, d_rest, images, training=True)
        return loss_fn(labels, predictions), d_rest

    def g_loss_fn(g_weights: Any, d_weights: Any, d_rest: Any, latents: Any, misleading_labels: Any) -> Any:
        images, _ = generator.stateless_call(g_weights, [], latents, training=True)
        predictions, _ = discriminator.stateless_call(d_weights, d_rest, images, training=True)
        return loss_fn(misleading_labels, predictions)

    @jax.jit
    def step(d: Any, g: Any, key: Any, real: Any) -> Any:
        (d_weights, d_rest, d_slots), (g_weights, g_slots) = d, g
        n = len(real)
        key, images_key, noise_key, deceit_key = jax.random.split(key, 4)
        generated, _ = generator.stateless_call(g_weights, [], jax.random.normal(images_key, (n, config.latent)))
        images = jnp.concatenate([generated, real])
        labels = jnp.concatenate([jnp.ones((n, 1)), jnp.zeros((n, 1))])
        labels += 0.05 * jax.random.uniform(noise_key, labels.shape)
        (d_loss, d_rest), grads = jax.value_and_grad(d_loss_fn, has_aux=True)(d_weights, d_rest, images, labels)
        d_weights, d_slots = d_optimizer.stateless_apply(d_slots, grads, d_weights)
        latents = jax.random.normal(deceit_key, (n, config.latent))
        g_loss, grads = jax.value_and_grad(g_loss_fn)(g_weights, d_weights, d_rest, latents, jnp.zeros((n, 1)))
        g_weights, g_slots = g_optimizer.stateless_apply(g_slots, grads, g_weights)
        return (d_weights, d_rest, d_slots), (g_weights, g_slots), key, (d_loss, g_loss)

    def copied(variables: Any) -> list[Any]:
        return [jnp.array(v.value) for v in variables]

    d = (
        copied(discriminator.trainable_variables),
        copied(discriminator.non_trainable_variables),
        copied(d_optimizer.variables),
    )
    return step, (d, (copied(generator.trainable_variables), copied(g_optimizer.variables)))


def test_its_steps_equal_the_documents_own_bit_for_bit() -> None:
    config = gan.Config(**SMALL)
    keras.utils.set_random_seed(config.seed)
    step, (d, g) = documents_step(config, *gan.networks(config))
    learner = gan.build(config)
    state, train, key = learner.init(), jax.jit(learner.train), jax.random.PRNGKey(config.seed)
    for batch in batches(config):
        d, g, key, losses = step(d, g, key, batch.x)
        state, logs = train(learner.reset(state), batch)
        assert (float(logs["d_loss"]), float(logs["g_loss"])) == tuple(map(float, losses))
        jax.tree.map(np.testing.assert_array_equal, (state.discriminator[:3], state.key), (d, key))
        jax.tree.map(np.testing.assert_array_equal, (state.generator.trainable, state.generator.optimizer), g)


def test_each_network_is_moved_by_its_own_half_alone() -> None:
    def stepped(**rates: float) -> tuple[gan.GAN, gan.GAN]:
        config = gan.Config(**SMALL, **rates)
        learner = gan.build(config)
        return learner.init(), jax.jit(learner.train)(learner.init(), batches(config)[0])[0]

    before, both = stepped()
    _, judge_alone = stepped(generator_rate=0.0)
    _, artist_alone = stepped(discriminator_rate=0.0)
    assert not same(before.discriminator.trainable, both.discriminator.trainable)
    assert not same(before.generator.trainable, both.generator.trainable)
    assert same(before.generator.trainable, judge_alone.generator.trainable)
    assert same(before.discriminator.trainable, artist_alone.discriminator.trainable)
    # The generator's half leaves no trace in the discriminator: no weight, no slot, no seed of its dropout.
    assert same(both.discriminator, judge_alone.discriminator)


def test_chance_lives_in_the_state_and_moves_with_each_step() -> None:
    config = gan.Config(**SMALL)
    learner, batch = gan.build(config), batches(config)[0]
    train, state = jax.jit(learner.train), learner.init()
    once, again = train(state, batch)[0], train(state, batch)[0]
    assert same(once, again)
    assert not same(once.key, state.key)
    assert not same(once.discriminator.non_trainable, state.discriminator.non_trainable)
    assert not same(train(state._replace(key=once.key), batch)[0].generator.trainable, once.generator.trainable)
    images = learner.predict(state, batch)
    assert images.shape == (8, gan.SIDE, gan.SIDE)
    assert same(images, learner.predict(state, batch))
    assert not same(images, learner.predict(state._replace(key=once.key), batch))


def test_losses_run_from_a_reset_on_and_evaluation_leaves_the_networks_alone() -> None:
    config = gan.Config(**SMALL)
    learner = gan.build(config)
    state, train, single = learner.init(), jax.jit(learner.train), []
    for batch in batches(config):
        apart, logs = train(learner.reset(state), batch)
        single.append([float(logs[name]) for name in ("d_loss", "g_loss")])
        state, running = train(state, batch)
        assert same(apart.generator.trainable, state.generator.trainable)
    np.testing.assert_allclose([float(running["d_loss"]), float(running["g_loss"])], np.mean(single, 0), rtol=1e-6)
    after, logs = jax.jit(learner.evaluate)(learner.reset(state), gan.data(config)["val"].batch(0))
    assert sorted(logs) == ["d_loss", "g_loss"]
    assert same(after.average, state.average)
    for mine, old in ((after.discriminator, state.discriminator), (after.generator, state.generator)):
        assert same(mine[:3], old[:3])


def test_digits_are_drawn_with_the_average_of_the_generators_weights() -> None:
    config = gan.Config(**SMALL, averaging=0.75)
    learner = gan.build(config)
    state, train = learner.init(), jax.jit(learner.train)
    average = [np.asarray(w, np.float64) for w in state.generator.trainable]
    for batch in batches(config):
        state, _ = train(state, batch)
        average = [0.75 * a + 0.25 * np.asarray(w, np.float64) for a, w in zip(average, state.generator.trainable, strict=True)]
    jax.tree.map(lambda mine, wanted: np.testing.assert_allclose(mine, wanted, rtol=1e-6, atol=1e-7), state.average, average)
    generator = gan.models(config, state)["generator"]
    latents = jax.random.normal(jax.random.PRNGKey(0), (5, config.latent))
    np.testing.assert_array_equal(gan.samples(learner, state, 5), generator(latents))


def test_leaves_have_names_of_their_own() -> None:
    names = jax.tree.leaves(gan.build(gan.Config(**SMALL)).names)
    assert len(names) == len(set(names))


def test_after_20_epochs_a_classifier_reads_its_digits_and_none_is_a_copy() -> None:
    config = gan.Config(epochs=20)
    learner, splits = gan.build(config), gan.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    found = gan.results(config, learner, state, splits)
    assert found["confidence"] >= 0.8
    assert found["classes"] == gan.CLASSES
    assert found["smallest_share"] >= 0.02
    assert found["novelty"] >= 1.0

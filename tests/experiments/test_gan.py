"""The GAN's step against that of the Keras guide, and what each half of it changes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import research
from experiments import _data, gan
from research.transforms import with_averages

pytestmark = pytest.mark.slow

SMALL = {"latent": 4, "units": 16, "batch_size": 8}
STEPS = 3


def batches(config: gan.Config) -> list[research.Batch]:
    train = gan.data(config)["train"]
    return [train.batch(step) for step in range(STEPS)]


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def copies(variables: Any) -> list[Any]:
    return [jnp.array(v.value) for v in variables]


def guide_step(config: gan.Config, discriminator: keras.Model, generator: keras.Model) -> Callable[..., Any]:
    """The step of the Keras guide: both losses, both gradients and both updates written out."""
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

    def draw(function: Any, shape: tuple[int, ...], seed: Any) -> tuple[Any, Any]:
        """Random numbers, and the seed after them: a `SeedGenerator` counts its second word."""
        return function(shape, seed=seed), seed + jnp.array([0, 1], seed.dtype)

    @jax.jit
    def step(d: Any, g: Any, seeds: Any, real: Any) -> Any:
        (d_weights, d_rest, d_slots), (g_weights, g_slots), (d_seed, g_seed) = d, g, seeds
        n = len(real)
        latents, d_seed = draw(keras.random.normal, (n, config.latent), d_seed)
        generated, _ = generator.stateless_call(g_weights, [], latents)
        images = jnp.concatenate([generated, real])
        labels = jnp.concatenate([jnp.ones((n, 1)), jnp.zeros((n, 1))])
        noise, d_seed = draw(keras.random.uniform, labels.shape, d_seed)
        labels += 0.05 * noise
        (d_loss, d_rest), grads = jax.value_and_grad(d_loss_fn, has_aux=True)(d_weights, d_rest, images, labels)
        d_weights, d_slots = d_optimizer.stateless_apply(d_slots, grads, d_weights)
        latents, g_seed = draw(keras.random.normal, (n, config.latent), g_seed)
        g_loss, grads = jax.value_and_grad(g_loss_fn)(g_weights, d_weights, d_rest, latents, jnp.zeros((n, 1)))
        g_weights, g_slots = g_optimizer.stateless_apply(g_slots, grads, g_weights)
        return (d_weights, d_rest, d_slots), (g_weights, g_slots), (d_seed, g_seed), (d_loss, g_loss)

    d = copies(discriminator.trainable_variables), copies(discriminator.non_trainable_variables), copies(d_optimizer.variables)
    return step, (d, (copies(generator.trainable_variables), copies(g_optimizer.variables)))


def test_its_steps_equal_the_guides_bit_for_bit() -> None:
    config = gan.Config(**SMALL)
    keras.utils.set_random_seed(config.seed)
    step, (d, g) = guide_step(config, *gan.networks(config))
    seeds = tuple(jnp.array(keras.random.SeedGenerator(config.seed + i).state.value) for i in range(2))
    learner = gan.build(config)
    state, train = learner.init(), jax.jit(learner.train)
    for batch in batches(config):
        d, g, seeds, losses = step(d, g, seeds, batch.x)
        state, logs = train(learner.reset(state), batch)
        assert (float(logs["discriminator_loss"]), float(logs["generator_loss"])) == tuple(map(float, losses))
        d_state, g_state = state["discriminator"], state["generator"].state
        *dropout_seeds, d_seed = d_state.non_trainable
        ours = d_state.trainable, dropout_seeds, d_state.optimizer, d_seed
        jax.tree.map(np.testing.assert_array_equal, ours, (d[0], d[1], d[2], seeds[0]))
        ours = g_state.trainable, g_state.optimizer, g_state.non_trainable
        jax.tree.map(np.testing.assert_array_equal, ours, (g[0], g[1], [seeds[1]]))


def test_each_network_is_changed_by_its_own_half_alone() -> None:
    def stepped(**rates: float) -> tuple[gan.State, gan.State]:
        config = gan.Config(**SMALL, **rates)
        learner = gan.build(config)
        return learner.init(), jax.jit(learner.train)(learner.init(), batches(config)[0])[0]

    before, both = stepped()
    _, discriminator_only = stepped(generator_rate=0.0)
    _, generator_only = stepped(discriminator_rate=0.0)
    weights = before["generator"].state.trainable
    assert not equal(before["discriminator"].trainable, both["discriminator"].trainable)
    assert not equal(weights, both["generator"].state.trainable)
    assert equal(weights, discriminator_only["generator"].state.trainable)
    assert equal(before["discriminator"].trainable, generator_only["discriminator"].trainable)
    # The generator's half changes nothing in the discriminator: no weight, no slot, no seed of its dropout.
    assert equal(both["discriminator"], discriminator_only["discriminator"])


def test_random_seeds_are_part_of_the_state_and_change_with_each_step() -> None:
    config = gan.Config(**SMALL)
    learner, batch = gan.build(config), batches(config)[0]
    train, state = jax.jit(learner.train), learner.init()
    first, again = train(state, batch)[0], train(state, batch)[0]
    assert equal(first, again)
    assert not equal(first["discriminator"].non_trainable, state["discriminator"].non_trainable)
    reseeded = {**state, "generator": state["generator"]._replace(
        state=state["generator"].state._replace(non_trainable=first["generator"].state.non_trainable))}  # fmt: skip
    assert not equal(train(reseeded, batch)[0]["generator"].state.trainable, first["generator"].state.trainable)


def test_losses_are_means_since_the_reset_and_evaluation_changes_no_weights() -> None:
    config = gan.Config(**SMALL)
    learner = gan.build(config)
    state, train, single = learner.init(), jax.jit(learner.train), []
    names = ("discriminator_loss", "generator_loss")
    for batch in batches(config):
        alone, logs = train(learner.reset(state), batch)
        single.append([float(logs[name]) for name in names])
        state, running = train(state, batch)
        assert equal(alone["generator"].state.trainable, state["generator"].state.trainable)
    np.testing.assert_allclose([float(running[name]) for name in names], np.mean(single, 0), rtol=1e-6)
    after, logs = jax.jit(learner.evaluate)(learner.reset(state), gan.data(config)["val"].batch(0))
    assert sorted(logs) == list(names)
    assert equal(after["generator"].average, state["generator"].average)
    before = state["discriminator"], state["generator"].state
    for new, old in zip((after["discriminator"], after["generator"].state), before, strict=True):
        assert equal((new.trainable, new.optimizer), (old.trainable, old.optimizer))


def test_digits_are_drawn_with_the_average_of_the_generators_weights() -> None:
    config = gan.Config(**SMALL, averaging=0.75)
    learner = gan.build(config)
    state, train = learner.init(), jax.jit(learner.train)
    average = [np.asarray(w, np.float64) for w in state["generator"].state.trainable]
    for batch in batches(config):
        state, _ = train(state, batch)
        weights = state["generator"].state.trainable
        average = [0.75 * a + 0.25 * np.asarray(w, np.float64) for a, w in zip(average, weights, strict=True)]
    averaged = with_averages(state)["generator"].state.trainable
    for a, expected in zip(averaged, average, strict=True):
        np.testing.assert_allclose(a, expected, rtol=1e-6, atol=1e-7)
    generator = gan.models(config, state)["generator"]
    latents = np.random.default_rng(0).normal(size=(5, config.latent)).astype("float32")
    np.testing.assert_array_equal(gan.samples(config, learner, state, 5), generator(latents))


def test_leaves_have_unique_names() -> None:
    names = jax.tree.leaves(gan.build(gan.Config(**SMALL)).names)
    assert len(names) == len(set(names))


def test_after_20_epochs_a_classifier_reads_its_digits_and_none_is_a_copy() -> None:
    config = gan.Config(epochs=20)
    learner, splits = gan.build(config), gan.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    scores = gan.results(config, learner, state, splits)
    assert scores["confidence"] >= 0.8
    assert scores["classes"] == _data.CLASSES
    assert scores["smallest_share"] >= 0.02
    assert scores["novelty"] >= 1.0

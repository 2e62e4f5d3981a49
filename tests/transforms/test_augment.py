"""The laws of `augment`: batches are augmented as by the layers themselves, by seeds that are in the state."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import layers

import research
from research.distributed import layouts, mesh, shard
from research.transforms import augment

pytestmark = pytest.mark.promotes
RNG = np.random.default_rng(0)
BATCH = research.Batch(RNG.normal(size=(8, 6, 6, 1)).astype("float32"), RNG.normal(size=(8, 1)).astype("float32"))


def supervised() -> research.Learner:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(1)])
    return research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.1))


def random_layers() -> keras.Sequential:
    return keras.Sequential(
        [layers.RandomFlip("horizontal", seed=1), layers.RandomTranslation(0.2, 0.2, seed=2), layers.RandomContrast(0.3, seed=3)]
    )


def test_a_step_is_that_of_batches_which_the_layers_augmented() -> None:
    inner, augmentation = supervised(), random_layers()
    learner = augment(inner, augmentation, example=BATCH)
    state, expected = learner.init(), inner.init()
    step, plain = jax.jit(learner.train), jax.jit(inner.train)
    for _ in range(3):
        augmented = augmentation(BATCH.x, training=True)  # advances the layers' own seeds
        assert not np.allclose(augmented, BATCH.x)
        state, logs = step(state, BATCH)
        expected, expected_logs = plain(expected, BATCH._replace(x=augmented))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.state, expected)
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], rtol=1e-5)
    for value, variable in zip(state.augmentation, augmentation.variables, strict=True):
        np.testing.assert_array_equal(value, variable.value)


def test_evaluation_and_prediction_are_of_the_images_as_they_are() -> None:
    inner = supervised()
    learner = augment(inner, random_layers(), example=BATCH)
    state = learner.init()
    after, logs = jax.jit(learner.evaluate)(state, BATCH)
    _, expected = jax.jit(inner.evaluate)(state.state, BATCH)
    np.testing.assert_array_equal(logs["loss"], expected["loss"])
    jax.tree.map(np.testing.assert_array_equal, after.augmentation, state.augmentation)
    np.testing.assert_allclose(learner.predict(state, BATCH), inner.predict(state.state, BATCH), rtol=1e-6)


def test_a_crop_is_random_in_training_and_in_the_middle_in_evaluation() -> None:
    large = BATCH._replace(x=np.pad(BATCH.x, ((0, 0), (1, 1), (1, 1), (0, 0))))
    seed = keras.random.SeedGenerator(0)

    def crop(batch: research.Batch, training: bool) -> research.Batch:
        corner = keras.random.randint((2,), 0, 3, seed=seed) if training else jnp.array([1, 1])
        return batch._replace(x=jax.lax.dynamic_slice(batch.x, (0, *corner, 0), (8, 6, 6, 1)))

    inner = supervised()
    learner = augment(inner, crop, seed, example=large)
    np.testing.assert_allclose(learner.predict(learner.init(), large), inner.predict(inner.init(), BATCH), rtol=1e-6)
    losses, state = set(), learner.init()
    for _ in range(8):
        state, logs = learner.train(state._replace(state=inner.init()), large)
        losses.add(float(logs["loss"]))
    assert len(losses) > 3


def mixup(seed: keras.random.SeedGenerator) -> Any:
    """Mixes each example, and its target, with the one before it (Zhang et al., 2018)."""

    def apply(batch: research.Batch, training: bool) -> research.Batch:
        if not training:
            return batch
        weight = keras.random.uniform((8, 1), seed=seed)
        mix = [weight[..., None, None], weight]
        x, y = (w * part + (1 - w) * jnp.roll(part, 1, 0) for w, part in zip(mix, (batch.x, batch.y), strict=True))
        return batch._replace(x=x, y=y)

    return apply


def test_a_function_changes_targets_too_and_its_seeds_are_in_the_state() -> None:
    seed = keras.random.SeedGenerator(5)
    learner = augment(supervised(), mixup(seed), seed, example=BATCH)
    state = learner.init()
    after, logs = jax.jit(learner.train)(state, BATCH)
    _, same = jax.jit(learner.train)(state, BATCH)
    assert learner.names.augmentation == ["augmentation/seed_generator/seed_generator_state"]
    assert float(logs["loss"]) == float(same["loss"])
    assert not (after.augmentation[0] == state.augmentation[0]).all()


def test_steps_are_fused_and_the_same_on_eight_devices() -> None:
    learner = augment(supervised(), random_layers(), example=BATCH)
    step = jax.jit(learner.train)
    first, _ = step(learner.init(), BATCH)
    second, _ = step(first, BATCH)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BATCH)
    fused, _ = jax.jit(research.transforms.fuse(learner.train))(learner.init(), stacked, 2)
    on_mesh = shard(learner, mesh(jax.devices()[:8], data=8), layouts.data)
    sharded, _ = jax.jit(on_mesh.train)(on_mesh.init(), BATCH)
    for other, reference in ((fused, second), (sharded, first)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, reference)


@pytest.mark.parametrize(
    ("augmentation", "models", "message"),
    [
        ("flip", (), "augment: the augmentation is a str, expected a keras.Layer, or a function (batch, training) -> batch."),
        (lambda batch, training: batch.x, (), "augment: of a batch Batch of (8, 6, 6, 1), (8, 1) the augmentation returned "),
        (
            mixup(keras.random.SeedGenerator(0)),
            (),
            "augment: the augmentation assigns to 'seed_generator/seed_generator_state', which belongs to nothing in `models`, ",
        ),
        (lambda batch, training: batch, ["seed"], "augment: an entry of models is a str, expected a layer, a keras.random."),
    ],
)
def test_what_can_not_be_is_one_line(augmentation: Any, models: Any, message: str, as_users_run_it: None) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        learner = augment(supervised(), augmentation, models, example=BATCH)
        learner.train(learner.init(), BATCH)
    (line,) = str(error.value).splitlines()
    assert line.startswith(message), line

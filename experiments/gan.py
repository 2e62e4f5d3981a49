"""Draw new handwritten digits: a generator and a discriminator trained against each other.

    just run gan                      # half a minute on two idle cores
    just run gan --label-noise 0

The generative adversarial network of the Keras guides (Goodfellow et al., arXiv:1406.2661): two losses written as plain Keras
code, each with its own model and optimizer, joined into one learner. Each loss calls both networks; only its own is trained.
Images are drawn with an exponential moving average of the generator's weights.

Expect 1,000 generated digits to be read by a classifier of real ones with a mean confidence >= 0.86 (real test digits: 0.96),
all 10 classes among them, the rarest with a share >= 0.05, and no copies: they lie farther from the training images than new
real digits do (novelty >= 1.05).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import research
from experiments import _data, _judge, _plots
from experiments._config import Count, CountOrZero, Fraction, Positive, TrainingOptions
from research.data import Batches
from research.transforms import ema, with_averages

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATED, REAL = 1.0, 0.0  # the discriminator's targets, as in the Keras guide
State = dict[str, Any]  # "discriminator" and "generator"; the latter with the average of its weights


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers."""

    latent: Count = 16
    """Normal random numbers that the generator makes an image from."""
    units: Count = 512
    """Width of both networks."""
    dropout: Fraction = 0.3
    """Dropout rate of the discriminator."""
    label_noise: Fraction = 0.05
    """Noise added to the discriminator's targets: uniform from 0 to this."""
    averaging: Fraction = 0.995
    """Decay of the moving average of the generator's weights, with which images are drawn."""
    discriminator_rate: Positive = 1e-3
    """Learning rate of the discriminator's Adam."""
    generator_rate: Positive = 1e-3
    """Learning rate of the generator's Adam."""
    epochs: CountOrZero = 60
    """Passes over the training data."""


def networks(config: Config) -> tuple[keras.Model, keras.Model]:
    """Returns the discriminator, images -> logit of being generated, and the generator, latents -> images from -1 to 1."""
    layers, side = keras.layers, _data.SIDE
    inner: list[keras.Layer] = [keras.Input((side, side)), layers.Flatten()]
    for units in (config.units, config.units // 2):
        inner += [layers.Dense(units), layers.LeakyReLU(0.2), layers.Dropout(config.dropout)]
    outer: list[keras.Layer] = [keras.Input((config.latent,))]
    for units in (config.units, config.units):
        outer += [layers.Dense(units), layers.LeakyReLU(0.2)]
    outer += [layers.Dense(side * side, activation="tanh"), layers.Reshape((side, side))]
    return keras.Sequential([*inner, layers.Dense(1)], name="discriminator"), keras.Sequential(outer, name="generator")


def build(config: Config) -> research.Learner:
    """Returns a step of the discriminator on real and generated images, then one of the generator against it."""
    return algorithm(config)[0]


def algorithm(config: Config) -> tuple[research.Learner, dict[str, keras.Model]]:
    """Returns the learner and its networks."""
    keras.utils.set_random_seed(config.seed)
    discriminator, generator = networks(config)
    d_seed, g_seed = keras.random.SeedGenerator(config.seed), keras.random.SeedGenerator(config.seed + 1)
    crossentropy = keras.losses.BinaryCrossentropy(from_logits=True)

    def discriminator_loss(batch: research.Batch, training: bool) -> Any:
        count = len(batch.x)
        generated = generator(keras.random.normal((count, config.latent), seed=d_seed), training=False)
        targets = keras.ops.repeat(keras.ops.array([[GENERATED], [REAL]]), count, axis=0)
        if training:
            targets = targets + config.label_noise * keras.random.uniform(targets.shape, seed=d_seed)
        logits = discriminator(keras.ops.concatenate([generated, batch.x]), training=training)
        return crossentropy(targets, logits), {}

    def generator_loss(batch: research.Batch, training: bool) -> Any:
        latents = keras.random.normal((len(batch.x), config.latent), seed=g_seed)
        logits = discriminator(generator(latents, training=training), training=training)
        return crossentropy(keras.ops.full((len(batch.x), 1), REAL), logits), {}

    adam, example = keras.optimizers.Adam, data(config)["train"].shapes
    d_optimizer, g_optimizer = adam(config.discriminator_rate, beta_1=0.5), adam(config.generator_rate, beta_1=0.5)
    d_learner = research.learner(discriminator_loss, [discriminator, d_seed], d_optimizer, example=example)
    g_learner = research.learner(generator_loss, [generator, g_seed], g_optimizer, example=example)
    learner = research.joint(
        {"discriminator": d_learner, "generator": ema(g_learner, config.averaging)},
        predict=lambda predictions, state, latents: predictions["generator"](state, latents),
    )
    return learner, {"discriminator": discriminator, "generator": generator}


def data(config: Config) -> dict[str, Batches]:
    """Returns scikit-learn's digits from -1 to 1; the labels are for the classifier that judges samples, the GAN ignores them."""
    return _data.digit_batches(batch_size=config.batch_size, seed=config.seed, signed=True)


def models(config: Config, state: State) -> dict[str, keras.Model]:
    """Returns both networks with the weights of a state; the generator has the averaged ones."""
    learner, models = algorithm(config)
    research.write_back(with_averages(state), learner)
    return models


def samples(config: Config, learner: research.Learner, state: State, count: int) -> np.ndarray:
    """Returns generated digits, from the same latents at every call."""
    latents = np.random.default_rng(0).normal(size=(count, config.latent)).astype(np.float32)
    return np.asarray(learner.predict(state, research.Batch(latents)))


def results(config: Config, learner: research.Learner, state: State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the scores of 1,000 samples: see `_judge.judge_samples`."""
    images = (_data.all_examples(splits[split]).x for split in ("train", "test"))
    return _judge.judge_samples(samples(config, learner, state, 1000), *images, _judge.digit_classifier(config.seed))


def each_epoch(config: Config, learner: research.Learner, state: State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws 100 digits, of the same latents in every epoch."""
    return {"samples": _plots.image_grid(samples(config, learner, state, 100))}


def pictures(config: Config, learner: research.Learner, state: State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws generated digits beside real ones, with the classifier's answers, and above their nearest training images."""
    images = (_data.all_examples(splits[split]).x for split in ("train", "test"))
    drawn = samples(config, learner, state, 1000)
    return {"samples": _judge.samples_figure(drawn, *images, _judge.digit_classifier(config.seed))}

"""Learn a latent space of handwritten digits: a variational autoencoder, two networks and one loss.

    just run vae                      # half a minute on two idle cores
    just run vae --latent 2 --beta 0.5

Auto-encoding variational Bayes (Kingma and Welling, arXiv:1312.6114): the loss of the paper as plain Keras code over an encoder,
a decoder and a seed generator, and nothing else. `--beta` weights the divergence (Higgins et al., beta-VAE, ICLR 2017).

Expect a val_loss <= 24.5 nats, and 1,000 images decoded from the prior to be read by a classifier of real digits with a mean
confidence >= 0.85 (real test digits: 0.96), all 10 classes among them, the rarest with a share >= 0.07, and no copies (novelty
>= 1.02): 23.9, 24.4, 23.6 nats and 0.856, 0.863, 0.870 with seeds 0 to 2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import research
from experiments import _data, _judge, _plots
from experiments._config import Count, CountOrZero, NonNegative, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers."""

    latent: Count = 16
    """Size of the latent space."""
    units: Count = 256
    """Width of the hidden layers of both networks."""
    beta: NonNegative = 1.0
    """Weight of the divergence from the prior; 1 is the evidence lower bound."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""
    epochs: CountOrZero = 100
    """Passes over the training data."""


def networks(config: Config) -> tuple[keras.Model, keras.Model]:
    """Returns the encoder, images -> mean and log variance [batch, 2 * latent], and the decoder, latents -> logits of pixels."""
    layers, side = keras.layers, _data.SIDE
    hidden = [layers.Dense(config.units, activation="relu") for _ in range(4)]
    encoder = [keras.Input((side, side)), layers.Flatten(), *hidden[:2], layers.Dense(2 * config.latent)]
    decoder = [keras.Input((config.latent,)), *hidden[2:], layers.Dense(side * side), layers.Reshape((side, side))]
    return keras.Sequential(encoder, name="encoder"), keras.Sequential(decoder, name="decoder")


def build(config: Config) -> research.Learner:
    """Returns the learner; it predicts images from latents."""
    return algorithm(config)[0]


def algorithm(config: Config) -> tuple[research.Learner, dict[str, keras.Model]]:
    """Returns the learner and its networks."""
    keras.utils.set_random_seed(config.seed)
    ops, noise = keras.ops, keras.random.SeedGenerator(config.seed)
    encoder, decoder = networks(config)

    def negative_elbo(batch: research.Batch, training: bool) -> Any:
        mean, log_variance = ops.split(encoder(batch.x, training=training), 2, axis=-1)
        latents = mean + ops.exp(log_variance / 2) * keras.random.normal(mean.shape, seed=noise)
        pixels, logits = (batch.x + 1) / 2, decoder(latents, training=training)
        crossentropy = ops.binary_crossentropy(pixels, logits, from_logits=True)
        reconstruction = ops.mean(ops.sum(crossentropy, axis=(1, 2)))
        kl = ops.mean(ops.sum(ops.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)) / 2
        return reconstruction + config.beta * kl, {"reconstruction": reconstruction, "kl": kl}

    learner = research.learner(
        negative_elbo,
        [encoder, decoder, noise],
        keras.optimizers.Adam(config.learning_rate),
        example=data(config)["train"].shapes,
        predict=lambda batch: 2 * ops.sigmoid(decoder(batch.x, training=False)) - 1,
    )
    return learner, {"encoder": encoder, "decoder": decoder}


def data(config: Config) -> dict[str, Batches]:
    """Returns scikit-learn's digits from -1 to 1; the labels are for the figure and the classifier that judges samples."""
    return _data.digit_batches(batch_size=config.batch_size, seed=config.seed, signed=True)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns both networks with the weights of a state."""
    learner, models = algorithm(config)
    research.write_back(state, learner)
    return models


def samples(config: Config, learner: research.Learner, state: research.State, count: int) -> np.ndarray:
    """Returns decoded latents of the prior, the same at every call."""
    latents = np.random.default_rng(0).normal(size=(count, config.latent)).astype(np.float32)
    return np.asarray(learner.predict(state, research.Batch(latents)))


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the scores of 1,000 samples: see `_judge.judge_samples`."""
    images = (_data.all_examples(splits[split]).x for split in ("train", "test"))
    return _judge.judge_samples(samples(config, learner, state, 1000), *images, _judge.digit_classifier(config.seed))


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws samples, test images beside their reconstructions, and the latent means of the test images by digit."""
    from matplotlib.figure import Figure

    train, test = (_data.all_examples(splits[split]) for split in ("train", "test"))
    encoder = models(config, state)["encoder"]
    means = np.asarray(encoder(test.x))[:, : config.latent]
    decoded = np.asarray(learner.predict(state, research.Batch(means)))
    figure = Figure(figsize=(10, 5), layout="constrained")
    images, scatter = figure.subfigures(1, 2)
    rows = images.subplots(6, 8)
    for row, (kind, pixels) in enumerate([("test", test.x), ("decoded", decoded)] * 3):
        _plots.image_panel(rows[row], pixels[row // 2 * 8 :], [kind] * 8)
    axes = scatter.add_subplot()
    _, _, directions = np.linalg.svd(means - means.mean(0), full_matrices=False)  # principal components
    points = axes.scatter(*((means - means.mean(0)) @ directions[:2].T).T, c=test.y, cmap="tab10", vmin=-0.5, vmax=9.5, s=14)
    scatter.colorbar(points, ticks=range(10), label="digit")
    axes.set(xlabel="first principal component", ylabel="second", title="latent means of test images")
    _plots.hide_frame(axes)
    judged = _judge.samples_figure(samples(config, learner, state, 1000), train.x, test.x, _judge.digit_classifier(config.seed))
    return {"latent_space": figure, "samples": judged}


def each_epoch(
    config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]
) -> dict[str, "Figure"]:
    """Draws 100 samples, of the same latents in every epoch."""
    return {"samples": _plots.image_grid(samples(config, learner, state, 100))}

"""Draw new handwritten digits: a generator and a discriminator trained against each other.

    just run gan                      # half a minute on two idle cores
    just run gan --label-noise 0

The generative adversarial network of the Keras documents (Goodfellow et al., arXiv:1406.2661) as a `Learner` written by hand: two
networks, two optimizers, and a step that is more than one loss and its gradient. It is made of what `supervised` is made of:
an objective for each network, `research.gradient` and `research.step` around it, one state that holds both. The loop,
checkpoints and reports take it like any other. Digits are drawn with an average of the generator's weights.

Expect 1,000 generated digits to be read by a classifier of real ones with a mean confidence >= 0.86 (real test digits: 0.96),
all 10 classes among them, the rarest with a share >= 0.05, and none of it by copying: they lie farther from the training
images than new real digits do (novelty >= 1.05).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import research
from research.data import Batches, arrays, deferred
from research.objective import forward
from research.state import rows, slot_names, values, variable_names
from research.step import examples

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES = 10
SIDE = 8
EXAMPLES = {"train": 1437, "val": 180, "test": 180}
GENERATED, REAL = 1.0, 0.0  # the discriminator's targets, as in the Keras documents


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    latent: int = 16
    """Normal random numbers that a digit is made from."""
    units: int = 512
    """Width of both networks."""
    dropout: float = 0.3
    """Share of units that the discriminator leaves out in training."""
    label_noise: float = 0.05
    """Noise on the discriminator's targets: uniform from 0 to this."""
    averaging: float = 0.995
    """How much of the average of the generator's weights stays at each step; digits are drawn with the average."""
    discriminator_rate: float = 1e-3
    """Learning rate of the discriminator's Adam."""
    generator_rate: float = 1e-3
    """Learning rate of the generator's Adam."""
    epochs: int = 60
    """Passes over the training data."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 32
    """Real digits in a step."""
    seed: int = 0
    """Of weights, latents, noise, split and shuffling."""


class GAN(NamedTuple):
    """What a step changes."""

    discriminator: research.State
    generator: research.State
    average: list[Array]
    """Of the generator's weights over the last steps."""
    key: Array
    """Where latents and noise come from: each step splits it."""


def networks(config: Config) -> tuple[keras.Model, keras.Model]:
    """The discriminator, from images to a logit of being generated, and the generator, from latents to images in -1..1."""
    layers = keras.layers
    judging: list[keras.Layer] = [keras.Input((SIDE, SIDE)), layers.Flatten()]
    for units in (config.units, config.units // 2):
        judging += [layers.Dense(units), layers.LeakyReLU(0.2), layers.Dropout(config.dropout)]
    drawing: list[keras.Layer] = [keras.Input((config.latent,))]
    for units in (config.units, config.units):
        drawing += [layers.Dense(units), layers.LeakyReLU(0.2)]
    drawing += [layers.Dense(SIDE * SIDE, activation="tanh"), layers.Reshape((SIDE, SIDE))]
    return (
        keras.Sequential([*judging, layers.Dense(1)], name="discriminator"),
        keras.Sequential(drawing, name="generator"),
    )


def build(config: Config) -> research.Learner:
    """A step of the discriminator on real and generated images, then one of the generator against it."""
    keras.utils.set_random_seed(config.seed)
    discriminator, generator = networks(config)
    crossentropy = keras.losses.BinaryCrossentropy(from_logits=True)

    # What each network minimises. The discriminator is a classifier like any other.
    telling_apart, measures = research.keras_objective(discriminator, loss=crossentropy)

    def deceiving(
        state: research.State, batch: tuple[Array, research.State], *, training: bool
    ) -> tuple[Float[Array, ""], research.Aux]:
        """The generator's loss: how far the discriminator is from calling its images real.

        The discriminator's state comes with the batch: no gradient is taken with respect to it, and nothing in it moves.
        """
        latents, judge = batch
        images, non_trainable = generator.stateless_call(state.trainable, state.non_trainable, latents, training=training)
        logits, _ = discriminator.stateless_call(judge.trainable, judge.non_trainable, images, training=training)
        loss = crossentropy(jnp.full((len(latents), 1), REAL), logits)
        return loss, research.Aux(images, non_trainable, state.metrics, jnp.asarray(len(latents), jnp.float32))

    # Two optimizers, two steps.
    optimizers = (
        keras.optimizers.Adam(config.discriminator_rate, beta_1=0.5),
        keras.optimizers.Adam(config.generator_rate, beta_1=0.5),
    )
    updates = (
        research.keras_update(optimizers[0], discriminator.trainable_variables),
        research.keras_update(optimizers[1], generator.trainable_variables),
    )
    tell_apart = research.step(research.gradient(telling_apart), updates[0], measures, examples)
    deceive = research.step(research.gradient(deceiving), updates[1], measures, lambda batch: len(batch[0]))

    def sampled(key: Array, count: int) -> Float[Array, "count latent"]:
        return jax.random.normal(key, (count, config.latent))

    def mixed(state: GAN, real: Array, key: Array) -> research.Batch:
        """As many generated images as real ones, then those, and what they are."""
        generated = forward(generator, state.generator, sampled(key, len(real)))
        labels = jnp.repeat(jnp.array([GENERATED, REAL]), len(real))[:, None]
        return research.Batch(jnp.concatenate([generated, real]), labels)

    def train(state: GAN, batch: research.Batch) -> tuple[GAN, dict[str, Array]]:
        key, for_images, for_noise, for_deceit = jax.random.split(state.key, 4)
        mixture = mixed(state, batch.x, for_images)
        noise = config.label_noise * jax.random.uniform(for_noise, mixture.y.shape)
        judge, judged = tell_apart(state.discriminator, mixture._replace(y=mixture.y + noise))
        artist, drawn = deceive(state.generator, (sampled(for_deceit, len(batch.x)), judge))
        average = [a + (1 - config.averaging) * (w - a) for a, w in zip(state.average, artist.trainable, strict=True)]
        return GAN(judge, artist, average, key), {"d_loss": judged["loss"], "g_loss": drawn["loss"]}

    def evaluate(state: GAN, batch: research.Batch) -> tuple[GAN, dict[str, Array]]:
        key, for_images, for_deceit = jax.random.split(state.key, 3)
        mixture, latents = mixed(state, batch.x, for_images), sampled(for_deceit, len(batch.x))
        d_loss, _ = telling_apart(state.discriminator, mixture, training=False)
        g_loss, _ = deceiving(state.generator, (latents, state.discriminator), training=False)
        judged = measures.track(state.discriminator.metrics, d_loss, len(mixture.x))
        drawn = measures.track(state.generator.metrics, g_loss, len(latents))
        logs = {"d_loss": measures.result(judged)["loss"], "g_loss": measures.result(drawn)["loss"]}
        judge, artist = state.discriminator._replace(metrics=judged), state.generator._replace(metrics=drawn)
        return state._replace(discriminator=judge, generator=artist, key=key), logs

    def predict(state: GAN, batch: research.Batch) -> Float[Array, "count side side"]:
        """As many digits as the batch has examples, drawn by the state's key: the same state gives the same ones."""
        averaged = state.generator._replace(trainable=state.average)
        return forward(generator, averaged, sampled(state.key, rows(batch.x)))

    def beginning(model: keras.Model, update: research.Update) -> research.State:
        weights = values(model.trainable_variables)
        return research.State(weights, values(model.non_trainable_variables), update.init(weights), measures.init())

    def init() -> GAN:
        judge, artist = map(beginning, (discriminator, generator), updates)
        return GAN(judge, artist, values(generator.trainable_variables), jax.random.PRNGKey(config.seed))

    def reset(state: GAN) -> GAN:
        judge, artist = (s._replace(metrics=measures.reset(s.metrics)) for s in (state.discriminator, state.generator))
        return state._replace(discriminator=judge, generator=artist)

    def named(model: keras.Model, optimizer: keras.Optimizer) -> research.State:
        slots = [f"{model.name}/{slot}" for slot in slot_names(optimizer, model.trainable_variables)]
        losses = {"loss": [f"{model.name}/loss/{i}" for i in range(2)]}
        return research.State(
            variable_names(model.trainable_variables), variable_names(model.non_trainable_variables), slots, losses
        )

    judge_names, artist_names = map(named, (discriminator, generator), optimizers)
    names = GAN(judge_names, artist_names, [f"average/{name}" for name in artist_names.trainable], "key")
    return research.Learner(init, reset, train, evaluate, predict, names)


def data(config: Config) -> dict[str, Batches]:
    """Batches of scikit-learn's digits in -1..1; the labels are for the classifier that judges samples, the GAN sees none."""
    load = functools.cache(lambda: _images(config.seed))

    def split(name: str, count: int) -> Batches:
        size = config.batch_size if name == "train" else count
        shapes = research.Batch(jax.ShapeDtypeStruct((size, SIDE, SIDE), np.float32), jax.ShapeDtypeStruct((size,), np.int32))
        return deferred(
            lambda: arrays(
                *load()[name],
                batch_size=size,
                seed=config.seed,
                shuffle=name == "train",
                classes=CLASSES,
                name=f"digits ({name})",
            ),
            shapes,
            count,
        )

    return {name: split(name, count) for name, count in EXAMPLES.items()}


def _images(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each split."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order].reshape(-1, SIDE, SIDE) / 8 - 1).astype(np.float32), y[order].astype(np.int32)
    cuts = np.cumsum(list(EXAMPLES.values()))[:-1]
    return dict(zip(EXAMPLES, zip(np.split(x, cuts), np.split(y, cuts), strict=True), strict=True))


def models(config: Config, state: GAN) -> dict[str, keras.Model]:
    """Both networks with the weights that a state holds; the generator's are the averaged ones."""
    discriminator, generator = networks(config)
    research.write_back(state.discriminator, discriminator)
    research.write_back(state.generator._replace(trainable=state.average), generator)
    return {"discriminator": discriminator, "generator": generator}


def samples(learner: research.Learner, state: GAN, count: int) -> np.ndarray:
    """So many generated digits, from the same latents whenever asked."""
    return np.asarray(learner.predict(state._replace(key=jax.random.PRNGKey(0)), research.Batch(np.zeros(count))))


@functools.cache
def classifier(config: Config) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of real digits, trained on the training split: images -> a probability for each class."""
    keras.utils.set_random_seed(config.seed)
    layers = keras.layers
    stack = [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.5), layers.Dense(CLASSES)]
    learner = research.supervised(
        keras.Sequential([keras.Input((SIDE, SIDE)), *stack]),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer="adam",
    )
    state, _ = research.train(learner, data(config)["train"], epochs=20)
    return lambda images: np.asarray(jax.nn.softmax(learner.predict(state, research.Batch(images))))


def results(config: Config, learner: research.Learner, state: GAN, splits: dict[str, Batches]) -> dict[str, float]:
    """What 1,000 samples are worth.

    `confidence`: the classifier's mean probability of its answer, beside that on the test images; `classes` and
    `smallest_share`: how many digits its answers cover, and the share of the rarest; `novelty`: the median distance of a sample
    to its nearest training image, over that of the test images. Copies of training images would have a novelty of 0.
    """
    drawn, train, test = samples(learner, state, 1000), _all(splits["train"]), _all(splits["test"])
    answers = classifier(config)(drawn)
    shares = np.bincount(answers.argmax(-1), minlength=CLASSES) / len(drawn)
    return {
        "confidence": float(answers.max(-1).mean()),
        "confidence_on_test": float(classifier(config)(test).max(-1).mean()),
        "classes": float(np.count_nonzero(shares)),
        "smallest_share": float(shares.min()),
        "novelty": float(np.median(_nearest(drawn, train)[0]) / np.median(_nearest(test, train)[0])),
    }


def _all(split: Batches) -> np.ndarray:
    """Every image of a split, in the order of its first epoch."""
    return np.concatenate([split.batch(step).x for step in range(split.steps_per_epoch)])


def _nearest(images: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean distance of each image to its nearest one of `among`, and which that is."""
    a, b = images.reshape(len(images), -1), among.reshape(len(among), -1)
    distances = np.sqrt(np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1), 0))
    return distances.min(1), distances.argmin(1)


def each_epoch(config: Config, learner: research.Learner, state: GAN, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """How the digits of the same 100 latents come into being."""
    from matplotlib.figure import Figure

    side = 10
    grid = np.full((side, SIDE + 1, side, SIDE + 1), -1.0)
    grid[:, :SIDE, :, :SIDE] = samples(learner, state, side * side).reshape(side, side, SIDE, SIDE).swapaxes(1, 2)
    figure = Figure(figsize=(4, 4))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.imshow(grid.reshape(side * (SIDE + 1), -1), cmap="gray_r", vmin=-1, vmax=1)
    axes.axis("off")
    return {"samples": figure}


def pictures(config: Config, learner: research.Learner, state: GAN, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Generated digits beside real ones, with the classifier's answers, and generated ones over their nearest training images."""
    from matplotlib.figure import Figure

    drawn, train, test = samples(learner, state, 1000), _all(splits["train"]), _all(splits["test"])
    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    for panel, images, title in zip(above.subfigures(1, 2), (drawn, test), ("generated", "real (test)"), strict=True):
        answers = classifier(config)(images).argmax(-1)
        for axes, image, answer in zip(panel.subplots(6, 8).flat, images, answers, strict=False):
            _show(axes, image, str(answer))
        panel.suptitle(f"{title}, and what a classifier reads", fontsize=11)
    distances, nearest = _nearest(drawn, train)
    for i, (top, bottom) in enumerate(below.subplots(2, 16).T):
        _show(top, drawn[i], "")
        _show(bottom, train[nearest[i]], f"{distances[i]:.1f}")
    usual = np.median(_nearest(test, train)[0])
    below.suptitle(f"generated, over the nearest training image and its distance (of real test images: {usual:.1f})", fontsize=11)
    return {"samples": figure}


def _show(axes: Any, image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    axes.set_title(title, fontsize=8, pad=2)
    axes.axis("off")

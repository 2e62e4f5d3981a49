"""Train networks of many widths at once, and see the test error fall, rise and fall again: double descent.

    just run double_descent

Belkin et al. (arXiv:1812.11118) on MNIST-1D, as its authors (arXiv:2011.14439) show it: a network with one hidden layer learns
one-hot digits, of which a part is wrong, by least squares. Where it has just enough weights to fit all of them, about as many as
there are examples times classes, its test error has a peak. All widths and seeds are one population: 64 networks, one program;
two minutes on two idle cores.

Expect a peak between 8 and 20 hidden units: there the training error gets to 0, and the number of weights to that of examples
times classes (19.4). With four seeds the mean squared error on test data is 0.20 of 2 units, 1.99 of 12, and 0.20 of 128.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, CountOrZero, Fraction, Positive, TrainingOptions
from research import transforms
from research.data import Batches, from_arrays, lazy

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUTS, HELD_OUT = 40, 1000
PASSES = 100  # over the data in an epoch, for which logs are kept


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    widths: tuple[Count, ...] = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 32, 48, 64, 96, 128)
    """Hidden units of the networks."""
    seeds: Count = 4
    """Networks of each width, with other initial weights."""
    examples: Count = 100
    """Training examples."""
    wrong: Fraction = 0.15
    """Share of the training examples that get the label of another one."""
    learning_rate: Positive = 1e-2
    """Learning rate of Adam; it decays to 0 along half a cosine."""
    epochs: CountOrZero = 80
    """How often each example is seen, in hundreds."""
    batch_size: Count = 100
    """Examples per step; by default all of them."""


def network(config: Config, width: int) -> keras.Model:
    """Returns signals -> 10 numbers: as wide as the widest, so that all have one shape, with zeros after the first units."""
    keep = (np.arange(max(config.widths)) < width).astype(np.float32)
    normal = keras.initializers.RandomNormal
    inputs = keras.Input((INPUTS,))
    hidden = keras.layers.Dense(len(keep), "relu", kernel_initializer=normal(stddev=(2 / INPUTS) ** 0.5))(inputs)
    outputs = keras.layers.Dense(_data.CLASSES, kernel_initializer=normal(stddev=width**-0.5))(hidden * keep)
    return keras.Model(inputs, outputs)


def num_weights(width: int) -> int:
    """Returns the number of weights and biases of a network.

    >>> num_weights(50)
    2560
    """
    return (INPUTS + 1) * width + (width + 1) * _data.CLASSES


def members(config: Config) -> list[dict[str, int]]:
    """Returns the width and the seed of each network."""
    return [{"width": width, "seed": config.seed + i} for width in config.widths for i in range(config.seeds)]


def build(config: Config) -> research.Learner:
    """Returns the population."""
    train = data(config)["train"]
    steps = max(1, config.num_steps(train.steps_per_epoch))

    def of_width(width: int, seed: int) -> research.Learner:
        keras.utils.set_random_seed(seed)
        schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)
        metrics = [keras.metrics.CategoricalAccuracy(name="accuracy")]
        adam = keras.optimizers.Adam(schedule)
        return research.supervised(network(config, width), loss="mse", optimizer=adam, metrics=metrics, example=train.shapes)

    return transforms.population(of_width, members(config), example=train.shapes)


def data(config: Config) -> dict[str, Batches]:
    """Returns the first examples of MNIST-1D for `train`, wrong labels among them; its last thousands for `val` and `test`."""

    @functools.cache
    def load() -> tuple[np.ndarray, np.ndarray]:
        x, y = _data.load_mnist1d()
        return x, np.eye(_data.CLASSES, dtype=np.float32)[y]

    def train() -> Batches:
        x, y = (part[: config.examples] for part in load())
        rng = np.random.default_rng(0)
        is_wrong, others = rng.random(config.examples) < config.wrong, rng.permutation(y)
        y = np.where(is_wrong[:, None], others, y)
        repeated = (np.tile(part, (PASSES, 1)) for part in (x, y))
        return from_arrays(*repeated, batch_size=config.batch_size, shuffle=False, name="MNIST-1D")

    def held_out(rows: slice) -> Batches:
        return from_arrays(*(part[rows] for part in load()), batch_size=HELD_OUT, shuffle=False, name="MNIST-1D (held out)")

    def shapes(rows: int) -> research.Batch:
        x, y = (jax.ShapeDtypeStruct((rows, size), np.float32) for size in (INPUTS, _data.CLASSES))
        return research.Batch(x, y)

    return {
        "train": lazy(train, shapes(config.batch_size), PASSES * config.examples),
        "val": lazy(lambda: held_out(slice(-2 * HELD_OUT, -HELD_OUT)), shapes(HELD_OUT), HELD_OUT),
        "test": lazy(lambda: held_out(slice(-HELD_OUT, None)), shapes(HELD_OUT), HELD_OUT),
    }


def errors(config: Config, learner: research.Learner, state: research.State, split: Batches) -> dict[str, np.ndarray]:
    """Returns mean squared error and share of wrong predictions, each by width and seed."""
    logs = research.evaluate(learner, split, state)
    shape = (len(config.widths), config.seeds)
    loss, accuracy = (np.reshape(logs[f"{name}_of_members"], shape) for name in ("loss", "accuracy"))
    return {"mean squared error": loss, "wrong": 1 - accuracy}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the width at the peak of the test error, that error, and the one of the widest networks; means over seeds."""
    error = errors(config, learner, state, splits["test"])["mean squared error"].mean(1)
    peak = int(error.argmax())
    return {"peak_width": config.widths[peak], "peak_error": float(error[peak]), "widest_error": float(error[-1])}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the errors against the width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    found = {split: errors(config, learner, state, splits[split]) for split in ("train", "test")}
    threshold = np.interp(config.examples * _data.CLASSES, [num_weights(width) for width in config.widths], config.widths)
    for axes, name in zip(figure.subplots(1, 2), found["train"], strict=True):
        for split, colour in (("train", _plots.BLUE), ("test", _plots.RED)):
            values = found[split][name]
            axes.plot(config.widths, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(config.widths, values.mean(1), color=colour, marker="o", markersize=3, label=split)
        axes.axvline(threshold, color="grey", linestyle=":", label="as many weights as examples x classes")
        axes.set(xscale="log", xlabel="hidden units", ylabel=name, ylim=(0, None))
        _plots.hide_frame(axes)
    figure.axes[1].legend(frameon=False)
    return {"double_descent": figure}

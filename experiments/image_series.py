"""Answer two questions about an image and a time series that neither can answer alone.

    just run image_series                              # real digits with synthetic signals; fifteen seconds on two cores
    just run image_series --inputs image               # the same network without the series: chance
    just run image_series --score-loss none            # only one of two outputs trained, the other stays as initialised
    just run image_series --by position                # inputs, outputs, losses and weights as lists: the same numbers

The image is one of scikit-learn's 1,797 handwritten digits; the series is what ten sensors in a row measure of a passing wave.
The class is (digit + index of the wave's frequency) mod 5: given only the digit, or only the wave, all five are equally likely.
The score is the image's standardised ink times the wave's standardised amplitude: its variance is 1, and its mean is 0 given
only the image, or only the wave.

Expect test_class_accuracy >= 0.9 (chance 0.2) and test_score_loss <= 0.12 (chance 1). With one input alone both stay at chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, CountOrZero, NonNegative, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAVES = 4  # for each image
SIZES = {split: WAVES * images for split, images in _data.NUM_DIGITS.items()}
CLASSES = 5
STEPS, SENSORS = 20, 10
SHAPES = {"image": ((8, 8, 1), np.uint8), "series": ((STEPS, SENSORS), np.float32)}
AMPLITUDES = 0.5, 1.5
NOISE = 0.3


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    inputs: Literal["both", "image", "series"] = "both"
    """The inputs of the network."""
    score_loss: Literal["mse", "none"] = "mse"
    """The loss of the score; with none only the class is trained."""
    score_weight: NonNegative = 1.0
    """Weight of the score's loss in the sum; the weight of the class' loss is 1."""
    by: Literal["name", "position"] = "name"
    """Whether inputs, outputs, losses and their weights are dictionaries or lists."""
    units: Count = 128
    """Width of the dense layers after both inputs are concatenated."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""
    epochs: CountOrZero = 15


def by_config(config: Config, values: Mapping[str, Any]) -> Any:
    """Returns values of several inputs or outputs in the structure that `config.by` selects."""
    return dict(values) if config.by == "name" else list(values.values())


def network(config: Config) -> keras.Model:
    """Returns the network: images and series to a score and a logit of each class."""
    layers = keras.layers
    inputs = {name: keras.Input(SHAPES[name][0], name=name) for name in input_names(config)}
    features = []
    if "image" in inputs:
        x = layers.Rescaling(1 / _data.MAX_PIXEL)(inputs["image"])
        x = layers.Conv2D(32, 3, activation="relu")(x)
        x = layers.MaxPooling2D()(x)
        features.append(layers.Flatten()(x))
    if "series" in inputs:
        x = layers.Conv1D(32, 5, activation="relu")(inputs["series"])
        features.append(layers.GlobalAveragePooling1D()(x))
    x = layers.concatenate(features) if len(features) > 1 else features[0]
    x = layers.Dense(config.units, activation="relu")(x)
    x = layers.Dense(config.units, activation="relu")(x)
    outputs = {"score": layers.Dense(1, name="score")(x), "class": layers.Dense(CLASSES, name="class")(x)}
    return keras.Model(by_config(config, inputs), by_config(config, outputs))


def input_names(config: Config) -> tuple[str, ...]:
    """Returns the names of the network's inputs."""
    return tuple(SHAPES) if config.inputs == "both" else (config.inputs,)


def build(config: Config) -> research.Learner:
    """A loss, a weight and a metric for each output, or no loss for the score; Adam."""
    keras.utils.set_random_seed(config.seed)
    losses = {
        "score": None if config.score_loss == "none" else config.score_loss,
        "class": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    return research.supervised(
        network(config),
        loss=by_config(config, losses),
        loss_weights=by_config(config, {"score": config.score_weight, "class": 1.0}),
        metrics=by_config(config, {"score": ["mae"], "class": ["accuracy"]}),
        optimizer=keras.optimizers.Adam(config.learning_rate),
    )


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; no image is in two of them."""
    names = input_names(config)
    x = {name: jax.ShapeDtypeStruct(*SHAPES[name]) for name in names}
    y = {"score": jax.ShapeDtypeStruct((1,), np.float32), "class": jax.ShapeDtypeStruct((), np.int32)}
    example = research.Batch(by_config(config, x), by_config(config, y))

    def load() -> dict[str, tuple[Any, Any]]:
        splits = make_pairs(config.seed).items()
        return {split: (by_config(config, {name: x[name] for name in names}), by_config(config, y)) for split, (x, y) in splits}

    return _data.lazy_splits(
        load,
        SIZES,
        lambda _: example,
        batch_size=config.batch_size,
        eval_batch_size=_data.NUM_DIGITS["test"],
        seed=config.seed,
        name="image_series",
    )


def make_pairs(seed: int) -> dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Returns inputs and targets of each split: every image with its own waves."""
    images, digits = _data.read_digits()
    rng = np.random.default_rng(seed)
    order = np.repeat(rng.permutation(len(images)), WAVES)
    images, digits = images[order, ..., None], digits[order]
    n = len(order)
    frequency, amplitude = rng.integers(0, CLASSES, n), rng.uniform(*AMPLITUDES, n)
    phase, noise = rng.uniform(0, 1, n), rng.normal(0, NOISE, (n, STEPS, SENSORS))
    # `frequency` + 1 periods in a series; the row of sensors is one wavelength long.
    time, place = np.arange(STEPS)[:, None] / STEPS, np.arange(SENSORS) / SENSORS
    periods = (frequency[:, None, None] + 1) * time - place + phase[:, None, None]
    series = amplitude[:, None, None] * np.sin(2 * np.pi * periods) + noise
    ink = images.mean((1, 2, 3))
    ink = (ink - ink.mean()) / ink.std()
    low, high = AMPLITUDES
    loudness = (amplitude - (low + high) / 2) / ((high - low) / np.sqrt(12))  # standardised: uniform on [low, high]
    x = {"image": images, "series": series.astype(np.float32)}
    y = {"score": (ink * loudness)[:, None].astype(np.float32), "class": ((digits + frequency) % CLASSES).astype(np.int32)}
    stops = np.cumsum(list(SIZES.values()))
    rows = [slice(stop - size, stop) for stop, size in zip(stops, SIZES.values(), strict=True)]
    return {
        split: ({k: v[part] for k, v in x.items()}, {k: v[part] for k, v in y.items()})
        for split, part in zip(SIZES, rows, strict=True)
    }


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws predictions for the test pairs: scores, the confusion matrix, and some of the pairs."""
    from matplotlib.figure import Figure

    outputs = research.predict(learner, splits["test"], state)
    predicted_score, logits = (outputs[name] for name in ("score", "class")) if config.by == "name" else outputs
    x, y = make_pairs(config.seed)["test"]
    predicted_score, score = predicted_score[:, 0], y["score"][:, 0]
    predicted_class, label = logits.argmax(-1), y["class"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    scores, classes = left.subplots(1, 2)

    scores.scatter(score, predicted_score, s=7, alpha=0.5, color=_plots.BLUE, edgecolors="none")
    scores.axline((0, 0), slope=1, color="#999999", linewidth=1)
    scores.set(xlabel="score", ylabel="predicted score")
    error = "not trained" if config.score_loss == "none" else f"squared error {np.mean((predicted_score - score) ** 2):.3f}"
    scores.set_title(f"{error}, variance {score.var():.3f}", fontsize=11)
    _plots.hide_frame(scores)

    _plots.confusion_matrix(classes, label, predicted_class, range(CLASSES), fontsize=10)
    classes.set(xlabel="predicted class", ylabel="class")
    classes.set_title(f"{np.mean(predicted_class == label):.3f} of {len(label)} correct, chance {1 / CLASSES}", fontsize=11)

    rows = np.arange(5) * (len(label) // 5)
    alpha = {name: 1.0 if name in input_names(config) else 0.15 for name in SHAPES}
    for row, above, below in zip(rows, *right.subplots(2, len(rows)), strict=True):
        above.imshow(x["image"][row, ..., 0], cmap="gray_r", alpha=alpha["image"])
        below.imshow(x["series"][row].T, cmap="RdBu", vmin=-2, vmax=2, aspect="auto", alpha=alpha["series"])
        title = f"class {label[row]}: {predicted_class[row]}\nscore {score[row]:.2f}: {predicted_score[row]:.2f}"
        above.set_title(title, fontsize=9)
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
        below.set(xlabel="time", ylabel="sensors" if row == rows[0] else "")
    pale = "" if config.inputs == "both" else "; pale: not an input"
    right.suptitle(f"pairs, target: prediction{pale}", fontsize=11)
    return {"predictions": figure}

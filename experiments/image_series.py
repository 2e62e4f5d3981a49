"""Answer two questions about an image and a time series that neither can answer alone.

    just run image_series                              # real digits beside drawn signals; fifteen seconds on two cores
    just run image_series --inputs image               # the same network without the series: chance
    just run image_series --score-loss none            # one of two outputs trained, the other left as it was born
    just run image_series --by position                # inputs, outputs, losses and weights as lists: the same numbers

The image is one of scikit-learn's 1,797 handwritten digits; the series is what ten sensors in a row record of a passing wave.
The class is (digit + number of the wave's frequency) mod 5: whatever the digit, or whatever the wave, all five are equally
likely. The score is the image's standardised ink times the wave's standardised amplitude: its variance is 1, and its mean 0
whatever the image, or whatever the wave.

Expect test_class_accuracy >= 0.9 (chance 0.2) and test_score_loss <= 0.12 (chance 1). With one input alone both stay at chance.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

import research
from research.data import Batches, arrays, deferred

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = {"train": 1437, "val": 180, "test": 180}
WAVES = 4  # drawn for each image
CLASSES = 5
STEPS, SENSORS = 20, 10
SHAPES = {"image": ((8, 8, 1), np.uint8), "series": ((STEPS, SENSORS), np.float32)}
BRIGHTEST = 16
AMPLITUDES = 0.5, 1.5
NOISE = 0.3


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    inputs: Literal["both", "image", "series"] = "both"
    """What the network is shown."""
    score_loss: Literal["mse", "none"] = "mse"
    """The loss of the score; without one only the class is trained."""
    score_weight: float = 1.0
    """Of the score's loss in the sum; the class' loss weighs 1."""
    by: Literal["name", "position"] = "name"
    """Inputs, outputs, losses and their weights go in dictionaries or in lists."""
    units: int = 128
    """Of the layer that both inputs meet in."""
    learning_rate: float = 1e-3
    """Of Adam."""
    epochs: int = 15
    """Passes over the training pairs."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 32
    """Pairs in a step."""
    seed: int = 0
    """Of weights, waves, split and shuffling."""


def tree(config: Config, named: Mapping[str, Any]) -> Any:
    """What belongs to several inputs or outputs, as `config.by` wants it."""
    return dict(named) if config.by == "name" else list(named.values())


def network(config: Config) -> keras.Model:
    """The network: images and series in, a number and a logit for each class out."""
    layers = keras.layers
    inputs = {name: keras.Input(SHAPES[name][0], name=name) for name in seen(config)}
    features = []
    if "image" in inputs:
        x = layers.Rescaling(1 / BRIGHTEST)(inputs["image"])
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
    return keras.Model(tree(config, inputs), tree(config, outputs))


def seen(config: Config) -> tuple[str, ...]:
    """The names of the inputs that the network has."""
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
        loss=tree(config, losses),
        loss_weights=tree(config, {"score": config.score_weight, "class": 1.0}),
        metrics=tree(config, {"score": ["mae"], "class": ["accuracy"]}),
        optimizer=keras.optimizers.Adam(config.learning_rate),
        example=data(config)["train"].shapes,
    )


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; no image is in two of them."""
    load = functools.cache(lambda: pairs(config.seed))

    def split(name: str, images: int) -> Batches:
        size = config.batch_size if name == "train" else images
        shapes = {part: jax.ShapeDtypeStruct((size, *shape), dtype) for part, (shape, dtype) in SHAPES.items()}
        y = {"score": jax.ShapeDtypeStruct((size, 1), np.float32), "class": jax.ShapeDtypeStruct((size,), np.int32)}

        def loaded() -> Batches:
            x, y = load()[name]
            return arrays(
                tree(config, {part: x[part] for part in seen(config)}),
                tree(config, y),
                batch_size=size,
                seed=config.seed,
                shuffle=name == "train",
                name=f"image_series ({name})",
            )

        announced = research.Batch(tree(config, {part: shapes[part] for part in seen(config)}), tree(config, y))
        return deferred(loaded, announced, WAVES * images)

    return {name: split(name, images) for name, images in IMAGES.items()}


def pairs(seed: int) -> dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Inputs and targets of each split: every image beside waves of its own."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = np.repeat(rng.permutation(len(images)), WAVES)
    images, digits = images[order].reshape(-1, 8, 8, 1), digits[order]
    n = len(order)
    frequency, amplitude = rng.integers(0, CLASSES, n), rng.uniform(*AMPLITUDES, n)
    phase, noise = rng.uniform(0, 1, n), rng.normal(0, NOISE, (n, STEPS, SENSORS))
    # `frequency` + 1 times in a series; it takes a whole period to pass the sensors.
    time, place = np.arange(STEPS)[:, None] / STEPS, np.arange(SENSORS) / SENSORS
    turns = (frequency[:, None, None] + 1) * time - place + phase[:, None, None]
    series = amplitude[:, None, None] * np.sin(2 * np.pi * turns) + noise
    ink = images.mean((1, 2, 3))
    ink = (ink - ink.mean()) / ink.std()
    low, high = AMPLITUDES
    loudness = (amplitude - (low + high) / 2) / ((high - low) / np.sqrt(12))  # a uniform distribution's standard deviation
    x = {"image": images.astype(np.uint8), "series": series.astype(np.float32)}
    y = {"score": (ink * loudness)[:, None].astype(np.float32), "class": ((digits + frequency) % CLASSES).astype(np.int32)}
    ends = np.cumsum([WAVES * count for count in IMAGES.values()])
    parts = [slice(end - WAVES * count, end) for end, count in zip(ends, IMAGES.values(), strict=True)]
    return {
        name: ({k: v[part] for k, v in x.items()}, {k: v[part] for k, v in y.items()})
        for name, part in zip(IMAGES, parts, strict=True)
    }


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """The network with the weights that a state holds."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """What the network says of the test pairs: scores against the true ones, class against class, and some of the pairs."""
    from matplotlib.figure import Figure

    outputs = research.predict(learner, splits["test"], state)
    score, logits = (outputs[name] for name in ("score", "class")) if config.by == "name" else outputs
    x, y = pairs(config.seed)["test"]
    said, answers, truth, labels = score[:, 0], logits.argmax(-1), y["score"][:, 0], y["class"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    scores, classes = left.subplots(1, 2)

    scores.scatter(truth, said, s=7, alpha=0.5, color="#4477aa", edgecolors="none")
    scores.axline((0, 0), slope=1, color="#999999", linewidth=1)
    scores.set(xlabel="score", ylabel="score it says")
    told = "not trained" if config.score_loss == "none" else f"squared error {np.mean((said - truth) ** 2):.3f}"
    scores.set_title(f"{told}, variance {truth.var():.3f}", fontsize=11)
    scores.spines[["top", "right"]].set_visible(False)

    counts = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counts, (labels, answers), 1)
    classes.imshow(counts, cmap="Blues", vmin=0)
    for row, column in np.ndindex(counts.shape):
        dark = counts[row, column] > counts.max() / 2
        classes.text(column, row, counts[row, column], ha="center", va="center", color="w" if dark else "k")
    classes.set(xlabel="class it says", ylabel="class", xticks=range(CLASSES), yticks=range(CLASSES))
    classes.set_title(f"{np.mean(answers == labels):.3f} of {len(labels)} right, chance {1 / CLASSES}", fontsize=11)

    shown = np.arange(5) * (len(labels) // 5)
    visible = {name: 1.0 if name in seen(config) else 0.15 for name in SHAPES}
    for row, above, below in zip(shown, *right.subplots(2, len(shown)), strict=True):
        above.imshow(x["image"][row, ..., 0], cmap="gray_r", alpha=visible["image"])
        below.imshow(x["series"][row].T, cmap="RdBu", vmin=-2, vmax=2, aspect="auto", alpha=visible["series"])
        above.set_title(f"class {labels[row]}: {answers[row]}\nscore {truth[row]:.2f}: {said[row]:.2f}", fontsize=9)
        for axes in (above, below):
            axes.set(xticks=[], yticks=[])
        below.set(xlabel="time", ylabel="sensors" if row == shown[0] else "")
    pale = "" if config.inputs == "both" else "; pale: not shown to it"
    right.suptitle(f"pairs, what is true: what it says{pale}", fontsize=11)
    return {"answers": figure}

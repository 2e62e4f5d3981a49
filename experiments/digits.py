"""Classify handwritten digits, or clothes, with a small network.

    just run digits                                             # 1,797 real digits; five seconds on two cores
    just run digits --model cnn
    just run digits --data fashion_mnist --epochs 3             # downloads 30 MB once, or set KERAS_HOME

Expect val_accuracy >= 0.97 on the default data after the default 20 epochs, and test_accuracy >= 0.86 on Fashion-MNIST after 3.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

import research
from research.data import Batches, arrays, deferred
from research.reordering import reordered

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from research.tensorboard import Writer

CLASSES = 10
# examples in train, val and test; the images' side; the largest pixel value
SETS = {
    "sklearn": ((1437, 180, 180), 8, 16),
    "mnist": ((55000, 5000, 10000), 28, 255),
    "fashion_mnist": ((55000, 5000, 10000), 28, 255),
}


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    data: Literal["sklearn", "mnist", "fashion_mnist"] = "sklearn"
    """The images: scikit-learn's 8x8 digits need no download, the others come through Keras."""
    model: Literal["mlp", "cnn"] = "mlp"
    """A layer of 512 relu units, or two convolutions."""
    style: Literal["sequential", "functional", "subclassed"] = "sequential"
    """The way of Keras in which the same network is built."""
    sums: Literal["keras", "reordered"] = "keras"
    """The order of sums in gradients: to Keras' bits, or equal to rounding and on the CPU faster with convolutions."""
    dropout: float = 0.5
    """Share of units left out in training."""
    learning_rate: float = 1e-3
    """Of Adam, decaying to 0 along half a cosine."""
    epochs: int = 20
    """Passes over the training data."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 32
    """Examples in a step."""
    seed: int = 0
    """Of weights, dropout, split and shuffling."""


def network(config: Config) -> keras.Model:
    """The network: images of whole numbers in, a logit for each class out."""
    _, side, brightest = SETS[config.data]
    layers = keras.layers
    stack: list[keras.Layer] = [layers.Rescaling(1 / brightest)]
    if config.model == "mlp":
        stack += [layers.Flatten(), layers.Dense(512, activation="relu")]
    else:
        stack.append(layers.Reshape((side, side, 1)))
        for filters in (32, 64):
            stack += [layers.Conv2D(filters, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        stack.append(layers.Flatten())
    stack += [layers.Dropout(config.dropout), layers.Dense(CLASSES)]
    if config.style == "sequential":
        return keras.Sequential([keras.Input((side, side)), *stack])
    if config.style == "functional":
        image = features = keras.Input((side, side))
        for layer in stack:
            features = layer(features)
        return keras.Model(image, features)
    return Subclassed(stack)


@keras.saving.register_keras_serializable("digits")
class Subclassed(keras.Model):
    """The same layers, called one after the other by a `call` of our own."""

    def __init__(self, stack: list[keras.Layer]) -> None:
        super().__init__()
        self.stack = stack

    def call(self, x: Any, training: bool = False) -> Any:
        """The logits of a batch of images."""
        for layer in self.stack:
            x = layer(x, training=training) if isinstance(layer, keras.layers.Dropout) else layer(x)
        return x

    def get_config(self) -> dict[str, Any]:
        """What `keras.saving` needs to make it again."""
        return {"stack": [keras.saving.serialize_keras_object(layer) for layer in self.stack]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Subclassed":
        """A new one from `get_config`'s result."""
        return cls([keras.saving.deserialize_keras_object(layer, custom_objects) for layer in config["stack"]])


def build(config: Config) -> research.Learner:
    """Cross-entropy on the logits, Adam with cosine decay."""
    keras.utils.set_random_seed(config.seed)
    train = data(config)["train"]
    steps = config.epochs * train.steps_per_epoch
    learner = research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(config.learning_rate, max(1, min(steps, config.steps or steps)))
        ),
        metrics=["accuracy"],
        example=train.shapes,
    )
    return learner._replace(train=reordered(learner.train)) if config.sums == "reordered" else learner


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; what is held out where no test set comes with the data is drawn by seed."""
    sizes, side, _ = SETS[config.data]
    load = functools.cache(lambda: _images(config))

    def split(name: str, examples: int) -> Batches:
        size = config.batch_size if name == "train" else min(examples, 500)
        shapes = research.Batch(jax.ShapeDtypeStruct((size, side, side), np.uint8), jax.ShapeDtypeStruct((size,), np.int32))
        return deferred(
            lambda: arrays(
                *load()[name],
                batch_size=size,
                seed=config.seed,
                shuffle=name == "train",
                classes=CLASSES,
                name=f"{config.data} ({name})",
            ),
            shapes,
            examples,
        )

    return {name: split(name, examples) for name, examples in zip(("train", "val", "test"), sizes, strict=True)}


def _images(config: Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each split."""
    sizes, _, _ = SETS[config.data]
    if config.data == "sklearn":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, test = x.reshape(-1, 8, 8), None
    else:
        (x, y), test = _downloaded(config.data)
    order = np.random.default_rng(config.seed).permutation(len(x))
    x, y = x[order].astype(np.uint8), y[order].astype(np.int32)
    train, val = slice(0, sizes[0]), slice(sizes[0], sizes[0] + sizes[1])
    held_out = (x[val.stop :], y[val.stop :]) if test is None else (test[0].astype(np.uint8), test[1].astype(np.int32))
    return {"train": (x[train], y[train]), "val": (x[val], y[val]), "test": held_out}


def _downloaded(name: str) -> Any:
    """A data set of Keras, from its cache or the network."""
    try:
        return getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare Exception where a download fails
        cache = Path(os.environ.get("KERAS_HOME", "~/.keras"), "datasets")
        files = f"{cache}/mnist.npz" if name == "mnist" else f"the four idx3/idx1-ubyte.gz files into {cache}/fashion-mnist/"
        raise research.Refused(
            f"--data {name}: neither in Keras' cache nor to be downloaded; put {files}, set KERAS_HOME to a folder whose "
            "datasets/ has it, or use --data sklearn, which needs no download."
        ) from error


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """The network with the weights that a state holds."""
    model = network(config)
    model(np.zeros(data(config)["train"].shapes.x.shape, np.uint8))
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """What the network gets wrong in the test data: each class against each, and images with the wrong answer."""
    from matplotlib.figure import Figure

    test = splits["test"]
    logits = research.predict(learner, test, state)
    batches = [test.batch(step) for step in range(test.steps_per_epoch)]
    images, labels = np.concatenate([b.x for b in batches]), np.concatenate([b.y for b in batches])
    answers = logits.argmax(-1)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    counts = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counts, (labels, answers), 1)
    axes = left.add_subplot()
    axes.imshow(np.log1p(counts), cmap="Blues")
    for row, column in np.argwhere(counts):
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color="w" if row == column else "k")
    axes.set(xlabel="answer", ylabel="label", xticks=range(CLASSES), yticks=range(CLASSES))
    axes.set_title(f"{np.mean(answers == labels):.4f} of {len(labels)} right", fontsize=11)
    wrong = np.flatnonzero(answers != labels)
    # The surest mistakes first: the margin by which the wrong answer won.
    margin = logits[wrong, answers[wrong]] - logits[wrong, labels[wrong]]
    for i, axes in enumerate(right.subplots(3, 5).flat):
        axes.axis("off")
        if i < len(wrong):
            row = wrong[np.argsort(-margin)[i]]
            axes.imshow(images[row], cmap="gray_r")
            axes.set_title(f"{labels[row]} not {answers[row]}", fontsize=8)
    right.suptitle("surest mistakes: label, not answer", fontsize=11)
    return {"mistakes": figure}


def summaries(
    config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches], writer: "Writer", step: int
) -> None:
    """For TensorBoard: what every layer gives, the gradients, and where the network puts the validation images."""
    from research import graph, projector, tensorboard

    # Built the functional way, the same network (weight for weight) tells its layers.
    model = network(replace(config, style="functional"))
    batch = splits["val"].batch(0)
    layers = graph.activations(model, state, batch.x)
    tensorboard.histograms(writer, step, {f"activations/{name}": values for name, values in layers.items()})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective, _ = research.keras_objective(model, loss=loss, metrics=["accuracy"])
    _, gradients = jax.jit(research.gradient(objective))(state, batch)
    named = zip(learner.names.trainable, gradients.values, strict=True)
    tensorboard.histograms(writer, step, {f"gradients/{name}": values for name, values in named})
    *_, features, _ = layers.values()  # what the last layer takes
    projector.embedding(writer.directory, "features", features, batch.y, batch.x)

"""Classify handwritten digits, or clothes, with a small network.

    just run digits                                             # 1,797 real digits; five seconds on two cores
    just run digits --model cnn
    just run digits --data fashion_mnist --epochs 3             # downloads 30 MB once, or set KERAS_HOME

Expect val_accuracy >= 0.97 on the default data after the default 20 epochs, and test_accuracy >= 0.86 on Fashion-MNIST after 3.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Fraction, Positive, TrainingOptions
from experiments._images import CLASSES, DATA_SETS, Name, image_batches
from research.cpu.sums import fast_sums
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from research.reporting.tensorboard import Writer


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    data: Name = "sklearn"
    """The images: scikit-learn's 8x8 digits need no download, the others come through Keras."""
    model: Literal["mlp", "cnn"] = "mlp"
    """A dense layer of 512 relu units, or two convolutions."""
    style: Literal["sequential", "functional", "subclassed"] = "sequential"
    """Which of Keras' APIs builds the network; the numbers are the same."""
    sums: Literal["exact", "fast"] = "exact"
    """How gradients are summed: bit for bit as Keras does, or equal to rounding and faster for convolutions on the CPU."""
    dropout: Fraction = 0.5
    """Share of units dropped in training."""
    learning_rate: Positive = 1e-3
    """Initial learning rate of Adam; it decays to 0 along half a cosine."""


def network(config: Config) -> keras.Model:
    """Returns the network: integer pixels to a logit of each class."""
    data_set = DATA_SETS[config.data]
    layers = keras.layers
    stack: list[keras.Layer] = [layers.Rescaling(1 / data_set.max_pixel)]
    if config.model == "mlp":
        stack += [layers.Flatten(), layers.Dense(512, activation="relu")]
    else:
        stack.append(layers.Reshape((data_set.side, data_set.side, 1)))
        for filters in (32, 64):
            stack += [layers.Conv2D(filters, 3, padding="same", activation="relu"), layers.MaxPooling2D()]
        stack.append(layers.Flatten())
    stack += [layers.Dropout(config.dropout), layers.Dense(CLASSES)]
    if config.style == "sequential":
        return keras.Sequential([keras.Input((data_set.side, data_set.side)), *stack])
    if config.style == "functional":
        image = features = keras.Input((data_set.side, data_set.side))
        for layer in stack:
            features = layer(features)
        return keras.Model(image, features)
    return Subclassed(stack)


@keras.saving.register_keras_serializable("digits")
class Subclassed(keras.Model):
    """The same layers, called one after the other by a `call` of its own."""

    def __init__(self, stack: list[keras.Layer]) -> None:
        super().__init__()
        self.stack = stack

    def call(self, x: Any, training: bool = False) -> Any:
        """Returns the logits of a batch of images."""
        for layer in self.stack:
            x = layer(x, training=training) if isinstance(layer, keras.layers.Dropout) else layer(x)
        return x

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `from_config`."""
        return {"stack": [keras.saving.serialize_keras_object(layer) for layer in self.stack]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Subclassed":
        """Builds the model from the result of `get_config`."""
        return cls([keras.saving.deserialize_keras_object(layer, custom_objects) for layer in config["stack"]])


def build(config: Config) -> research.Learner:
    """Cross-entropy on the logits, Adam with cosine decay."""
    keras.utils.set_random_seed(config.seed)
    train = data(config)["train"]
    schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, max(1, config.num_steps(train.steps_per_epoch)))
    learner = research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(schedule),
        metrics=["accuracy"],
        example=train.shapes,
    )
    return learner._replace(train=fast_sums(learner.train)) if config.sums == "fast" else learner


def data(config: Config) -> dict[str, Batches]:
    """Batches of `train`, `val` and `test`; `seed` decides which images are held out, unless the data has a test set."""
    return image_batches(config.data, batch_size=config.batch_size, seed=config.seed)


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the weights of a state."""
    model = network(config)
    model(np.zeros(data(config)["train"].shapes.x.shape, np.uint8))
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the mistakes on the test data: the confusion matrix, and images with the predicted class."""
    from matplotlib.figure import Figure

    logits = research.predict(learner, splits["test"], state)
    images, labels, *_ = _data.all_examples(splits["test"])
    predictions = logits.argmax(-1)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axes = left.add_subplot()
    _plots.confusion_matrix(axes, labels, predictions, range(CLASSES), fontsize=7)
    axes.set(xlabel="prediction", ylabel="label")
    axes.set_title(f"{np.mean(predictions == labels):.4f} of {len(labels)} correct", fontsize=11)
    # The most confident mistakes first: those with the largest margin between the predicted logit and the label's.
    mistakes = np.flatnonzero(predictions != labels)
    margin = logits[mistakes, predictions[mistakes]] - logits[mistakes, labels[mistakes]]
    mistakes = mistakes[np.argsort(-margin)]
    titles = [f"{labels[row]} as {predictions[row]}" for row in mistakes]
    _plots.image_panel(right.subplots(3, 5).flat, images[mistakes], titles, vmin=None, vmax=None)
    right.suptitle("most confident mistakes: label as prediction", fontsize=11)
    return {"mistakes": figure}


def summaries(
    config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches], writer: "Writer", step: int
) -> None:
    """Writes to TensorBoard the outputs of every layer, the gradients, and an embedding of the validation images."""
    from research.reporting import embeddings, graph, tensorboard

    # A functional model with the same weights has its layers' outputs as tensors.
    model = network(replace(config, style="functional"))
    batch = splits["val"].batch(0)
    layers = graph.activations(model, state, batch.x)
    tensorboard.write_histograms(writer, step, {f"activations/{name}": values for name, values in layers.items()})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    objective, _ = research.keras_objective(model, loss=loss, metrics=["accuracy"])
    _, gradients = jax.jit(research.gradient(objective))(state, batch)
    named = zip(learner.names.trainable, gradients.values, strict=True)
    tensorboard.write_histograms(writer, step, {f"gradients/{name}": values for name, values in named})
    *_, features, _ = layers.values()  # the input of the last layer
    embeddings.write_embedding(writer.directory, "features", features, batch.y, batch.x)

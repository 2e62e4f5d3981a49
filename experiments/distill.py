"""Teach a small network what a large one knows: distillation, three learners in one program.

    just run distill                  # a quarter of a minute on two idle cores
    just run distill --temperature 1 --student-units 8

Distilling the knowledge in a neural network (Hinton et al., arXiv:1503.02531). The teacher is trained on labels; the student,
thirty times smaller, on the teacher's current predictions at a higher temperature, and never sees a label. A baseline of the
student's size is trained on the labels beside them. All three are one learner: each step trains the teacher, then the student
against the new teacher.

Expect test_student_accuracy >= 0.97 (0.983, 0.978 and 0.978 with seeds 0 to 2), as much as the baseline reaches with labels
(0.978, 0.983, 0.961); the teacher has 0.97 to 0.99.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, CountOrZero, Fraction, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers."""

    teacher_units: Count = 512
    """Width of the teacher's hidden layer."""
    student_units: Count = 16
    """Width of the student's and the baseline's hidden layer."""
    dropout: Fraction = 0.5
    """Dropout rate of the teacher."""
    temperature: Positive = 2.0
    """Divides the logits of both before their distributions are compared."""
    learning_rate: Positive = 3e-3
    """Learning rate of Adam, for each of the three."""
    epochs: CountOrZero = 60
    """Passes over the training data."""


def classifier(name: str, units: int, dropout: float = 0.0) -> keras.Model:
    """Returns a network with one hidden layer, images -> logits."""
    layers, side = keras.layers, _data.SIDE
    stack = [layers.Rescaling(1 / _data.MAX_PIXEL), layers.Flatten(), layers.Dense(units, activation="relu")]
    return keras.Sequential([keras.Input((side, side)), *stack, layers.Dropout(dropout), layers.Dense(_data.CLASSES)], name=name)


def build(config: Config) -> research.Learner:
    """Returns the joint learner of teacher, student and baseline."""
    return algorithm(config)[0]


def algorithm(config: Config) -> tuple[research.Learner, dict[str, keras.Model]]:
    """Returns the learner and its networks."""
    keras.utils.set_random_seed(config.seed)
    ops, adam = keras.ops, keras.optimizers.Adam
    teacher = classifier("teacher", config.teacher_units, config.dropout)
    student, baseline = classifier("student", config.student_units), classifier("baseline", config.student_units)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")

    def distillation(batch: research.Batch, training: bool) -> Any:
        targets = ops.softmax(teacher(batch.x, training=False) / config.temperature)
        logits = student(batch.x, training=training)
        accuracy.update_state(batch.y, logits)
        crossentropy = ops.categorical_crossentropy(targets, logits / config.temperature, from_logits=True)
        agreement = ops.mean(ops.cast(ops.argmax(logits, -1) == ops.argmax(targets, -1), "float32"))
        return config.temperature**2 * ops.mean(crossentropy), {"agreement": agreement}

    def on_labels(model: keras.Model) -> research.Learner:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return research.supervised(model, loss=loss, optimizer=adam(config.learning_rate), metrics=["accuracy"])

    example = data(config)["train"].shapes
    distilled = research.learner(distillation, [student, accuracy], adam(config.learning_rate), example=example)
    learner = research.joint({"teacher": on_labels(teacher), "student": distilled, "baseline": on_labels(baseline)})
    return learner, {"teacher": teacher, "student": student, "baseline": baseline}


def data(config: Config) -> dict[str, Batches]:
    """Returns scikit-learn's digits."""
    return _data.digit_batches(batch_size=config.batch_size, seed=config.seed)


def models(config: Config, state: dict[str, Any]) -> dict[str, keras.Model]:
    """Returns the three networks with the weights of a state."""
    learner, models = algorithm(config)
    research.write_back(state, learner)
    return models


def pictures(config: Config, learner: research.Learner, state: dict[str, Any], splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws what each network makes of the test images that they disagree on most, and each one's confusion matrix."""
    from matplotlib.figure import Figure

    test = _data.all_examples(splits["test"])
    logits = {name: np.asarray(value) for name, value in learner.predict(state, test).items()}
    probabilities = {name: np.asarray(keras.ops.softmax(value)) for name, value in logits.items()}
    figure = Figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axes, (name, value) in zip(above.subplots(1, 3), logits.items(), strict=True):
        predictions = value.argmax(-1)
        _plots.confusion_matrix(axes, test.y, predictions, range(_data.CLASSES), fontsize=7)
        axes.set(title=f"{name}: {np.mean(predictions == test.y):.1%}", xlabel="predicted", ylabel="digit")
    disagreement = np.abs(probabilities["teacher"] - probabilities["student"]).sum(-1)
    worst = np.argsort(-disagreement)[:6]
    panels = below.subplots(2, 6)
    _plots.image_panel(panels[0], test.x[worst], [f"a {digit}" for digit in test.y[worst]], vmin=0, vmax=_data.MAX_PIXEL)
    for axes, i in zip(panels[1], worst, strict=True):
        for offset, (name, value) in enumerate(probabilities.items()):
            axes.bar(np.arange(10) + 0.27 * (offset - 1), value[i], 0.27, label=name)
        axes.set(xticks=range(10), ylim=(0, 1))
        _plots.hide_frame(axes)
    below.legend(*panels[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    below.suptitle("test images on which teacher and student differ most, and the probabilities that each gives", fontsize=11)
    return {"classifiers": figure}

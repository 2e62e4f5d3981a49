"""A complete training loop written by hand: epochs, batches, logs, metrics that are reset, validation.

    .venv/bin/python -m experiments.custom_loop     # the loop on this page, which prints its logs; five seconds
    just run custom_loop                            # the same training by the library's loop, and both compared

Read this page first. A learner is a handful of pure functions, and a training loop calls them: `train_by_hand` below is the
"training loop from scratch" of the Keras guides. Copy it when the library's loop does not do what you need.

Expect val_accuracy >= 0.96 from either, the same printed losses and a largest_difference of 0.0 between their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, Positive, TrainingOptions
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """All options that change the numbers."""

    units: Count = 64
    """Width of the two hidden layers."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam."""


def network(config: Config) -> keras.Model:
    """Any Keras model will do: this one maps 8x8 images with integer pixels to a logit of each digit."""
    layers = keras.layers
    hidden = [layers.Dense(config.units, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((8, 8)), layers.Rescaling(1 / 16), layers.Flatten(), *hidden, layers.Dense(10)])


def build(config: Config) -> research.Learner:
    """The model with its loss, its optimizer and its metrics, as pure functions."""
    keras.utils.set_random_seed(config.seed)
    return research.supervised(
        network(config),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.Adam(config.learning_rate),
        metrics=["accuracy"],
    )


def data(config: Config) -> dict[str, Batches]:
    """Batches addressed by a step: `splits["train"].batch(7)` is always the same batch."""
    return _data.digit_batches(batch_size=config.batch_size, seed=config.seed)


def train_by_hand(
    config: Config,
    learner: research.Learner,
    splits: dict[str, Batches],
    log_every: int = 20,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[research.State, list[research.LogEntry]]:
    """Trains. Returns the final state and all logs."""
    # A step maps a state and a batch to the next state. The old state is donated: its memory is reused, it can't be read again.
    train_step = jax.jit(learner.train, donate_argnums=0)
    eval_step = jax.jit(learner.evaluate)  # not donated: training continues from the state that is evaluated
    train, val = splits["train"], splits["val"]
    total = config.num_steps(train.steps_per_epoch)
    history = []

    def log(step: int, epoch: int, split: str, logs: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in logs.items()}  # waits for the device: so not at every step
        history.append(research.LogEntry(step, epoch, split, values))
        report(f"epoch {epoch + 1}  step {step:4d}  {split:5}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    state = learner.init()  # weights, optimizer slots, metrics, random seeds: everything that training changes
    for epoch in range(-(-total // train.steps_per_epoch)):
        state = learner.reset(state)  # logs are means since the start of the epoch
        first = epoch * train.steps_per_epoch
        for step in range(first, min(first + train.steps_per_epoch, total)):
            state, logs = train_step(state, train.batch(step))
            if (step + 1) % log_every == 0:
                log(step + 1, epoch, "train", logs)
        eval_state = learner.reset(state)  # validation has metrics of its own
        for eval_batch in range(val.steps_per_epoch):
            eval_state, logs = eval_step(eval_state, val.batch(eval_batch))
        log(step + 1, epoch, "val", logs)
    return state, history


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the Keras model with the weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def largest_difference(a: research.State, b: research.State) -> float:
    """Returns the largest absolute difference between two states' weights."""
    pairs = zip(a.trainable, b.trainable, strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Compares `state`, which the library trained, with the weights of the loop by hand."""
    return {"largest_difference": largest_difference(train_by_hand(config, learner, splits)[0], state)}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the losses of both loops: the library's as lines, those by hand as points."""
    from matplotlib.figure import Figure

    state_by_hand, history_by_hand = train_by_hand(config, learner, splits)
    history: list[research.LogEntry] = []
    options = {"steps": config.steps, "epochs": config.epochs, "evaluations": {"val": splits["val"]}}
    research.train(learner, splits["train"], log_every=20, log=history.append, **options)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for split, colour in (("train", _plots.BLUE), ("val", _plots.RED)):
        for entries, label, style in ((history, "library", "-"), (history_by_hand, "by hand", "o")):
            curve = [(entry.step, entry.values["loss"]) for entry in entries if entry.split == split]
            axes.plot(*np.transpose(curve), style, color=colour, markersize=4, linewidth=1.4, label=f"{split}, {label}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.set_title(f"largest difference between the weights: {largest_difference(state_by_hand, state):g}", fontsize=11)
    _plots.hide_frame(axes)
    axes.legend(frameon=False)
    return {"loops": figure}


if __name__ == "__main__":
    train_by_hand(Config(), build(Config()), data(Config()), report=print)

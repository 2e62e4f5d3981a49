"""A training loop written by hand, all of it: epochs, batches, logs, metrics that begin anew, validation.

    .venv/bin/python -m experiments.custom_loop     # the loop on this page, which prints its lines; five seconds
    just run custom_loop                            # the same training by the library's loop, and both compared

Read this page first. A learner is a handful of pure functions, and a training loop is what you make of them: `by_hand` below
is the Keras documents' "training loop from scratch". Copy it where the library's loop does not do what you need.

Expect val_accuracy >= 0.96 from either, the same printed losses and a largest_difference of 0.0 between their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np

import research
from experiments import digits
from research.data import Batches

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Everything that changes the numbers."""

    units: int = 64
    """Width of the two hidden layers."""
    learning_rate: float = 1e-3
    """Of Adam."""
    epochs: int = 20
    """Passes over the training data."""
    steps: int | None = None
    """Training steps, where they are to be fewer than the epochs' own."""
    batch_size: int = 32
    """Examples in a step."""
    seed: int = 0
    """Of weights, split and shuffling."""


def network(config: Config) -> keras.Model:
    """Any Keras model will do: this one takes 8x8 images of whole numbers to 16 and gives a logit for each digit."""
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
    """Batches that a number addresses: `splits["train"].batch(7)` is the same whenever it is asked for."""
    return digits.data(digits.Config(batch_size=config.batch_size, seed=config.seed))


def by_hand(
    config: Config,
    learner: research.Learner,
    splits: dict[str, Batches],
    log_every: int = 20,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[research.State, list[research.Entry]]:
    """Trains. Returns the last state and what was logged on the way."""
    # A step takes the state and a batch and gives the next state; the old one's memory is used again (donated), so it is gone.
    train_step = jax.jit(learner.train, donate_argnums=0)
    test_step = jax.jit(learner.evaluate)  # not donated: training goes on from the state that is evaluated
    train, val = splits["train"], splits["val"]
    total = config.epochs * train.steps_per_epoch
    total = total if config.steps is None else min(total, config.steps)
    history = []

    def log(step: int, epoch: int, split: str, logs: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in logs.items()}  # waits for the device: so not at every step
        history.append(research.Entry(step, epoch, split, values))
        say(f"epoch {epoch + 1}  step {step:4d}  {split:5}  " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))

    state = learner.init()  # weights, the optimizer's slots, metrics, random seeds: all that training changes
    for epoch in range(-(-total // train.steps_per_epoch)):
        state = learner.reset(state)  # the logs of an epoch are of that epoch
        first = epoch * train.steps_per_epoch
        for step in range(first, min(first + train.steps_per_epoch, total)):
            state, logs = train_step(state, train.batch(step))
            if (step + 1) % log_every == 0:
                log(step + 1, epoch, "train", logs)
        evaluated = learner.reset(state)  # validation counts from nothing too, in a state of its own
        for number in range(val.steps_per_epoch):
            evaluated, logs = test_step(evaluated, val.batch(number))
        log(step + 1, epoch, "val", logs)
    return state, history


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Back to Keras: the network with the weights that a state holds."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def difference(one: research.State, other: research.State) -> float:
    """The largest difference between two states' weights."""
    pairs = zip(one.trainable, other.trainable, strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """How far the library's weights, which are in `state`, are from those of the loop by hand."""
    return {"largest_difference": difference(by_hand(config, learner, splits)[0], state)}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """The losses of both loops: the library's as lines, those by hand as points."""
    from matplotlib.figure import Figure

    mine, points = by_hand(config, learner, splits)
    entries: list[research.Entry] = []
    given = {"steps": config.steps, "epochs": config.epochs, "evaluations": {"val": splits["val"]}}
    research.train(learner, splits["train"], log_every=20, log=entries.append, **given)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for split, colour in (("train", "#4477aa"), ("val", "#ee6677")):
        for history, label, style in ((entries, "library", "-"), (points, "by hand", "o")):
            curve = [(entry.step, entry.values["loss"]) for entry in history if entry.split == split]
            axes.plot(*np.transpose(curve), style, color=colour, markersize=4, linewidth=1.4, label=f"{split}, {label}")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.set_title(f"largest difference of the weights: {difference(mine, state):g}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"loops": figure}


if __name__ == "__main__":
    by_hand(Config(), build(Config()), data(Config()), say=print)

"""Learn a learning rate: the gradient of 200 training steps with respect to it, through all of them.

    just run hypergradient            # ten seconds on two idle cores

Metalearning a learning rate on MNIST-1D (Greydanus and Kobak, arXiv:2011.14439, after Maclaurin et al., arXiv:1502.03492): a
network of 50 hidden units is trained for 200 steps of SGD on batches of 50. Its mean training loss is minimised over the learning
rate, by gradient descent from a rate that is too large and from one that is too small.

Expect both starts to end within 0.01 of each other, at 0.6 to 0.7, the best rate for the initial weights at hand: from 1.5 and
from 0.15 at 0.653 and 0.652, 0.687 and 0.681, 0.618 and 0.617 with seeds 0 to 2. The authors report 0.62 for their weights.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

import research
from experiments import _data, _plots
from experiments._config import Count, CountOrZero, Positive, TrainingOptions
from research.data import Batches, from_arrays, lazy

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAINING = 4000  # examples, of 5000


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers. An epoch is one update of the learning rates, after a complete inner training."""

    starts: tuple[Positive, ...] = (1.5, 0.15)
    """Learning rates to start from."""
    inner_steps: Count = 200
    """Training steps of the network, which are differentiated."""
    units: Count = 50
    """Width of the network's hidden layer."""
    outer_learning_rate: Positive = 0.3
    """Learning rate of SGD on the learning rates."""
    epochs: CountOrZero = 50
    """Updates of the learning rates."""
    batch_size: Count = 50
    """Examples per training step of the network."""


def network(config: Config) -> keras.Model:
    """Returns signals -> logits, with the initial weights that PyTorch's layers have, as in the authors' code."""

    def dense(units: int, inputs: int, activation: str | None = None) -> keras.Layer:
        kernel, bias = (keras.initializers.RandomUniform(-(inputs**-0.5), inputs**-0.5) for _ in range(2))
        return keras.layers.Dense(units, activation, kernel_initializer=kernel, bias_initializer=bias)

    return keras.Sequential([keras.Input((40,)), dense(config.units, 40, "tanh"), dense(_data.CLASSES, config.units)])


def algorithm(config: Config) -> tuple[research.Learner, Callable[..., jax.Array]]:
    """Returns the learner, and the mean training loss of the network as a function of a learning rate and stacked batches."""
    keras.utils.set_random_seed(config.seed)
    sgd, loss = keras.optimizers.SGD(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    inner = research.supervised(network(config), loss=loss, optimizer=sgd)
    initial, train = inner.init(), research.transforms.unroll(inner, config.inner_steps)
    rates = keras.Variable(config.starts, name="learning_rates")

    def mean_loss(rate: jax.Array, batches: research.Batch) -> jax.Array:
        _, logs = train(research.set_learning_rate(initial, rate, sgd), batches)
        return logs["loss"][-1]  # the mean of all steps

    def total(batch: research.Batch, training: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = jax.vmap(mean_loss, (0, None))(rates.value, batch)
        return jnp.sum(losses), {f"rate_from_{start:g}": rate for start, rate in zip(config.starts, rates.value, strict=True)}

    outer, example = keras.optimizers.SGD(config.outer_learning_rate), data(config)["train"].shapes
    return research.learner(total, [rates], outer, example=example), mean_loss


def build(config: Config) -> research.Learner:
    """Returns the learner of the learning rates."""
    return algorithm(config)[0]


def data(config: Config) -> dict[str, Batches]:
    """Returns all batches of one inner training as one batch; for `val` those of the training data in another order."""
    shape = (config.inner_steps, config.batch_size)
    shapes = research.Batch(jax.ShapeDtypeStruct((*shape, 40), np.float32), jax.ShapeDtypeStruct(shape, np.int32))
    in_order, load = np.arange(shape[0] * shape[1]).reshape(shape) % TRAINING, functools.cache(_data.load_mnist1d)
    orders = {"train": in_order, "val": np.random.default_rng(config.seed).permutation(TRAINING)[in_order]}

    def batches(order: np.ndarray) -> Batches:
        return lazy(lambda: from_arrays(*(a[order] for a in load()), batch_size=len(order), shuffle=False), shapes, len(order))

    return {split: batches(order) for split, order in orders.items()}


def results(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, float]:
    """Returns the learned rates."""
    return {f"learned_from_{start:g}": float(rate) for start, rate in zip(config.starts, state.trainable[0], strict=True)}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the mean training loss over the learning rate, and where both rates started and ended."""
    from matplotlib.figure import Figure

    mean_loss, batches = algorithm(config)[1], splits["train"].batch(0)
    losses = jax.jit(lambda rates: jax.lax.map(lambda rate: mean_loss(rate, batches), rates))
    grid, starts, ends = np.geomspace(0.05, 2.5, 60, dtype=np.float32), np.float32(config.starts), state.trainable[0]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="learning rate", ylabel=f"mean training loss of {config.inner_steps} steps")
    axes.plot(grid, losses(grid), color=_plots.BLUE)
    for start, end, before, after in zip(starts, ends, losses(starts), losses(ends), strict=True):
        axes.annotate("", (end, after), (start, before), arrowprops={"arrowstyle": "->", "color": _plots.RED})
        axes.plot(start, before, "o", color=_plots.RED)
        axes.annotate(f"{start:g} to {end:.3f}", (start, before), (6, 6), textcoords="offset points")
    return {"learning_rates": figure}

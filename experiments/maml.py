"""Learn initial weights from which one step of SGD fits a new sinusoid: model-agnostic meta-learning.

    just run maml                     # a quarter of a minute on two idle cores
    just run maml --shots 5

Finn et al., arXiv:1703.03400, section 5.1: a task is a sinusoid with its own amplitude and phase. From the initial weights one
SGD step on `--shots` points gives the weights of a task, and the initial weights are trained by the gradient, through that step,
of the error on further points of the same sinusoid. All tasks of a batch are mapped in one program.

Expect a test_loss, the mean squared error after one step, <= 0.67 with 10 shots (0.353, 0.360,
0.341 with seeds 0 to 2) and <= 0.72 with 5 (0.586, 0.615, 0.600).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

import research
from experiments import _plots
from experiments._config import Count, CountOrZero, Positive, TrainingOptions
from research.data import Batches, from_arrays

import keras  # isort: skip  (research first: it chooses Keras' backend)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = {"train": 25_000, "val": 2_000, "test": 10_000}  # per split


@dataclass(frozen=True, kw_only=True)
class Config(TrainingOptions):
    """Everything that changes the numbers. An example is a task."""

    shots: Count = 10
    """Points of a new sinusoid to learn from."""
    inner_steps: Count = 1
    """Steps of SGD on them."""
    inner_learning_rate: Positive = 0.01
    """Learning rate of these steps."""
    units: Count = 40
    """Width of both hidden layers."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam, for the initial weights."""
    epochs: CountOrZero = 30
    """Passes over the training tasks."""
    batch_size: Count = 25
    """Tasks per step."""


def network(config: Config) -> keras.Model:
    """Returns points -> values."""
    hidden = [keras.layers.Dense(config.units, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((1,)), *hidden, keras.layers.Dense(1)])


def build(config: Config) -> research.Learner:
    """Returns the learner of the initial weights; it predicts the values at the further points, after the inner steps."""
    keras.utils.set_random_seed(config.seed)
    model, ops = network(config), keras.ops
    inner = research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(config.inner_learning_rate))
    fit, initial = research.transforms.unroll(inner, config.inner_steps), inner.init()

    def adapted(task: research.Batch) -> jax.Array:
        state = initial._replace(trainable=[weight.value for weight in model.trainable_variables])  # of the learner below
        points = research.Batch(task.x[0], task.y[0])
        state, _ = fit(state, jax.tree.map(lambda leaf: jnp.stack([leaf] * config.inner_steps), points))
        return inner.predict(state, research.Batch(task.x[1]))

    def loss(batch: research.Batch, training: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        error = ops.mean((jax.vmap(adapted)(batch) - batch.y[1]) ** 2)
        before = ops.mean((jax.vmap(model)(batch.x[1]) - batch.y[1]) ** 2)
        return error, {"before_step": before}

    adam = keras.optimizers.Adam(config.learning_rate)
    return research.learner(loss, [model], adam, example=data(config)["train"].shapes, predict=jax.vmap(adapted))


def data(config: Config) -> dict[str, Batches]:
    """Returns sinusoids. `x` and `y` are pairs, of points to learn from and of as many further points: [tasks, shots, 1]."""

    def sinusoids(split: str, tasks: int) -> Batches:
        rng = np.random.default_rng([config.seed, list(TASKS).index(split)])
        amplitude, phase = rng.uniform(0.1, 5, (tasks, 1, 1)), rng.uniform(0, np.pi, (tasks, 1, 1))
        x = rng.uniform(-5, 5, (2, tasks, config.shots, 1))
        y = amplitude * np.sin(x - phase)
        arrays = [tuple(values.astype(np.float32)) for values in (x, y)]
        train = split == "train"
        return from_arrays(*arrays, batch_size=config.batch_size if train else 500, shuffle=train, seed=config.seed)

    return {split: sinusoids(split, tasks) for split, tasks in TASKS.items()}


def models(config: Config, state: research.State) -> dict[str, keras.Model]:
    """Returns the network with the initial weights of a state."""
    model = network(config)
    research.write_back(state, model)
    return {"model": model}


def pictures(config: Config, learner: research.Learner, state: research.State, splits: dict[str, Batches]) -> dict[str, "Figure"]:
    """Draws the network on four test sinusoids, before and after the inner steps."""
    from matplotlib.figure import Figure

    tasks = jax.tree.map(lambda leaf: leaf[:4], splits["test"].batch(0))
    grid = np.broadcast_to(np.linspace(-5, 5, 200, dtype=np.float32)[:, None], (4, 200, 1))
    after = learner.predict(state, tasks._replace(x=(tasks.x[0], grid)))
    before = np.asarray(models(config, state)["model"](grid[0]))
    figure = Figure(figsize=(11, 3), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 4, sharey=True)):
        axes.plot(tasks.x[1][i], tasks.y[1][i], ".", color="0.6", label="further points")
        axes.plot(tasks.x[0][i], tasks.y[0][i], "^", color=_plots.GREEN, label="learned from")
        axes.plot(grid[i], before, "--", color=_plots.BLUE, label="initial weights")
        axes.plot(grid[i], after[i], color=_plots.RED, label="after the inner steps")
        _plots.hide_frame(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return {"sinusoids": figure}

"""Keras' own `fit`, on whichever backend Keras has."""

from collections.abc import Callable
from typing import Any

import keras
import networks
import numpy as np
from keras import ops
from workloads import GAN_RATE, GPT_RATE, RATE, WORKLOADS

BACKEND = keras.backend.backend()


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """A model and its `fit`."""
    many = system in ("keras-jax-32", "keras-tensorflow")  # what is best for TensorFlow everywhere
    return trainer(keras.Model.fit, compiled(workload, 32 if many else 1), workload, data)


def trainer(
    fit: Callable[..., Any], model: keras.Model, workload: str, data: dict[str, Any]
) -> Callable[[int], dict[str, float]]:
    """Trains by `fit(model, ...)`, Keras' own or one with the same arguments."""
    source = examples(workload, data)

    def train(epochs: int) -> dict[str, float]:
        history = fit(model, **source, epochs=epochs, verbose=0, shuffle=True).history
        return {name: float(values[-1]) for name, values in history.items()}

    return train


def compiled(workload: str, steps_per_execution: int) -> keras.Model:
    """A workload's network with its loss, optimizer and metrics."""
    keras.utils.set_random_seed(0)
    options = {"steps_per_execution": steps_per_execution}
    if workload == "gan-64":
        model = GANS[BACKEND]()
        model.compile(model.g_optimizer, **options)
        return model
    model = networks.network(workload)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if workload == "gpt-16":
        model.compile(keras.optimizers.Adam(GPT_RATE), crossentropy, **options)
    elif workload == "tickets-128":
        model.compile(
            keras.optimizers.Adam(RATE),
            loss={"priority": keras.losses.BinaryCrossentropy(from_logits=True), "department": crossentropy},
            loss_weights={"priority": 0.5, "department": 1.0},
            metrics={"priority": [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)], "department": ["accuracy"]},
            **options,
        )
    else:
        model.compile(keras.optimizers.Adam(RATE), crossentropy, metrics=["accuracy"], **options)
    return model


class GAN(keras.Model):
    """Both networks and their step; how a gradient is taken is each backend's own."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator, self.generator = networks.gan()
        self.d_weights, self.g_weights = self.discriminator.trainable_variables, self.generator.trainable_variables
        self.average = [keras.Variable(ops.convert_to_numpy(weight), trainable=False) for weight in self.g_weights]
        self.d_optimizer = keras.optimizers.Adam(GAN_RATE, beta_1=0.5)
        self.g_optimizer = keras.optimizers.Adam(GAN_RATE, beta_1=0.5)
        self.d_optimizer.build(self.d_weights)
        self.g_optimizer.build(self.g_weights)
        self.d_slots = self.d_optimizer.variables  # `fit` carries the variables of a model and of one optimizer
        self.seeds = keras.random.SeedGenerator(0)
        self.crossentropy = keras.losses.BinaryCrossentropy(from_logits=True)
        self.d_loss, self.g_loss = keras.metrics.Mean("d_loss"), keras.metrics.Mean("g_loss")
        self.built = True

    @property
    def metrics(self) -> list[keras.Metric]:
        """What the logs are."""
        return [self.d_loss, self.g_loss]

    def step(self, real: Any) -> dict[str, Any]:
        """A step of the discriminator, one of the generator against it, one of the average."""
        count = WORKLOADS["gan-64"].batch_size
        mixed = ops.concatenate([self.generator(self.latents(count)), real])
        targets = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))])
        targets += keras.random.uniform((2 * count, 1), 0.0, 0.05, seed=self.seeds)
        loss, gradients = self.gradients(
            lambda: self.crossentropy(targets, self.discriminator(mixed, training=True)), self.d_weights
        )
        self.d_optimizer.apply(gradients, self.d_weights)
        self.d_loss.update_state(loss)

        latents, deceit = self.latents(count), ops.zeros((count, 1))
        loss, gradients = self.gradients(
            lambda: self.crossentropy(deceit, self.discriminator(self.generator(latents, training=True), training=True)),
            self.g_weights,
        )
        self.g_optimizer.apply(gradients, self.g_weights)
        self.g_loss.update_state(loss)

        for average, weight in zip(self.average, self.g_weights, strict=True):
            average.assign_add(0.005 * (weight - average))
        return {metric.name: metric.result() for metric in self.metrics}

    def latents(self, count: int) -> Any:
        """What images are generated from."""
        return keras.random.normal((count, 16), seed=self.seeds)


class JaxGAN(GAN):
    """With `fit`'s state in the place of the variables' values."""

    def train_step(self, state: tuple[list[Any], ...], data: Any) -> tuple[dict[str, Any], tuple[list[Any], ...]]:
        """The state of all variables to the next one."""
        parts = (self.trainable_variables, self.non_trainable_variables, self.optimizer.variables, self.metrics_variables)
        now = [pair for part, values in zip(parts, state, strict=True) for pair in zip(part, values, strict=True)]
        with keras.StatelessScope(now) as scope:
            logs = self.step(data)
        return logs, tuple([scope.get_current_value(variable) for variable in part] for part in parts)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """A loss and its gradient; the seeds that it used move on."""
        import jax

        moving = self.non_trainable_variables

        def pure(values: list[Any]) -> tuple[Any, list[Any]]:
            now = [(variable, variable.value) for variable in self.variables]
            with keras.StatelessScope([*now, *zip(weights, values, strict=True)]) as scope:
                return loss(), [scope.get_current_value(variable) for variable in moving]

        (value, moved), gradients = jax.value_and_grad(pure, has_aux=True)([weight.value for weight in weights])
        for variable, new in zip(moving, moved, strict=True):
            variable.assign(new)
        return value, gradients


class TensorFlowGAN(GAN):
    """With a tape."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Moves the variables."""
        return self.step(data)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """A loss and its gradient."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return value, tape.gradient(value, weights)


class TorchGAN(GAN):
    """With autograd."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Moves the variables."""
        import torch

        with torch.no_grad():
            return self.step(data)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """A loss and its gradient."""
        import torch

        with torch.enable_grad():
            value = loss()
        return value.detach(), torch.autograd.grad(value, [weight.value for weight in weights])


GANS = {"jax": JaxGAN, "tensorflow": TensorFlowGAN, "torch": TorchGAN}


def examples(workload: str, data: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `fit` that are the data."""
    size = WORKLOADS[workload].batch_size
    if workload == "stream":
        return {"x": Stream(data["x"], data["y"], size)}
    if workload == "tickets-128":
        x, y = ({name: data[name] for name in names} for names in (("title", "body", "tags"), ("priority", "department")))
        return {"x": x, "y": y, "batch_size": size}
    return {**data, "batch_size": size}


class Stream(keras.utils.PyDataset):
    """Batches of a file in a new order each epoch, cut and mirrored at random."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.x, self.y, self.batch_size = x, y, batch_size
        self.rng = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return augmented(self.x[rows], np.random.default_rng([self.seed, index])), self.y[rows]

    def on_epoch_end(self) -> None:
        """Draws the next epoch's order."""
        self.order, self.seed = self.rng.permutation(len(self.x)), int(self.rng.integers(2**31))


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images cut from within a margin of zeros and mirrored half the time, as rows of numbers from 0 to 1."""
    padded, batch = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0))), np.empty_like(images)
    for i, (top, left, mirrored) in enumerate(rng.integers(0, (9, 9, 2), (len(images), 3))):
        cut = padded[i, top : top + 32, left : left + 32]
        batch[i] = cut[:, ::-1] if mirrored else cut
    return np.divide(batch.reshape(len(batch), -1), 255, dtype=np.float32)

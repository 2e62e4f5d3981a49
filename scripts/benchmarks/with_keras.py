"""Keras' own `fit`, on any Keras backend."""

from collections.abc import Callable
from typing import Any

import keras
import networks
import numpy as np
from keras import ops
from workloads import GAN_LEARNING_RATE, GPT_LEARNING_RATE, LEARNING_RATE, WORKLOADS

BACKEND = keras.backend.backend()


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some epochs and returns the last one's logs."""
    steps_per_execution = 32 if system in ("keras-jax-32", "keras-tensorflow") else 1  # 32 is best for TensorFlow everywhere
    return train_with(keras.Model.fit, compiled(workload, steps_per_execution), workload, data)


def train_with(
    fit: Callable[..., Any], model: keras.Model, workload: str, data: dict[str, Any]
) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains by `fit(model, ...)`, which has the arguments of Keras' own."""
    arguments = data_arguments(workload, data)

    def train(epochs: int) -> dict[str, float]:
        history = fit(model, **arguments, epochs=epochs, verbose=0, shuffle=True).history
        return {name: float(values[-1]) for name, values in history.items()}

    return train


def compiled(workload: str, steps_per_execution: int) -> keras.Model:
    """Returns a workload's network, compiled with its loss, optimizer and metrics."""
    keras.utils.set_random_seed(0)
    options = {"steps_per_execution": steps_per_execution}
    if workload == "gan-64":
        model = GANS[BACKEND]()
        model.compile(model.g_optimizer, **options)
        return model
    model = networks.network(workload)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if workload == "gpt-16":
        model.compile(keras.optimizers.Adam(GPT_LEARNING_RATE), crossentropy, **options)
    elif workload == "tickets-128":
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE),
            loss={"priority": keras.losses.BinaryCrossentropy(from_logits=True), "department": crossentropy},
            loss_weights={"priority": 0.5, "department": 1.0},
            metrics={"priority": [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)], "department": ["accuracy"]},
            **options,
        )
    else:
        model.compile(keras.optimizers.Adam(LEARNING_RATE), crossentropy, metrics=["accuracy"], **options)
    return model


class GAN(keras.Model):
    """Both networks and their step. Each backend's subclass computes gradients in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.discriminator, self.generator = networks.gan()
        self.d_weights, self.g_weights = self.discriminator.trainable_variables, self.generator.trainable_variables
        self.average = [keras.Variable(ops.convert_to_numpy(weight), trainable=False) for weight in self.g_weights]
        self.d_optimizer = keras.optimizers.Adam(GAN_LEARNING_RATE, beta_1=0.5)
        self.g_optimizer = keras.optimizers.Adam(GAN_LEARNING_RATE, beta_1=0.5)
        self.d_optimizer.build(self.d_weights)
        self.g_optimizer.build(self.g_weights)
        self.d_slots = self.d_optimizer.variables  # `fit` carries the variables of a model and of one optimizer
        self.seeds = keras.random.SeedGenerator(0)
        self.crossentropy = keras.losses.BinaryCrossentropy(from_logits=True)
        self.d_loss, self.g_loss = keras.metrics.Mean("d_loss"), keras.metrics.Mean("g_loss")
        self.built = True

    @property
    def metrics(self) -> list[keras.Metric]:
        """Returns the metrics that are logged."""
        return [self.d_loss, self.g_loss]

    def step(self, real: Any) -> dict[str, Any]:
        """Updates the discriminator, the generator and the average; returns the logs."""
        count = WORKLOADS["gan-64"].batch_size
        mixed = ops.concatenate([self.generator(self.latents(count)), real])
        targets = ops.concatenate([ops.ones((count, 1)), ops.zeros((count, 1))])
        targets += keras.random.uniform((2 * count, 1), 0.0, 0.05, seed=self.seeds)
        loss, gradients = self.gradients(
            lambda: self.crossentropy(targets, self.discriminator(mixed, training=True)), self.d_weights
        )
        self.d_optimizer.apply(gradients, self.d_weights)
        self.d_loss.update_state(loss)

        latents, real_targets = self.latents(count), ops.zeros((count, 1))
        loss, gradients = self.gradients(
            lambda: self.crossentropy(real_targets, self.discriminator(self.generator(latents, training=True), training=True)),
            self.g_weights,
        )
        self.g_optimizer.apply(gradients, self.g_weights)
        self.g_loss.update_state(loss)

        for average, weight in zip(self.average, self.g_weights, strict=True):
            average.assign_add(0.005 * (weight - average))
        return {metric.name: metric.result() for metric in self.metrics}

    def latents(self, count: int) -> Any:
        """Draws the generator's inputs."""
        return keras.random.normal((count, 16), seed=self.seeds)


class JaxGAN(GAN):
    """On JAX: `fit` passes the values of the variables as a state."""

    def train_step(self, state: tuple[list[Any], ...], data: Any) -> tuple[dict[str, Any], tuple[list[Any], ...]]:
        """Returns the logs and the next state."""
        parts = (self.trainable_variables, self.non_trainable_variables, self.optimizer.variables, self.metrics_variables)
        mapping = [pair for part, values in zip(parts, state, strict=True) for pair in zip(part, values, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            logs = self.step(data)
        return logs, tuple([scope.get_current_value(variable) for variable in part] for part in parts)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """Returns a loss and its gradient, and updates the seed generators that the loss used."""
        import jax

        non_trainable = self.non_trainable_variables

        def pure(values: list[Any]) -> tuple[Any, list[Any]]:
            mapping = [(variable, variable.value) for variable in self.variables]
            with keras.StatelessScope([*mapping, *zip(weights, values, strict=True)]) as scope:
                return loss(), [scope.get_current_value(variable) for variable in non_trainable]

        (value, new_values), gradients = jax.value_and_grad(pure, has_aux=True)([weight.value for weight in weights])
        for variable, new in zip(non_trainable, new_values, strict=True):
            variable.assign(new)
        return value, gradients


class TensorFlowGAN(GAN):
    """On TensorFlow: gradients by a tape."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Updates the variables and returns the logs."""
        return self.step(data)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """Returns a loss and its gradient."""
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return value, tape.gradient(value, weights)


class TorchGAN(GAN):
    """On PyTorch: gradients by autograd."""

    def train_step(self, data: Any) -> dict[str, Any]:
        """Updates the variables and returns the logs."""
        import torch

        with torch.no_grad():
            return self.step(data)

    def gradients(self, loss: Callable[[], Any], weights: list[keras.Variable]) -> tuple[Any, list[Any]]:
        """Returns a loss and its gradient."""
        import torch

        with torch.enable_grad():
            value = loss()
        return value.detach(), torch.autograd.grad(value, [weight.value for weight in weights])


GANS = {"jax": JaxGAN, "tensorflow": TensorFlowGAN, "torch": TorchGAN}


def data_arguments(workload: str, data: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `fit` that pass the data."""
    size = WORKLOADS[workload].batch_size
    if workload == "stream":
        return {"x": Stream(data["x"], data["y"], size)}
    if workload == "tickets-128":
        x, y = ({name: data[name] for name in names} for names in (("title", "body", "tags"), ("priority", "department")))
        return {"x": x, "y": y, "batch_size": size}
    return {**data, "batch_size": size}


class Stream(keras.utils.PyDataset):
    """Batches read from a file in a new order each epoch, cropped and mirrored at random."""

    def __init__(self, x: np.ndarray, y: np.ndarray, batch_size: int, **options: Any) -> None:
        super().__init__(**options)
        self.x, self.y, self.batch_size = x, y, batch_size
        self.rng = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return augment(self.x[rows], np.random.default_rng([self.seed, index])), self.y[rows]

    def on_epoch_end(self) -> None:
        """Draws the next epoch's order."""
        self.order, self.seed = self.rng.permutation(len(self.x)), int(self.rng.integers(2**31))


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns images as float32 rows from 0 to 1, each padded, cropped at random and mirrored with probability 0.5."""
    padded, batch = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0))), np.empty_like(images)
    for i, (top, left, mirror) in enumerate(rng.integers(0, (9, 9, 2), (len(images), 3))):
        crop = padded[i, top : top + 32, left : left + 32]
        batch[i] = crop[:, ::-1] if mirror else crop
    return np.divide(batch.reshape(len(batch), -1), 255, dtype=np.float32)

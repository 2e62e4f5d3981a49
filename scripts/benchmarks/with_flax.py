"""Flax NNX and optax: a jitted step, bound to modules and optimizers, is called for each batch."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from workloads import GAN_LEARNING_RATE, GPT_LEARNING_RATE, LEARNING_RATE, WIDTHS, WORKLOADS, augment, order

jax.config.update("jax_platforms", "cpu")

Arrays = dict[str, jax.Array]
Step = Callable[..., None]

glorot = nnx.initializers.glorot_uniform()
adam = functools.partial(optax.adam, eps=1e-7)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
binary_cross_entropy = optax.sigmoid_binary_cross_entropy
# Binds a jitted step to objects and donates their variables' buffers. graph=False, since no two objects share a variable.
bind = functools.partial(nnx.jit_partial, graph=False, donate_argnums=0)
leaky_relu = functools.partial(nnx.leaky_relu, negative_slope=0.2)


def mlp(inputs: int, hidden: int, outputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """Returns a network with one hidden layer."""
    linear = functools.partial(nnx.Linear, kernel_init=glorot, rngs=rngs)
    return nnx.Sequential(linear(inputs, hidden), nnx.relu, linear(hidden, outputs))


class ConvNet(nnx.Module):
    """Two convolutions, each with pooling, then dropout and the logits."""

    def __init__(self, rngs: nnx.Rngs):
        convolution = functools.partial(nnx.Conv, kernel_size=(3, 3), padding="VALID", kernel_init=glorot, rngs=rngs)
        self.convolutions = nnx.List([convolution(1, 32), convolution(32, 64)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.logits = nnx.Linear(1600, 10, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        for convolution in self.convolutions:
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def generator(rngs: nnx.Rngs) -> nnx.Sequential:
    """Returns the network from 16 normal numbers to an image from -1 to 1."""
    linear = functools.partial(nnx.Linear, kernel_init=glorot, rngs=rngs)
    return nnx.Sequential(linear(16, 512), leaky_relu, linear(512, 512), leaky_relu, linear(512, 64), nnx.tanh)


def discriminator(rngs: nnx.Rngs) -> nnx.Sequential:
    """Returns the network from an image to a logit, high for generated images."""
    linear = functools.partial(nnx.Linear, kernel_init=glorot, rngs=rngs)
    first = (linear(64, 512), leaky_relu, nnx.Dropout(0.3, rngs=rngs))
    second = (linear(512, 256), leaky_relu, nnx.Dropout(0.3, rngs=rngs))
    return nnx.Sequential(*first, *second, linear(256, 1))


class SequenceEncoder(nnx.Module):
    """An embedding and an LSTM, whose output at the last word is returned."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(4000, 64, embedding_init=_embedding_init, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(64, 64, kernel_init=glorot, bias_init=_lstm_bias_init, rngs=rngs))

    def __call__(self, words: jax.Array) -> jax.Array:
        """Returns the features of rows of word ids."""
        (_, features), _ = self.lstm(self.embedding(words), seq_lengths=(words != 0).sum(1), return_carry=True)
        return features


class Tickets(nnx.Module):
    """The network from a ticket to the logits of its priority and department."""

    def __init__(self, rngs: nnx.Rngs):
        self.title, self.body = SequenceEncoder(rngs), SequenceEncoder(rngs)
        self.priority = nnx.Linear(135, 1, kernel_init=glorot, rngs=rngs)
        self.department = nnx.Linear(135, 6, kernel_init=glorot, rngs=rngs)

    def __call__(self, title: jax.Array, body: jax.Array, tags: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns both logits of a batch of tickets."""
        features = jnp.concatenate([self.title(title), self.body(body), tags], axis=1)
        return self.priority(features), self.department(features)


class Block(nnx.Module):
    """A transformer block: causal attention and an MLP, each with a residual connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(128, epsilon=1e-5, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 128, kernel_init=glorot, decode=False, rngs=rngs)
        self.up = nnx.Linear(128, 512, kernel_init=glorot, rngs=rngs)
        self.down = nnx.Linear(512, 128, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns features of the same shape."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x)), approximate=True))


class GPT(nnx.Module):
    """The network from bytes to the logits of each next byte."""

    def __init__(self, rngs: nnx.Rngs):
        embedding = functools.partial(nnx.Embed, features=128, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.bytes, self.positions = embedding(256), embedding(128)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])
        self.norm = nnx.LayerNorm(128, epsilon=1e-5, rngs=rngs)
        self.logits = nnx.Linear(128, 256, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits of each position."""
        x = self.bytes(x) + self.positions(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def classifier_step(model: nnx.Module, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Arrays) -> None:
    """Updates a classifier by the softmax cross-entropy."""

    def objective(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        logits = model(batch["x"])
        return cross_entropy(logits, batch["y"]).mean(), logits

    (loss, logits), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    metrics.update(loss=loss, logits=logits, labels=batch["y"])


def tickets_step(model: Tickets, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Arrays) -> None:
    """Updates the ticket network by the sum of its two losses."""

    def objective(model: Tickets) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        priority, department = model(batch["title"], batch["body"], batch["tags"])
        priority_loss = binary_cross_entropy(priority, batch["priority"]).mean()
        return 0.5 * priority_loss + cross_entropy(department, batch["department"]).mean(), (priority, department)

    (loss, (priority, department)), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    metrics.loss.update(loss=loss)
    metrics.priority_accuracy.update(logits=priority, labels=batch["priority"])
    metrics.department_accuracy.update(logits=department, labels=batch["department"])


def gan_step(
    discriminator: nnx.Sequential,
    generator: nnx.Sequential,
    d_optimizer: nnx.Optimizer,
    g_optimizer: nnx.Optimizer,
    average: nnx.EMA,
    rngs: nnx.Rngs,
    metrics: nnx.MultiMetric,
    batch: Arrays,
) -> None:
    """Updates the discriminator, then the generator against the new discriminator, then the generator's average."""
    count = len(batch["x"])
    images = jnp.concatenate([generator(rngs.normal((count, 16))), batch["x"]])
    targets = jnp.repeat(jnp.array([1.0, 0.0]), count)[:, None] + rngs.uniform((2 * count, 1), maxval=0.05)
    latents = rngs.normal((count, 16))

    def discriminator_loss(discriminator: nnx.Sequential) -> jax.Array:
        return binary_cross_entropy(discriminator(images), targets).mean()

    def generator_loss(generator: nnx.Sequential, discriminator: nnx.Sequential) -> jax.Array:
        return binary_cross_entropy(discriminator(generator(latents)), jnp.zeros((count, 1))).mean()

    d_loss, gradients = nnx.value_and_grad(discriminator_loss)(discriminator)
    d_optimizer.update(discriminator, gradients)
    g_loss, gradients = nnx.value_and_grad(generator_loss)(generator, discriminator)
    g_optimizer.update(generator, gradients)
    average.update(generator)
    metrics.update(d_loss=d_loss, g_loss=g_loss)


def build(system: str, workload: str, data: dict[str, np.ndarray]) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some epochs and returns the last one's logs."""
    size, epoch_numbers = WORKLOADS[workload], itertools.count()
    step, *bound = _step_and_objects(workload)
    read = bind(_read_and_reset, bound[-1])

    if workload == "stream":
        train_step = bind(step, *bound)

        def train_epoch(epoch: int, rows: np.ndarray) -> None:
            for batch in _prefetched(_stream(data, rows, first=epoch * size.steps)):
                train_step(batch)
    else:
        train_step, arrays = bind(_gather_then(step), *bound), jax.device_put(data)

        def train_epoch(epoch: int, rows: np.ndarray) -> None:
            for batch in jnp.asarray(rows, jnp.int32):
                train_step(arrays, batch)

    def train(epochs: int) -> dict[str, float]:
        for epoch in itertools.islice(epoch_numbers, epochs):
            train_epoch(epoch, order(size.examples, epoch).reshape(size.steps, size.batch_size))
            logs = {name: float(value) for name, value in jax.device_get(read()).items()}
        return logs

    return train


def _step_and_objects(workload: str) -> tuple[Any, ...]:
    """Returns a workload's step and the objects that it updates, the metrics last."""
    rngs, average = nnx.Rngs(0), nnx.metrics.Average
    if workload == "gan-64":
        models = discriminator(rngs), generator(rngs)
        optimizers = [nnx.Optimizer(model, adam(GAN_LEARNING_RATE, b1=0.5), wrt=nnx.Param) for model in models]
        metrics = nnx.MultiMetric(d_loss=average("d_loss"), g_loss=average("g_loss"))
        return gan_step, *models, *optimizers, nnx.EMA(models[1], decay=0.995, only=nnx.Param), rngs, metrics
    step, update = classifier_step, adam(LEARNING_RATE)
    metrics = nnx.MultiMetric(loss=average("loss"), accuracy=nnx.metrics.Accuracy())
    if workload == "convnet-64":
        model = ConvNet(rngs)
    elif workload == "tickets-128":
        accuracies = {"priority_accuracy": nnx.metrics.Accuracy(threshold=0.0), "department_accuracy": nnx.metrics.Accuracy()}
        model, step, metrics = Tickets(rngs), tickets_step, nnx.MultiMetric(loss=average("loss"), **accuracies)
    elif workload == "gpt-16":
        model, update, metrics = GPT(rngs), adam(GPT_LEARNING_RATE), nnx.MultiMetric(loss=average("loss"))
    else:
        model = mlp(*WIDTHS[workload], rngs)
    if workload == "digits-mlp-32":
        # optax recommends it for small weights: fewer arguments per call. For larger ones its copies cost more than that saves.
        update = optax.flatten(update)
    return step, model, nnx.Optimizer(model, update, wrt=nnx.Param), metrics


def _gather_then(step: Step) -> Step:
    """Returns the step with the arguments arrays and rows in place of a batch."""

    def step_on_rows(*arguments: Any) -> None:
        *bound, arrays, rows = arguments
        step(*bound, {name: array[rows] for name, array in arrays.items()})

    return step_on_rows


def _read_and_reset(metrics: nnx.MultiMetric) -> Arrays:
    """Returns the means over the epoch and resets them."""
    logs = metrics.compute()
    metrics.reset()
    return logs


def _stream(data: dict[str, np.ndarray], rows: np.ndarray, first: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields an epoch's batches; `first` is the number of its first step."""
    for step, batch in enumerate(rows, first):
        yield {"x": augment(data["x"][batch], seed=step), "y": data["y"][batch]}


def _prefetched(batches: Iterator[dict[str, np.ndarray]], ahead: int = 2) -> Iterator[Arrays]:
    """Yields batches on the device; a thread prepares `ahead` of them in advance."""

    def load() -> Arrays | None:
        batch = next(batches, None)
        return None if batch is None else jax.device_put(batch)

    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(load) for _ in range(ahead))
        while batch := pending.popleft().result():
            pending.append(thread.submit(load))
            yield batch


def _embedding_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Draws uniformly from -0.05 to 0.05."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def _lstm_bias_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Returns ones for the forget gate, the second of four, and zeros for the others."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)

"""Flax NNX and Optax: modules and optimizers hold their variables, and a jitted step bound to them is called for each batch."""

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
from workloads import GAN_RATE, GPT_RATE, RATE, WIDTHS, WORKLOADS, augmented, order

jax.config.update("jax_platforms", "cpu")

Arrays = dict[str, jax.Array]
Step = Callable[..., None]

glorot = nnx.initializers.glorot_uniform()
adam = functools.partial(optax.adam, eps=1e-7)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
binary_cross_entropy = optax.sigmoid_binary_cross_entropy
# A step on objects given once, whose variables' buffers it takes over. None of them shares a variable with another: tree mode.
bind = functools.partial(nnx.jit_partial, graph=False, donate_argnums=0)
leaky_relu = functools.partial(nnx.leaky_relu, negative_slope=0.2)


def mlp(inputs: int, hidden: int, outputs: int, rngs: nnx.Rngs) -> nnx.Sequential:
    """One hidden layer."""
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
        """Logits of images."""
        for convolution in self.convolutions:
            x = nnx.max_pool(nnx.relu(convolution(x)), (2, 2), strides=(2, 2))
        return self.logits(self.dropout(x.reshape(len(x), -1)))


def generator(rngs: nnx.Rngs) -> nnx.Sequential:
    """From 16 normal numbers to an image from -1 to 1."""
    linear = functools.partial(nnx.Linear, kernel_init=glorot, rngs=rngs)
    return nnx.Sequential(linear(16, 512), leaky_relu, linear(512, 512), leaky_relu, linear(512, 64), nnx.tanh)


def discriminator(rngs: nnx.Rngs) -> nnx.Sequential:
    """From an image to the logit of its being generated."""
    linear = functools.partial(nnx.Linear, kernel_init=glorot, rngs=rngs)
    first = (linear(64, 512), leaky_relu, nnx.Dropout(0.3, rngs=rngs))
    second = (linear(512, 256), leaky_relu, nnx.Dropout(0.3, rngs=rngs))
    return nnx.Sequential(*first, *second, linear(256, 1))


class Sentence(nnx.Module):
    """An embedding and an LSTM: its features after the last word."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(4000, 64, embedding_init=_embeddings, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(64, 64, kernel_init=glorot, bias_init=_forget, rngs=rngs))

    def __call__(self, words: jax.Array) -> jax.Array:
        """Features of rows of word numbers."""
        (_, features), _ = self.lstm(self.embedding(words), seq_lengths=(words != 0).sum(1), return_carry=True)
        return features


class Tickets(nnx.Module):
    """Logits of a ticket's priority and department."""

    def __init__(self, rngs: nnx.Rngs):
        self.title, self.body = Sentence(rngs), Sentence(rngs)
        self.priority = nnx.Linear(135, 1, kernel_init=glorot, rngs=rngs)
        self.department = nnx.Linear(135, 6, kernel_init=glorot, rngs=rngs)

    def __call__(self, title: jax.Array, body: jax.Array, tags: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of a batch of tickets."""
        features = jnp.concatenate([self.title(title), self.body(body), tags], axis=1)
        return self.priority(features), self.department(features)


class Block(nnx.Module):
    """Causal attention and a wide layer, each around a residual connection."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(128, epsilon=1e-5, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 128, kernel_init=glorot, decode=False, rngs=rngs)
        self.widen = nnx.Linear(128, 512, kernel_init=glorot, rngs=rngs)
        self.narrow = nnx.Linear(512, 128, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of the same shape."""
        x = x + self.attention(self.norms[0](x), is_causal=True)
        return x + self.narrow(nnx.gelu(self.widen(self.norms[1](x)), approximate=True))


class GPT(nnx.Module):
    """From bytes to the logits of the next ones."""

    def __init__(self, rngs: nnx.Rngs):
        embedding = functools.partial(nnx.Embed, features=128, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.bytes, self.positions = embedding(256), embedding(128)
        self.blocks = nnx.List([Block(rngs) for _ in range(4)])
        self.norm = nnx.LayerNorm(128, epsilon=1e-5, rngs=rngs)
        self.logits = nnx.Linear(128, 256, kernel_init=glorot, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits for each position."""
        x = self.bytes(x) + self.positions(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def classify(model: nnx.Module, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Arrays) -> None:
    """A step of softmax cross-entropy."""

    def objective(model: nnx.Module) -> tuple[jax.Array, jax.Array]:
        logits = model(batch["x"])
        return cross_entropy(logits, batch["y"]).mean(), logits

    (loss, logits), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    metrics.update(loss=loss, logits=logits, labels=batch["y"])


def route(model: Tickets, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, batch: Arrays) -> None:
    """A step of both of a ticket's losses."""

    def objective(model: Tickets) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        priority, department = model(batch["title"], batch["body"], batch["tags"])
        urgent = binary_cross_entropy(priority, batch["priority"]).mean()
        return 0.5 * urgent + cross_entropy(department, batch["department"]).mean(), (priority, department)

    (loss, (priority, department)), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    metrics.loss.update(loss=loss)
    metrics.priority_accuracy.update(logits=priority, labels=batch["priority"])
    metrics.department_accuracy.update(logits=department, labels=batch["department"])


def compete(
    judge: nnx.Sequential,
    artist: nnx.Sequential,
    judging: nnx.Optimizer,
    drawing: nnx.Optimizer,
    average: nnx.EMA,
    rngs: nnx.Rngs,
    metrics: nnx.MultiMetric,
    batch: Arrays,
) -> None:
    """A step of the discriminator, then one of the generator against it."""
    count = len(batch["x"])
    images = jnp.concatenate([artist(rngs.normal((count, 16))), batch["x"]])
    targets = jnp.repeat(jnp.array([1.0, 0.0]), count)[:, None] + rngs.uniform((2 * count, 1), maxval=0.05)
    latents = rngs.normal((count, 16))

    def telling_apart(judge: nnx.Sequential) -> jax.Array:
        return binary_cross_entropy(judge(images), targets).mean()

    def deceiving(artist: nnx.Sequential, judge: nnx.Sequential) -> jax.Array:
        return binary_cross_entropy(judge(artist(latents)), jnp.zeros((count, 1))).mean()

    d_loss, gradients = nnx.value_and_grad(telling_apart)(judge)
    judging.update(judge, gradients)
    g_loss, gradients = nnx.value_and_grad(deceiving)(artist, judge)
    drawing.update(artist, gradients)
    average.update(artist)
    metrics.update(d_loss=d_loss, g_loss=g_loss)


def build(system: str, workload: str, data: dict[str, np.ndarray]) -> Callable[[int], dict[str, float]]:
    """Training on a workload: a function of a number of epochs."""
    size, done = WORKLOADS[workload], itertools.count()
    step, *bound = _learner(workload)
    read = bind(_read, bound[-1])

    if workload == "stream":
        train_step = bind(step, *bound)

        def train_epoch(epoch: int, rows: np.ndarray) -> None:
            for batch in _prefetched(_stream(data, rows, first=epoch * size.steps)):
                train_step(batch)
    else:
        train_step, arrays = bind(_gathering(step), *bound), jax.device_put(data)

        def train_epoch(epoch: int, rows: np.ndarray) -> None:
            for batch in jnp.asarray(rows, jnp.int32):
                train_step(arrays, batch)

    def train(epochs: int) -> dict[str, float]:
        for epoch in itertools.islice(done, epochs):
            train_epoch(epoch, order(size.examples, epoch).reshape(size.steps, size.batch_size))
            logs = {name: float(value) for name, value in jax.device_get(read()).items()}
        return logs

    return train


def _learner(workload: str) -> tuple[Any, ...]:
    """A workload's step and what it changes, the metrics last."""
    rngs, average = nnx.Rngs(0), nnx.metrics.Average
    if workload == "gan-64":
        judge, artist = discriminator(rngs), generator(rngs)
        optimizers = [nnx.Optimizer(model, adam(GAN_RATE, b1=0.5), wrt=nnx.Param) for model in (judge, artist)]
        metrics = nnx.MultiMetric(d_loss=average("d_loss"), g_loss=average("g_loss"))
        return compete, judge, artist, *optimizers, nnx.EMA(artist, decay=0.995, only=nnx.Param), rngs, metrics
    step, update = classify, adam(RATE)
    metrics = nnx.MultiMetric(loss=average("loss"), accuracy=nnx.metrics.Accuracy())
    if workload == "convnet-64":
        model = ConvNet(rngs)
    elif workload == "tickets-128":
        accuracies = {"priority_accuracy": nnx.metrics.Accuracy(threshold=0.0), "department_accuracy": nnx.metrics.Accuracy()}
        model, step, metrics = Tickets(rngs), route, nnx.MultiMetric(loss=average("loss"), **accuracies)
    elif workload == "gpt-16":
        model, update, metrics = GPT(rngs), adam(GPT_RATE), nnx.MultiMetric(loss=average("loss"))
    else:
        model = mlp(*WIDTHS[workload], rngs)
    if workload == "digits-mlp-32":
        # Optax's advice for small weights: fewer arrays go in and out. The copies cost larger networks more than that saves.
        update = optax.flatten(update)
    return step, model, nnx.Optimizer(model, update, wrt=nnx.Param), metrics


def _gathering(step: Step) -> Step:
    """The step, on some rows of arrays."""

    def gathered(*arguments: Any) -> None:
        *bound, arrays, rows = arguments
        step(*bound, {name: array[rows] for name, array in arrays.items()})

    return gathered


def _read(metrics: nnx.MultiMetric) -> Arrays:
    """Means over the epoch, which then starts anew."""
    logs = metrics.compute()
    metrics.reset()
    return logs


def _stream(data: dict[str, np.ndarray], rows: np.ndarray, first: int) -> Iterator[dict[str, np.ndarray]]:
    """An epoch's batches, from its first step's number on."""
    for step, batch in enumerate(rows, first):
        yield {"x": augmented(data["x"][batch], seed=step), "y": data["y"][batch]}


def _prefetched(batches: Iterator[dict[str, np.ndarray]], ahead: int = 2) -> Iterator[Arrays]:
    """Batches on the device, made in a thread, so many ahead of the one in use."""

    def make() -> Arrays | None:
        batch = next(batches, None)
        return None if batch is None else jax.device_put(batch)

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(make) for _ in range(ahead))
        while batch := waiting.popleft().result():
            waiting.append(thread.submit(make))
            yield batch


def _embeddings(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform from -0.05 to 0.05."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)


def _forget(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Ones for the forget gate, which is the second of four."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)

"""The workloads in plain JAX, written by hand: pure functions of nested dictionaries of arrays.

`jax-scan` is the floor: the data is on the device and an epoch is one program. `jax-loop` is the loop that most people write: one
program for the step, called for every batch.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.nn.initializers import glorot_uniform, normal, orthogonal, uniform
from workloads import GAN_RATE, GPT_RATE, RATE, WIDTHS, WORKLOADS

Weights = Any  # nested dictionaries and lists of arrays
Moments = tuple[Weights, Weights]
Batch = dict[str, Array]
Logs = dict[str, Array]

FEW = 10_000  # up to so many weights a step costs what its operations and arguments cost by their number, not by their size


class State(NamedTuple):
    """What a step changes."""

    weights: Weights
    moments: Any
    step: Array
    sums: Logs
    """Of the logs, since the epoch began."""


Step = Callable[[State, Batch], State]


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """A function that trains for so many epochs and returns the last one's logs."""
    size = WORKLOADS[workload]
    state, step = NETWORKS[workload]()
    rng = np.random.default_rng(0)
    if workload == "stream":
        load = functools.partial(augmented, data["x"], data["y"], rng)
        epoch = streamed(step, ahead(load) if system == "jax-scan" else functools.partial(map, load))
    elif system == "jax-loop":
        epoch = looped(step, jax.device_put(data))
    else:
        epoch = scanned(step, jax.device_put(data), unroll=2 if workload == "gan-64" else 1)  # XLA then copies no weights

    def train(epochs: int) -> dict[str, float]:
        nonlocal state
        for _ in range(epochs):
            state = epoch(state, rng.permutation(size.examples).astype(np.int32).reshape(size.steps, size.batch_size))
        return {name: float(total) / size.steps for name, total in state.sums.items()}

    return train


Epoch = Callable[[State, np.ndarray], State]


def scanned(step: Step, data: Batch, unroll: int) -> Epoch:
    """An epoch as one program, so many steps in each round of its loop."""

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state: State, data: Batch, order: Array) -> State:
        def body(state: State, rows: Array) -> tuple[State, None]:
            return step(state, taken(data, rows)), None

        return jax.lax.scan(body, begun(state), order, unroll=unroll)[0]

    return lambda state, order: epoch(state, data, order)


def looped(step: Step, data: Batch) -> Epoch:
    """An epoch as calls of a program, one for each batch."""

    @functools.partial(jax.jit, donate_argnums=0)
    def each(state: State, data: Batch, order: Array) -> State:
        return step(state, taken(data, order[state.step % len(order)]))

    def epoch(state: State, order: np.ndarray) -> State:
        state, order = begun(state), jax.device_put(order)
        for _ in range(len(order)):
            state = each(state, data, order)
        return state

    return epoch


def streamed(step: Step, batches: Callable[[np.ndarray], Iterable[Batch]]) -> Epoch:
    """An epoch as calls of a program, each given a batch that the host has made."""
    each = jax.jit(step, donate_argnums=0)

    def epoch(state: State, order: np.ndarray) -> State:
        state = begun(state)
        for batch in batches(order):
            state = each(state, batch)
        return state

    return epoch


def taken(data: Batch, rows: Array) -> Batch:
    """The given rows of every array."""
    return {name: array[rows] for name, array in data.items()}


def begun(state: State) -> State:
    """The state at the beginning of an epoch."""
    return state._replace(sums=jax.tree.map(jnp.zeros_like, state.sums))


def ahead(load: Callable[[np.ndarray], Batch]) -> Callable[[np.ndarray], Iterator[Batch]]:
    """Batches in turn, made by a thread, two of them before they are asked for."""
    thread = ThreadPoolExecutor(1)

    def batches(order: np.ndarray) -> Iterator[Batch]:
        waiting = deque(thread.submit(load, rows) for rows in order[:2])
        for rows in order[2:]:
            waiting.append(thread.submit(load, rows))
            yield waiting.popleft().result()
        for future in waiting:
            yield future.result()

    return batches


def augmented(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, rows: np.ndarray) -> Batch:
    """Pictures from a file, moved and mirrored at random, on the device."""
    n = len(rows)
    padded = np.zeros((n, 40, 40, 3), np.uint8)
    padded[:, 4:-4, 4:-4] = x[rows]
    places = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), (1, 2))
    cut = places[np.arange(n), *rng.integers(0, 9, (2, n))]
    mirrored = rng.random(n) < 0.5
    cut[mirrored] = cut[mirrored, ..., ::-1]
    pixels = np.moveaxis(cut, 1, -1).reshape(n, -1)
    return jax.device_put({"x": np.divide(pixels, 255, dtype=np.float32), "y": y[rows]})


# What networks are made of.


def dense_init(key: Array, inputs: int, outputs: int) -> Weights:
    """The weights of a dense layer."""
    return {"kernel": glorot_uniform()(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def dense(weights: Weights, x: Array) -> Array:
    """A dense layer."""
    return x @ weights["kernel"] + weights["bias"]


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Leaves out a share of the features and makes up for it."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean softmax cross-entropy."""
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(jax.nn.one_hot(labels, logits.shape[-1]) * logits, -1))


def binary_cross_entropy(logits: Array, targets: Array | float) -> Array:
    """The mean binary cross-entropy."""
    return jnp.mean(jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def accuracy(logits: Array, labels: Array) -> Array:
    """How often the largest logit is the right one."""
    return jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))


def started(weights: Weights) -> Moments:
    """Adam's moments before the first step."""
    return jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights)


def adam(
    weights: Weights, moments: Moments, gradients: Weights, step: Array, rate: float, beta_1: float = 0.9
) -> tuple[Weights, Moments]:
    """Weights and moments after a step of Adam, whose first step is number 1."""
    t = step.astype(jnp.float32)
    length = rate * jnp.sqrt(1 - 0.999**t) / (1 - beta_1**t)
    first = jax.tree.map(lambda m, g: m + (1 - beta_1) * (g - m), moments[0], gradients)
    second = jax.tree.map(lambda v, g: v + 0.001 * (g * g - v), moments[1], gradients)
    weights = jax.tree.map(lambda w, m, v: w - length * m / (jnp.sqrt(v) + 1e-7), weights, first, second)
    return weights, (first, second)


def supervised(
    init: Callable[[Array], Weights],
    loss: Callable[[Weights, Batch, Array], tuple[Array, Logs]],
    others: tuple[str, ...] = (),
    rate: float = RATE,
) -> tuple[State, Step]:
    """The first state and the step of a network with one loss; `others` are the logs that come with it."""
    weights = jax.jit(init)(jax.random.key(0))
    scored = loss
    if sum(leaf.size for leaf in jax.tree.leaves(weights)) <= FEW:
        weights, unravel = ravel_pytree(weights)

        def scored(vector: Array, batch: Batch, key: Array) -> tuple[Array, Logs]:
            return loss(unravel(vector), batch, key)

    def step(state: State, batch: Batch) -> State:
        key = jax.random.fold_in(jax.random.key(1), state.step)
        (value, logs), gradients = jax.value_and_grad(scored, has_aux=True)(state.weights, batch, key)
        weights, moments = adam(state.weights, state.moments, gradients, state.step + 1, rate)
        return State(weights, moments, state.step + 1, added(state.sums, {"loss": value, **logs}))

    sums = {name: jnp.zeros(()) for name in ("loss", *others)}
    return State(weights, jax.jit(started)(weights), jnp.zeros((), jnp.int32), sums), step


def added(sums: Logs, logs: Logs) -> Logs:
    """The sums with a step's logs."""
    return jax.tree.map(jnp.add, sums, logs)


# The networks.


def mlp(workload: str) -> tuple[State, Step]:
    """One hidden layer."""
    inputs, units, classes = WIDTHS[workload]

    def init(key: Array) -> Weights:
        hidden, logits = jax.random.split(key)
        return {"hidden": dense_init(hidden, inputs, units), "logits": dense_init(logits, units, classes)}

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        logits = dense(weights["logits"], jax.nn.relu(dense(weights["hidden"], batch["x"])))
        return cross_entropy(logits, batch["y"]), {"accuracy": accuracy(logits, batch["y"])}

    return supervised(init, loss, ("accuracy",))


@jax.custom_vjp
def convolution(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution without padding."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution_gradients(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Those of its input and its kernel. XLA's own are slower, in a loop on the CPU more than twentyfold."""
    x, kernel = saved
    _, height, width, channels = gradient.shape
    windows = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)
    of_kernel = windows.reshape(-1, windows.shape[-1]).T @ gradient.reshape(-1, channels)
    padded = jnp.pad(gradient, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return convolution(padded, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)), of_kernel.reshape(kernel.shape)


convolution.defvjp(lambda x, kernel: (convolution(x, kernel), (x, kernel)), convolution_gradients)


def convnet() -> tuple[State, Step]:
    """Two convolutions."""

    def init(key: Array) -> Weights:
        first, second, logits = jax.random.split(key, 3)
        return {
            "first": {"kernel": glorot_uniform()(first, (3, 3, 1, 32)), "bias": jnp.zeros(32)},
            "second": {"kernel": glorot_uniform()(second, (3, 3, 32, 64)), "bias": jnp.zeros(64)},
            "logits": dense_init(logits, 5 * 5 * 64, 10),
        }

    def pooled(x: Array) -> Array:  # the gradient of `reduce_window` would take longer than all the rest
        n, height, width, channels = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
        cells = x[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)
        rows = jnp.maximum(cells[:, :, 0], cells[:, :, 1])
        return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        x = pooled(jax.nn.relu(convolution(batch["x"], weights["first"]["kernel"]) + weights["first"]["bias"]))
        x = pooled(jax.nn.relu(convolution(x, weights["second"]["kernel"]) + weights["second"]["bias"]))
        logits = dense(weights["logits"], dropout(key, x.reshape(len(x), -1), 0.5))
        return cross_entropy(logits, batch["y"]), {"accuracy": accuracy(logits, batch["y"])}

    return supervised(init, loss, ("accuracy",))


def gan() -> tuple[State, Step]:
    """A generator and a discriminator."""

    def init(key: Array) -> Weights:
        def layers(key: Array, *widths: int) -> Weights:
            keys = jax.random.split(key, len(widths) - 1)
            return [dense_init(*parts) for parts in zip(keys, widths, widths[1:], strict=False)]

        artist, judge = jax.random.split(key)
        return {"generator": layers(artist, 16, 512, 512, 64), "discriminator": layers(judge, 64, 512, 256, 1)}

    def generated(artist: Weights, latents: Array) -> Array:
        x = jax.nn.leaky_relu(dense(artist[0], latents), 0.2)
        x = jax.nn.leaky_relu(dense(artist[1], x), 0.2)
        return jnp.tanh(dense(artist[2], x))

    def judged(judge: Weights, x: Array, key: Array) -> Array:
        first, second = jax.random.split(key)
        x = dropout(first, jax.nn.leaky_relu(dense(judge[0], x), 0.2), 0.3)
        x = dropout(second, jax.nn.leaky_relu(dense(judge[1], x), 0.2), 0.3)
        return dense(judge[2], x)

    def step(state: State, batch: Batch) -> State:
        judge, artist, n = state.weights["discriminator"], state.weights["generator"], len(batch["x"])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), state.step), 4)
        latents = jax.random.normal(keys[0], (2, n, 16))
        images = jnp.concatenate([generated(artist, latents[0]), batch["x"]])
        targets = jnp.repeat(jnp.array([[1.0], [0.0]]), n, axis=0) + jax.random.uniform(keys[1], (2 * n, 1), maxval=0.05)

        def telling_apart(judge: Weights) -> Array:
            return binary_cross_entropy(judged(judge, images, keys[2]), targets)

        d_loss, gradients = jax.value_and_grad(telling_apart)(judge)
        judge, d_moments = adam(judge, state.moments["discriminator"], gradients, state.step + 1, GAN_RATE, beta_1=0.5)

        def deceiving(artist: Weights) -> Array:
            return binary_cross_entropy(judged(judge, generated(artist, latents[1]), keys[3]), 0.0)

        g_loss, gradients = jax.value_and_grad(deceiving)(artist)
        artist, g_moments = adam(artist, state.moments["generator"], gradients, state.step + 1, GAN_RATE, beta_1=0.5)
        average = jax.tree.map(lambda a, w: a + 0.005 * (w - a), state.weights["average"], artist)
        return State(
            {"generator": artist, "discriminator": judge, "average": average},
            {"generator": g_moments, "discriminator": d_moments},
            state.step + 1,
            added(state.sums, {"d_loss": d_loss, "g_loss": g_loss}),
        )

    weights = jax.jit(init)(jax.random.key(0))
    moments = {name: jax.jit(started)(part) for name, part in weights.items()}
    weights["average"] = jax.tree.map(jnp.copy, weights["generator"])
    return State(weights, moments, jnp.zeros((), jnp.int32), {"d_loss": jnp.zeros(()), "g_loss": jnp.zeros(())}), step


def tickets() -> tuple[State, Step]:
    """Two LSTMs, two outputs."""
    units, gates = 64, (64, 4 * 64)

    def init(key: Array) -> Weights:
        def reader(key: Array) -> Weights:
            words, kernel, recurrent = jax.random.split(key, 3)
            return {
                "words": uniform(0.1)(words, (4000, units)) - 0.05,
                # Rows for the inputs, then rows for the state; columns for the gates: input, forget, cell, output.
                "kernel": jnp.concatenate([glorot_uniform()(kernel, gates), orthogonal()(recurrent, gates)]),
                "bias": jnp.zeros(4 * units).at[units : 2 * units].set(1.0),
            }

        title, body, priority, department = jax.random.split(key, 4)
        return {
            "title": reader(title),
            "body": reader(body),
            "priority": dense_init(priority, 2 * units + 7, 1),
            "department": dense_init(department, 2 * units + 7, 6),
        }

    def read(weights: Weights, words: Array) -> Array:
        # Computing what comes after the product again is quicker than storing it.
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
        def cell(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
            c, h = state
            i, f, g, o = jnp.split(dense(weights, jnp.concatenate([x, h], -1)), 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        n = len(words)
        nothing = jnp.zeros((n, units))
        _, features = jax.lax.scan(cell, (nothing, nothing), weights["words"][words.T])
        return features[jnp.sum(words > 0, 1) - 1, jnp.arange(n)]  # padding comes last: what the LSTM makes of it has no effect

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        read_both = [read(weights[name], batch[name]) for name in ("title", "body")]
        features = jnp.concatenate([*read_both, batch["tags"]], -1)
        priority, department = dense(weights["priority"], features), dense(weights["department"], features)
        value = 0.5 * binary_cross_entropy(priority, batch["priority"]) + cross_entropy(department, batch["department"])
        hits = jnp.mean(((priority > 0) == (batch["priority"] > 0)).astype(jnp.float32))
        return value, {"priority_accuracy": hits, "department_accuracy": accuracy(department, batch["department"])}

    return supervised(init, loss, ("priority_accuracy", "department_accuracy"))


def gpt() -> tuple[State, Step]:
    """A decoder of four blocks."""
    length, width, heads = 128, 128, 4

    def init(key: Array) -> Weights:
        def norm_init() -> Weights:
            return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

        def block_init(key: Array) -> Weights:
            *parts, out, up, down = jax.random.split(key, 6)
            return {
                "norms": [norm_init(), norm_init()],
                "parts": {
                    "kernel": jnp.concatenate([glorot_uniform()(part, (width, width)) for part in parts], 1),
                    "bias": jnp.zeros(3 * width),
                },
                "out": dense_init(out, width, width),
                "up": dense_init(up, width, 512),
                "down": dense_init(down, 512, width),
            }

        tokens, positions, logits, *blocks = jax.random.split(key, 7)
        return {
            "tokens": normal(0.02)(tokens, (256, width)),
            "positions": normal(0.02)(positions, (length, width)),
            "blocks": [block_init(block) for block in blocks],
            "norm": norm_init(),
            "logits": dense_init(logits, width, 256),
        }

    def norm(weights: Weights, x: Array) -> Array:
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(centred * centred, -1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-5) * weights["scale"] + weights["bias"]

    def attention(weights: Weights, x: Array) -> Array:
        parts = jnp.split(dense(weights["parts"], x), 3, axis=-1)
        queries, keys, values = (part.reshape(-1, length, heads, width // heads).swapaxes(1, 2) for part in parts)
        found = []
        for end in range(32, length + 1, 32):  # 32 queries at a time, and no keys after the last of them
            scores = queries[:, :, end - 32 : end] * (width // heads) ** -0.5 @ keys[:, :, :end].swapaxes(2, 3)
            scores = scores + jnp.where(jnp.tri(32, end, end - 32, dtype=bool), 0.0, -1e9)
            likely = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
            total = jnp.sum(likely, -1, keepdims=True)
            found.append(likely @ values[:, :, :end] / total)  # fewer numbers to divide than in `likely`
        return dense(weights["out"], jnp.concatenate(found, 2).swapaxes(1, 2).reshape(x.shape))

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        x = weights["tokens"][batch["x"]] + weights["positions"]
        x = x.reshape(-1, width)  # one axis for all tokens: a kernel's gradient is then a single matrix product
        for block in weights["blocks"]:
            x = x + attention(block, norm(block["norms"][0], x))
            x = x + dense(block["down"], jax.nn.gelu(dense(block["up"], norm(block["norms"][1], x)), approximate=True))
        return cross_entropy(dense(weights["logits"], norm(weights["norm"], x)), batch["y"].reshape(-1)), {}

    return supervised(init, loss, rate=GPT_RATE)


NETWORKS: dict[str, Callable[[], tuple[State, Step]]] = {
    **{name: functools.partial(mlp, name) for name in WIDTHS},
    "convnet-64": convnet,
    "gan-64": gan,
    "tickets-128": tickets,
    "gpt-16": gpt,
}

"""The networks of the workloads in plain JAX, each as its first state and its step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import glorot_uniform, normal, orthogonal, uniform
from jax_parts import (
    Batch,
    Logs,
    State,
    Step,
    Weights,
    accuracy,
    adam,
    add_logs,
    binary_cross_entropy,
    cross_entropy,
    dense,
    dropout,
    init_dense,
    init_moments,
    supervised,
)
from workloads import GAN_LEARNING_RATE, GPT_LEARNING_RATE, WIDTHS


def mlp(workload: str) -> tuple[State, Step]:
    """Returns the first state and the step of a network with one hidden layer."""
    inputs, units, classes = WIDTHS[workload]

    def init(key: Array) -> Weights:
        hidden, logits = jax.random.split(key)
        return {"hidden": init_dense(hidden, inputs, units), "logits": init_dense(logits, units, classes)}

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        logits = dense(weights["logits"], jax.nn.relu(dense(weights["hidden"], batch["x"])))
        return cross_entropy(logits, batch["y"]), {"accuracy": accuracy(logits, batch["y"])}

    return supervised(init, loss, ("accuracy",))


@jax.custom_vjp
def convolution(x: Array, kernel: Array) -> Array:
    """Returns a 3x3 convolution without padding."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolution_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Returns the gradients of the input and the kernel. On the CPU XLA's own are slower, within a loop by more than 20 times."""
    x, kernel = residuals
    _, height, width, channels = gradient.shape
    windows = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1)
    kernel_gradient = windows.reshape(-1, windows.shape[-1]).T @ gradient.reshape(-1, channels)
    padded = jnp.pad(gradient, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return convolution(padded, jnp.flip(kernel, (0, 1)).swapaxes(2, 3)), kernel_gradient.reshape(kernel.shape)


convolution.defvjp(lambda x, kernel: (convolution(x, kernel), (x, kernel)), convolution_gradients)


def convnet() -> tuple[State, Step]:
    """Returns the first state and the step of a network with two convolutions."""

    def init(key: Array) -> Weights:
        first, second, logits = jax.random.split(key, 3)
        return {
            "first": {"kernel": glorot_uniform()(first, (3, 3, 1, 32)), "bias": jnp.zeros(32)},
            "second": {"kernel": glorot_uniform()(second, (3, 3, 32, 64)), "bias": jnp.zeros(64)},
            "logits": init_dense(logits, 5 * 5 * 64, 10),
        }

    def max_pool(x: Array) -> Array:  # the gradient of `reduce_window` would take longer than everything else together
        n, height, width, channels = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
        cells = x[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels)
        rows = jnp.maximum(cells[:, :, 0], cells[:, :, 1])
        return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        x = max_pool(jax.nn.relu(convolution(batch["x"], weights["first"]["kernel"]) + weights["first"]["bias"]))
        x = max_pool(jax.nn.relu(convolution(x, weights["second"]["kernel"]) + weights["second"]["bias"]))
        logits = dense(weights["logits"], dropout(key, x.reshape(len(x), -1), 0.5))
        return cross_entropy(logits, batch["y"]), {"accuracy": accuracy(logits, batch["y"])}

    return supervised(init, loss, ("accuracy",))


def generate(weights: Weights, latents: Array) -> Array:
    """Applies the GAN's generator: latents to images from -1 to 1."""
    x = jax.nn.leaky_relu(dense(weights[0], latents), 0.2)
    x = jax.nn.leaky_relu(dense(weights[1], x), 0.2)
    return jnp.tanh(dense(weights[2], x))


def discriminate(weights: Weights, x: Array, key: Array) -> Array:
    """Applies the GAN's discriminator with dropout: images to logits, high for generated ones."""
    first, second = jax.random.split(key)
    x = dropout(first, jax.nn.leaky_relu(dense(weights[0], x), 0.2), 0.3)
    x = dropout(second, jax.nn.leaky_relu(dense(weights[1], x), 0.2), 0.3)
    return dense(weights[2], x)


def gan() -> tuple[State, Step]:
    """Returns the first state and the step of a generator and a discriminator."""

    def init(key: Array) -> Weights:
        def layers(key: Array, *widths: int) -> Weights:
            keys = jax.random.split(key, len(widths) - 1)
            return [init_dense(*arguments) for arguments in zip(keys, widths, widths[1:], strict=False)]

        g_key, d_key = jax.random.split(key)
        return {"generator": layers(g_key, 16, 512, 512, 64), "discriminator": layers(d_key, 64, 512, 256, 1)}

    def step(state: State, batch: Batch) -> State:
        discriminator, generator, n = state.weights["discriminator"], state.weights["generator"], len(batch["x"])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), state.step), 4)
        latents = jax.random.normal(keys[0], (2, n, 16))
        images = jnp.concatenate([generate(generator, latents[0]), batch["x"]])
        targets = jnp.repeat(jnp.array([[1.0], [0.0]]), n, axis=0) + jax.random.uniform(keys[1], (2 * n, 1), maxval=0.05)
        update = functools.partial(adam, step=state.step + 1, learning_rate=GAN_LEARNING_RATE, beta_1=0.5)

        def discriminator_loss(discriminator: Weights) -> Array:
            return binary_cross_entropy(discriminate(discriminator, images, keys[2]), targets)

        d_loss, gradients = jax.value_and_grad(discriminator_loss)(discriminator)
        discriminator, d_moments = update(discriminator, state.moments["discriminator"], gradients)

        def generator_loss(generator: Weights) -> Array:
            return binary_cross_entropy(discriminate(discriminator, generate(generator, latents[1]), keys[3]), 0.0)

        g_loss, gradients = jax.value_and_grad(generator_loss)(generator)
        generator, g_moments = update(generator, state.moments["generator"], gradients)
        average = jax.tree.map(lambda a, w: a + 0.005 * (w - a), state.weights["average"], generator)
        return State(
            {"generator": generator, "discriminator": discriminator, "average": average},
            {"generator": g_moments, "discriminator": d_moments},
            state.step + 1,
            add_logs(state.sums, {"d_loss": d_loss, "g_loss": g_loss}),
        )

    weights = jax.jit(init)(jax.random.key(0))
    moments = {name: jax.jit(init_moments)(network) for name, network in weights.items()}
    weights["average"] = jax.tree.map(jnp.copy, weights["generator"])
    return State(weights, moments, jnp.zeros((), jnp.int32), {"d_loss": jnp.zeros(()), "g_loss": jnp.zeros(())}), step


UNITS = 64  # of the LSTMs and their embeddings


def init_lstm(key: Array) -> Weights:
    """Draws the weights of an embedding and an LSTM."""
    words, kernel, recurrent = jax.random.split(key, 3)
    shape = (UNITS, 4 * UNITS)
    return {
        "words": uniform(0.1)(words, (4000, UNITS)) - 0.05,
        # Rows for the inputs, then rows for the state; columns for the gates: input, forget, cell, output.
        "kernel": jnp.concatenate([glorot_uniform()(kernel, shape), orthogonal()(recurrent, shape)]),
        "bias": jnp.zeros(4 * UNITS).at[UNITS : 2 * UNITS].set(1.0),
    }


def lstm(weights: Weights, words: Array) -> Array:
    """Returns an LSTM's output at the last word of each row; padding comes last, so it has no effect."""

    # Recomputing what follows the matrix product is faster than storing it.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    def cell(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        c, h = state
        i, f, g, o = jnp.split(dense(weights, jnp.concatenate([x, h], -1)), 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    n = len(words)
    zeros = jnp.zeros((n, UNITS))
    _, outputs = jax.lax.scan(cell, (zeros, zeros), weights["words"][words.T])
    return outputs[jnp.sum(words > 0, 1) - 1, jnp.arange(n)]


def tickets() -> tuple[State, Step]:
    """Returns the first state and the step of a network with two LSTMs and two outputs."""

    def init(key: Array) -> Weights:
        title, body, priority, department = jax.random.split(key, 4)
        return {
            "title": init_lstm(title),
            "body": init_lstm(body),
            "priority": init_dense(priority, 2 * UNITS + 7, 1),
            "department": init_dense(department, 2 * UNITS + 7, 6),
        }

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        sequences = [lstm(weights[name], batch[name]) for name in ("title", "body")]
        features = jnp.concatenate([*sequences, batch["tags"]], -1)
        priority, department = dense(weights["priority"], features), dense(weights["department"], features)
        value = 0.5 * binary_cross_entropy(priority, batch["priority"]) + cross_entropy(department, batch["department"])
        hits = jnp.mean(((priority > 0) == (batch["priority"] > 0)).astype(jnp.float32))
        return value, {"priority_accuracy": hits, "department_accuracy": accuracy(department, batch["department"])}

    return supervised(init, loss, ("priority_accuracy", "department_accuracy"))


LENGTH, WIDTH, HEADS = 128, 128, 4  # of the GPT


def init_norm() -> Weights:
    """Returns the weights of a layer norm."""
    return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}


def norm(weights: Weights, x: Array) -> Array:
    """Applies a layer norm."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * weights["scale"] + weights["bias"]


def init_block(key: Array) -> Weights:
    """Draws the weights of a transformer block."""
    *projections, out, up, down = jax.random.split(key, 6)
    return {
        "norms": [init_norm(), init_norm()],
        "projections": {
            "kernel": jnp.concatenate([glorot_uniform()(projection, (WIDTH, WIDTH)) for projection in projections], 1),
            "bias": jnp.zeros(3 * WIDTH),
        },
        "out": init_dense(out, WIDTH, WIDTH),
        "up": init_dense(up, WIDTH, 512),
        "down": init_dense(down, 512, WIDTH),
    }


def attention(weights: Weights, x: Array) -> Array:
    """Applies causal self-attention, 32 queries at a time without the keys behind them."""
    projections = jnp.split(dense(weights["projections"], x), 3, axis=-1)
    queries, keys, values = (part.reshape(-1, LENGTH, HEADS, WIDTH // HEADS).swapaxes(1, 2) for part in projections)
    outputs = []
    for end in range(32, LENGTH + 1, 32):
        scores = queries[:, :, end - 32 : end] * (WIDTH // HEADS) ** -0.5 @ keys[:, :, :end].swapaxes(2, 3)
        scores = scores + jnp.where(jnp.tri(32, end, end - 32, dtype=bool), 0.0, -1e9)
        exponentials = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True)))
        total = jnp.sum(exponentials, -1, keepdims=True)
        outputs.append(exponentials @ values[:, :, :end] / total)  # fewer divisions than in `exponentials / total`
    return dense(weights["out"], jnp.concatenate(outputs, 2).swapaxes(1, 2).reshape(x.shape))


def gpt() -> tuple[State, Step]:
    """Returns the first state and the step of a decoder with four blocks."""

    def init(key: Array) -> Weights:
        tokens, positions, logits, *blocks = jax.random.split(key, 7)
        return {
            "tokens": normal(0.02)(tokens, (256, WIDTH)),
            "positions": normal(0.02)(positions, (LENGTH, WIDTH)),
            "blocks": [init_block(block) for block in blocks],
            "norm": init_norm(),
            "logits": init_dense(logits, WIDTH, 256),
        }

    def loss(weights: Weights, batch: Batch, key: Array) -> tuple[Array, Logs]:
        x = weights["tokens"][batch["x"]] + weights["positions"]
        x = x.reshape(-1, WIDTH)  # one axis for all tokens: a kernel's gradient is then a single matrix product
        for block in weights["blocks"]:
            x = x + attention(block, norm(block["norms"][0], x))
            x = x + dense(block["down"], jax.nn.gelu(dense(block["up"], norm(block["norms"][1], x)), approximate=True))
        return cross_entropy(dense(weights["logits"], norm(weights["norm"], x)), batch["y"].reshape(-1)), {}

    return supervised(init, loss, learning_rate=GPT_LEARNING_RATE)


NETWORKS: dict[str, Callable[[], tuple[State, Step]]] = {
    **{name: functools.partial(mlp, name) for name in WIDTHS},
    "convnet-64": convnet,
    "gan-64": gan,
    "tickets-128": tickets,
    "gpt-16": gpt,
}

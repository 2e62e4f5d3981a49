"""Layers, losses, Adam and the step of a network with one loss, in plain JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.nn.initializers import glorot_uniform
from workloads import LEARNING_RATE

Weights = Any  # nested dictionaries and lists of arrays
Moments = tuple[Weights, Weights]
Batch = dict[str, Array]
Logs = dict[str, Array]

FEW_WEIGHTS = 10_000  # up to here, a step's time depends on the number of operations and arguments, not on their sizes


class State(NamedTuple):
    """What a step updates."""

    weights: Weights
    moments: Any
    step: Array
    sums: Logs
    """Sums of the logs since the beginning of the epoch."""


Step = Callable[[State, Batch], State]


def init_dense(key: Array, inputs: int, outputs: int) -> Weights:
    """Draws the weights of a dense layer."""
    return {"kernel": glorot_uniform()(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def dense(weights: Weights, x: Array) -> Array:
    """Applies a dense layer."""
    return x @ weights["kernel"] + weights["bias"]


def dropout(key: Array, x: Array, rate: float) -> Array:
    """Sets a share of the features to zero and scales the others up."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the mean softmax cross-entropy."""
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.sum(jax.nn.one_hot(labels, logits.shape[-1]) * logits, -1))


def binary_cross_entropy(logits: Array, targets: Array | float) -> Array:
    """Returns the mean binary cross-entropy."""
    return jnp.mean(jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def accuracy(logits: Array, labels: Array) -> Array:
    """Returns the share of rows whose largest logit is that of the label."""
    return jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))


def init_moments(weights: Weights) -> Moments:
    """Returns Adam's moments before the first step."""
    return jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights)


def adam(
    weights: Weights, moments: Moments, gradients: Weights, step: Array, learning_rate: float, beta_1: float = 0.9
) -> tuple[Weights, Moments]:
    """Returns the weights and moments after a step of Adam; the first step is number 1."""
    t = step.astype(jnp.float32)
    step_size = learning_rate * jnp.sqrt(1 - 0.999**t) / (1 - beta_1**t)
    first = jax.tree.map(lambda m, g: m + (1 - beta_1) * (g - m), moments[0], gradients)
    second = jax.tree.map(lambda v, g: v + 0.001 * (g * g - v), moments[1], gradients)
    weights = jax.tree.map(lambda w, m, v: w - step_size * m / (jnp.sqrt(v) + 1e-7), weights, first, second)
    return weights, (first, second)


def supervised(
    init: Callable[[Array], Weights],
    loss: Callable[[Weights, Batch, Array], tuple[Array, Logs]],
    metrics: tuple[str, ...] = (),
    learning_rate: float = LEARNING_RATE,
) -> tuple[State, Step]:
    """Returns the first state and the step of a network with one loss, which also returns the logs named by `metrics`."""
    weights = jax.jit(init)(jax.random.key(0))
    loss_of_weights = loss
    if sum(leaf.size for leaf in jax.tree.leaves(weights)) <= FEW_WEIGHTS:
        weights, unravel = ravel_pytree(weights)

        def loss_of_weights(vector: Array, batch: Batch, key: Array) -> tuple[Array, Logs]:
            return loss(unravel(vector), batch, key)

    def step(state: State, batch: Batch) -> State:
        key = jax.random.fold_in(jax.random.key(1), state.step)
        (value, logs), gradients = jax.value_and_grad(loss_of_weights, has_aux=True)(state.weights, batch, key)
        weights, moments = adam(state.weights, state.moments, gradients, state.step + 1, learning_rate)
        return State(weights, moments, state.step + 1, add_logs(state.sums, {"loss": value, **logs}))

    sums = {name: jnp.zeros(()) for name in ("loss", *metrics)}
    return State(weights, jax.jit(init_moments)(weights), jnp.zeros((), jnp.int32), sums), step


def add_logs(sums: Logs, logs: Logs) -> Logs:
    """Returns the sums plus a step's logs."""
    return jax.tree.map(jnp.add, sums, logs)

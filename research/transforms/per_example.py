"""The gradient of each example of a batch, and what only it tells."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from research.core.state import Batch, InvalidArgument, State, is_seed, num_rows, seed_of_part
from research.core.step import Gradient
from research.core.update import Gradients
from research.transforms.clip import check_positive, scale_to_norm
from research.transforms.jaxpr import dependent_on, inputs, layer_of, outputs, own_equations


def per_example(gradient: Gradient) -> Gradient:
    """Returns the gradient of each example: `values`, `loss` and `weight` of the result have a leading axis of examples.

    Example i's gradient is that of a batch of this example alone, with seeds of its own: Dropout draws for each example anew. The
    state that is returned is that after the complete batch. Gradients of padding (`Batch.valid`) are zero, and so is its weight.
    They need as much memory as all examples' gradients together: split large batches, as `accumulate(clip_per_example(...), 8)`
    does. `step` takes a mean over examples: see `clip_per_example`.

    When it is traced, raises `InvalidArgument` for a layer that keeps statistics of the batch, such as BatchNormalization: its
    examples' gradients depend on each other.

    >>> import keras, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> objective, metrics = research.keras_objective(model, loss="mse")
    >>> state = State([v.value for v in model.trainable_variables], [], [], metrics.init())
    >>> batch = Batch(jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1)))
    >>> _, gradients = per_example(research.gradient(objective))(state, batch)
    >>> gradients.values[0][:, 0, 0].tolist(), gradients.loss.tolist()
    ([2.0, 8.0], [1.0, 4.0])
    """

    def of_each_example(state: State, batch: Any) -> tuple[State, Gradients]:
        _check_independent(gradient, state, batch)

        def of_example(index: Any, example: Any) -> Gradients:
            seeds = jax.tree.map(lambda leaf: seed_of_part(leaf, index) if is_seed(leaf) else leaf, state.non_trainable)
            return gradient(state._replace(non_trainable=seeds), example)[1]

        after, _ = gradient(state, batch)  # the compiler removes its backward pass, which nothing uses
        alone = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 1), batch)
        gradients = jax.vmap(of_example)(jnp.arange(num_rows(batch)), alone)
        if isinstance(batch, Batch) and batch.valid is not None:
            gradients = jax.tree.map(lambda leaf: _where_rows(batch.valid, leaf), gradients)
        return after, gradients

    return of_each_example


def clip_per_example(gradient: Gradient, max_norm: float | int) -> Gradient:
    """Returns the mean over a batch's examples of their gradients, each scaled down to a norm of `max_norm` where it is longer.

    One example changes the result by at most `max_norm` over the number of examples: see `private`. `weight` is the number of
    examples without padding, `loss` the mean of their losses. Raises `InvalidArgument` as `per_example` does, and unless
    `max_norm` is positive.

    >>> import keras, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> objective, metrics = research.keras_objective(model, loss="mse")
    >>> state = State([v.value for v in model.trainable_variables], [], [], metrics.init())
    >>> batch = Batch(jnp.array([[1.0], [2.0]]), jnp.zeros((2, 1)))
    >>> _, gradients = clip_per_example(research.gradient(objective), 4.0)(state, batch)
    >>> gradients.values[0].item(), gradients.loss.item(), gradients.weight.item()
    (3.0, 2.5, 2.0)
    """
    check_positive(max_norm, "clip_per_example: max_norm")
    each = per_example(gradient)

    def clipped(state: State, batch: Any) -> tuple[State, Gradients]:
        state, gradients = each(state, batch)
        values = jax.vmap(lambda example: scale_to_norm(example, max_norm))(gradients.values)
        valid = batch.valid if isinstance(batch, Batch) else None
        count = jnp.asarray(num_rows(batch) if valid is None else jnp.sum(valid), jnp.float32)
        at_least_one = jnp.maximum(count, 1)  # a Poisson sample may be empty

        def mean(leaf: Array) -> Array:
            return jnp.sum(leaf, 0) / at_least_one.astype(leaf.dtype)

        return state, Gradients(jax.tree.map(mean, values), mean(gradients.loss), count)

    return clipped


def gradient_noise_scale(gradients: Gradients) -> Float[Array, ""]:
    """Returns the simple noise scale of `per_example` gradients, in examples (McCandlish et al., 2018, arXiv:1812.06162).

    It is the trace of the gradients' covariance over the squared norm of their mean, both estimated without bias from the batch:
    about the batch size beyond which larger batches stop to help. It may be negative or infinite where the batch is too small to
    tell the mean from noise. Padding must not be in the batch.

    >>> gradients = Gradients([jnp.array([[1.0], [3.0]])], jnp.zeros(2), jnp.ones(2))
    >>> round(gradient_noise_scale(gradients).item(), 4)  # a variance of 2, a mean of 2 with an error of variance 1
    0.6667
    """
    values = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), gradients.values)
    examples = num_rows(values)
    of_each = jnp.mean(jax.vmap(lambda example: optax.tree.norm(example, squared=True))(values))
    of_mean = optax.tree.norm(jax.tree.map(lambda leaf: jnp.mean(leaf, 0), values), squared=True)
    variance = (of_each - of_mean) * (examples / (examples - 1))
    return variance / (of_mean - variance / examples)


def _where_rows(valid: Any, leaf: Array) -> Array:
    return jnp.where(valid.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))


def _check_independent(gradient: Gradient, state: State, batch: Any) -> None:
    """Raises `InvalidArgument` if a layer's statistics depend on the batch."""
    program = jax.make_jaxpr(gradient)(state, batch)
    dependent = dependent_on(program, inputs(program)[len(jax.tree.leaves(state)) :])
    first = len(jax.tree.leaves(state.trainable))
    positions = range(first, first + len(jax.tree.leaves(state.non_trainable)))
    changed = [outputs(program)[i] for i in positions if outputs(program)[i] in dependent]
    if changed:
        layers = [layer_of(equation) for equation in own_equations(program) if changed[0] in equation.outvars]
        raise InvalidArgument(
            f"per_example: the layer {layers[0] if layers else '?'!r} keeps statistics of the batch, as BatchNormalization does, "
            "so that examples' gradients depend on each other; expected layers without: GroupNormalization or LayerNormalization."
        )

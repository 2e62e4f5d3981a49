"""Sums in another order: equal to rounding, in fewer and larger products, wherever a kernel's gradient is taken."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import first_quick
from keras import layers

import research
from research.reordering import reordered
from research.transforms import equations

RNG = np.random.default_rng(0)
REPLACED = {
    "1d": (layers.Conv1D(3, 5), (4, 40, 2)),
    "2d": (layers.Conv2D(4, 3), (5, 14, 12, 2)),
    "2d same": (layers.Conv2D(4, (3, 2), padding="same"), (5, 14, 12, 2)),
    "2d strides": (layers.Conv2D(4, 3, strides=2), (5, 17, 19, 2)),
    "2d strides same": (layers.Conv2D(4, 3, strides=2, padding="same"), (5, 16, 18, 2)),
    "2d dilated": (layers.Conv2D(4, 3, dilation_rate=2), (5, 16, 18, 2)),
    "2d one place": (layers.Conv2D(4, 1), (5, 6, 7, 2)),
    "2d window as large as the image": (layers.Conv2D(4, 7), (5, 9, 9, 2)),
    "3d": (layers.Conv3D(3, 2), (3, 8, 9, 7, 2)),
    "dense on sequences": (layers.Dense(3), (5, 7, 4)),
    "dense on images": (layers.Dense(3), (2, 5, 7, 4)),
    "attention's projections": (layers.EinsumDense("btd,dhk->bthk", (None, 2, 3)), (5, 7, 4)),
}
LEFT = {
    "dense": (layers.Dense(3), (5, 4)),
    "2d groups": (layers.Conv2D(4, 3, groups=2), (5, 14, 12, 2)),
}


def summed(function: Any, *args: Any) -> list[tuple[int, ...]]:
    """The places, or the axes, that each product and each convolution of a program is a sum over."""
    found = []
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            found.append(tuple(equation.params["dimension_numbers"][0][0]))
        elif equation.primitive.name == "conv_general_dilated":
            found.append(equation.invars[1].aval.shape)
    return found


@pytest.mark.parametrize("name", first_quick([*REPLACED, *LEFT]))
def test_gradients_are_equal_to_rounding(name: str) -> None:
    layer, shape = {**REPLACED, **LEFT}[name]
    x = jnp.asarray(RNG.normal(size=shape), "float32")
    layer.build(shape)
    kernel = layer.kernel.value
    upstream = jnp.asarray(RNG.normal(size=layer(x).shape), "float32")

    def gradients(kernel: jax.Array, x: jax.Array) -> Any:
        def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
            outputs, _ = layer.stateless_call([kernel, *[v.value for v in layer.trainable_variables[1:]]], [], x)
            return jnp.sum(outputs * upstream)

        return jax.grad(loss, (0, 1))(kernel, x)

    wanted, found = jax.jit(gradients)(kernel, x), jax.jit(reordered(gradients))(kernel, x)
    for a, b in zip(wanted, found, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))
    before, after = summed(gradients, kernel, x), summed(reordered(gradients), kernel, x)
    assert (before == after) == (name in LEFT)
    assert len(before) == len(after)


@pytest.mark.slow
def test_a_learner_that_chose_it_learns_the_same() -> None:
    def trained(choose: Any) -> Any:
        keras.utils.set_random_seed(0)
        parts = [
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(8, 3),
            layers.Flatten(),
            layers.Dense(3),
        ]
        made = research.supervised(
            keras.Sequential([keras.Input((14, 14, 1)), *parts, layers.Dense(3)]),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer=keras.optimizers.SGD(0.1),
        )
        made = made._replace(train=choose(made.train))
        return research.train(made, research.arrays(x, y, batch_size=16), epochs=3)

    x, y = RNG.normal(size=(64, 14, 14, 1)).astype("float32"), RNG.integers(0, 3, 64).astype("int32")
    (state, logs), (chosen, chosen_logs) = trained(lambda train: train), trained(reordered)
    assert logs["loss"] == pytest.approx(chosen_logs["loss"], rel=1e-5)
    for a, b in zip(state.trainable, chosen.trainable, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)

"""`fast_sums`: kernel gradients equal to rounding, as single matrix products."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from keras import layers

import research
from research.cpu.sums import fast_sums
from research.transforms.jaxpr import equations

RNG = np.random.default_rng(0)
REWRITTEN = {
    "1d": (layers.Conv1D(3, 5), (4, 40, 2)),
    "2d": (layers.Conv2D(4, 3), (5, 14, 12, 2)),
    "2d same": (layers.Conv2D(4, (3, 2), padding="same"), (5, 14, 12, 2)),
    "2d strides": (layers.Conv2D(4, 3, strides=2), (5, 17, 19, 2)),
    "2d strides same": (layers.Conv2D(4, 3, strides=2, padding="same"), (5, 16, 18, 2)),
    "2d dilated": (layers.Conv2D(4, 3, dilation_rate=2), (5, 16, 18, 2)),
    "2d pointwise": (layers.Conv2D(4, 1), (5, 6, 7, 2)),
    "2d kernel almost as large as the image": (layers.Conv2D(4, 7), (5, 9, 9, 2)),
    "3d": (layers.Conv3D(3, 2), (3, 8, 9, 7, 2)),
    "dense on sequences": (layers.Dense(3), (5, 7, 4)),
    "dense on images": (layers.Dense(3), (2, 5, 7, 4)),
    "attention projection": (layers.EinsumDense("btd,dhk->bthk", (None, 2, 3)), (5, 7, 4)),
}
UNCHANGED = {
    "dense": (layers.Dense(3), (5, 4)),
    "2d groups": (layers.Conv2D(4, 3, groups=2), (5, 14, 12, 2)),
}


def contractions(function: Any, *args: Any) -> list[tuple[int, ...]]:
    """Returns, for each product and convolution of a program, the summed axes or the kernel's shape."""
    results = []
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        if equation.primitive.name == "dot_general":
            results.append(tuple(equation.params["dimension_numbers"][0][0]))
        elif equation.primitive.name == "conv_general_dilated":
            results.append(equation.invars[1].aval.shape)
    return results


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", slow_after_first([*REWRITTEN, *UNCHANGED]))
def test_gradients_are_equal_to_rounding(name: str) -> None:
    layer, shape = {**REWRITTEN, **UNCHANGED}[name]
    x = jnp.asarray(RNG.normal(size=shape), "float32")
    layer.build(shape)
    kernel = layer.kernel.value
    cotangent = jnp.asarray(RNG.normal(size=layer(x).shape), "float32")

    def gradients(kernel: jax.Array, x: jax.Array) -> Any:
        def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
            outputs, _ = layer.stateless_call([kernel, *[v.value for v in layer.trainable_variables[1:]]], [], x)
            return jnp.sum(outputs * cotangent)

        return jax.grad(loss, (0, 1))(kernel, x)

    for expected, actual in zip(jax.jit(gradients)(kernel, x), jax.jit(fast_sums(gradients))(kernel, x), strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    before, after = contractions(gradients, kernel, x), contractions(fast_sums(gradients), kernel, x)
    assert (before == after) == (name in UNCHANGED)
    assert len(before) == len(after)


@pytest.mark.slow
def test_a_learner_with_fast_sums_learns_the_same() -> None:
    def train(transform: Any) -> Any:
        keras.utils.set_random_seed(0)
        stack = [
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(8, 3),
            layers.Flatten(),
            layers.Dense(3),
        ]
        learner = research.supervised(
            keras.Sequential([keras.Input((14, 14, 1)), *stack, layers.Dense(3)]),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            optimizer=keras.optimizers.SGD(0.1),
        )
        learner = learner._replace(train=transform(learner.train))
        return research.train(learner, research.from_arrays(x, y, batch_size=16), epochs=3)

    x, y = RNG.normal(size=(64, 14, 14, 1)).astype("float32"), RNG.integers(0, 3, 64).astype("int32")
    (exact, exact_logs), (fast, fast_logs) = train(lambda step: step), train(fast_sums)
    assert exact_logs["loss"] == pytest.approx(fast_logs["loss"], rel=1e-5)
    for expected, actual in zip(exact.trainable, fast.trainable, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

"""Rewritten programs give the same bits on the CPU: max-pooling and random bits, in the forward and the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from keras import layers

import research
from research.cpu.rewrite import rewrite
from research.transforms.jaxpr import equations

RNG = np.random.default_rng(0)
REWRITTEN = {
    "1d": (layers.MaxPooling1D, (3, 9, 2), {"pool_size": 2}),
    "2d": (layers.MaxPooling2D, (3, 8, 6, 2), {"pool_size": 2}),
    "2d with a remainder": (layers.MaxPooling2D, (3, 7, 11, 2), {"pool_size": (3, 2)}),
    "2d same without padding": (layers.MaxPooling2D, (3, 8, 6, 2), {"pool_size": 2, "padding": "same"}),
    "3d": (layers.MaxPooling3D, (2, 4, 5, 6, 2), {"pool_size": 2}),
    "large windows": (layers.MaxPooling2D, (1, 24, 24, 1), {"pool_size": 12}),
}
UNCHANGED = {
    "2d same with padding": (layers.MaxPooling2D, (3, 7, 7, 2), {"pool_size": 2, "padding": "same"}),
    "2d overlapping": (layers.MaxPooling2D, (3, 8, 8, 2), {"pool_size": 3, "strides": 2}),
    "2d with gaps": (layers.MaxPooling2D, (3, 9, 9, 2), {"pool_size": 2, "strides": 3}),
    "average": (layers.AveragePooling2D, (3, 8, 8, 2), {"pool_size": 2}),
}
MAX_POOLING = {"reduce_window_max", "select_and_scatter_add"}
RANDOM_BITS = {"random_bits", "random_split", "random_fold_in"}


def inputs(shape: tuple[int, ...], distribution: str) -> np.ndarray:
    x = RNG.normal(size=shape).astype("float32")
    return {
        "distinct": x,
        "ties": np.round(x),
        "mostly zero": np.maximum(x, 0) * (x > 1),
        "infinite": np.where(x > 0, np.inf, -np.inf),
    }[distribution].astype("float32")


def primitives(function: Any, *args: Any) -> set[str]:
    return {equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)}


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", slow_after_first(["float32", "bfloat16"]))
@pytest.mark.parametrize("distribution", slow_after_first(["ties", "distinct", "mostly zero", "infinite"]))
@pytest.mark.parametrize("name", [*REWRITTEN, *UNCHANGED])
def test_pooling_gives_the_same_bits_in_the_forward_and_the_backward_pass(name: str, distribution: str, dtype: str) -> None:
    layer, shape, options = {**REWRITTEN, **UNCHANGED}[name]
    pool, x = layer(**options, dtype=dtype), jnp.asarray(inputs(shape, distribution), dtype)
    cotangent = jnp.asarray(RNG.normal(size=pool(x).shape), dtype)

    def forward_and_backward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled, vjp = jax.vjp(pool, x)
        return pooled, vjp(cotangent)[0]

    rewritten = rewrite(forward_and_backward)
    for expected, actual in zip(jax.jit(forward_and_backward)(x), jax.jit(rewritten)(x), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(actual, "float32"), np.asarray(expected, "float32"))
    assert bool(MAX_POOLING & primitives(rewritten, x)) == (name in UNCHANGED and name != "average")


@pytest.mark.parametrize("name", ["2d", "2d with a remainder", "1d"])
def test_sums_over_pooled_values_and_over_their_gradients_are_the_same_bits(name: str) -> None:
    layer, shape, options = REWRITTEN[name]
    pool, x = layer(**options), jnp.asarray(RNG.normal(size=(16, *shape[1:])), "float32")
    weights = jnp.asarray(RNG.normal(size=pool(x).shape), "float32")

    def sums(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        pooled, vjp = jax.vjp(lambda bias: pool(x + bias), bias)
        axes = tuple(range(pooled.ndim - 1))
        return pooled.sum(axes), (pooled**2).mean(axes), vjp(weights * pooled)[0]

    args = x, jnp.zeros(x.shape[-1])
    for expected, actual in zip(jax.jit(sums)(*args), jax.jit(rewrite(sums))(*args), strict=True):
        np.testing.assert_array_equal(actual, expected)


def convnet() -> keras.Model:
    keras.utils.set_random_seed(0)
    inner = keras.Sequential([layers.Conv2D(4, 3, activation="relu"), layers.MaxPooling2D()])
    return keras.Sequential(
        [
            keras.Input((14, 14, 1)),
            inner,
            layers.Dropout(0.2),
            layers.Conv2D(4, 3),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


X, Y = RNG.normal(size=(40, 14, 14, 1)).astype("float32"), RNG.integers(0, 3, 40)


def weights_and_history(fit: Any) -> tuple[list[np.ndarray], Any]:
    model = convnet()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = fit(model, X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0, validation_data=(X, Y)).history
    return [np.array(v) for v in model.variables], history


@pytest.mark.slow
def test_a_convolutional_network_trains_to_the_bits_of_keras_fit_without_xla_max_pooling() -> None:
    keras_weights, keras_history = weights_and_history(keras.Model.fit)
    weights, history = weights_and_history(research.fit)
    assert history == keras_history
    learner = research.supervised(
        convnet(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="adam", metrics=["accuracy"]
    )
    data = research.from_arrays(X, Y.astype("int32"), batch_size=8, shuffle=False)
    state, _ = research.train(learner, data, epochs=2)
    for expected, actual in zip(keras_weights, weights, strict=True):
        np.testing.assert_array_equal(actual, expected)
    model = convnet()
    research.write_back(state, model)
    for expected, trained in zip(keras_weights, model.variables, strict=True):
        np.testing.assert_array_equal(trained, expected)
    batch = data.batch(0)
    assert "select_and_scatter_add" in primitives(learner.train, state, batch)
    assert not MAX_POOLING & primitives(rewrite(learner.train), state, batch)


def test_an_eager_function_is_called_as_it_is() -> None:
    traced: list[bool] = []

    def pool(x: jax.Array) -> jax.Array:
        traced.append(isinstance(x, jax.core.Tracer))
        return layers.MaxPooling1D(2)(x)

    with jax.disable_jit():
        rewrite(pool)(jnp.ones((1, 4, 1)))
    rewrite(pool)(jnp.ones((1, 4, 1)))
    assert traced == [False, True]


DRAWS = {
    "bits": lambda key: [jax.random.bits(key, (3, 5), dtype) for dtype in (jnp.uint8, jnp.uint16, jnp.uint32)],
    "empty": lambda key: jax.random.bits(key, (0, 4)),
    "normal": lambda key: jax.random.normal(key, (7,)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (33, 17)),
    "permutation": lambda key: jax.random.permutation(key, 11),
    "split": lambda key: jax.random.split(key, (2, 3)),
    "fold_in": lambda key: jax.random.fold_in(key, 7),
    "vmap over keys": lambda key: jax.vmap(
        lambda key: (jax.random.uniform(key, (3, 5)), jax.random.split(key, (3, 2)), jax.random.fold_in(key, 7))
    )(jax.random.split(key, 4)),
    "vmap over data": lambda key: jax.vmap(lambda data: jax.random.fold_in(key, data))(jnp.arange(4)),
    "vmap over both": lambda key: jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        jax.random.split(key, 4), jnp.arange(3)
    ),
}


@pytest.mark.sample(5)
@pytest.mark.slow
@pytest.mark.parametrize("partitionable", slow_after_first([True, False]))
@pytest.mark.parametrize("typed", slow_after_first([True, False]))
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_same_bits(name: str, typed: bool, partitionable: bool) -> None:
    def draw(words: jax.Array) -> Any:
        results = DRAWS[name](jax.random.wrap_key_data(words) if typed else words)
        return [
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            for leaf in jax.tree.leaves(results)
        ]

    for words in (jnp.array([0, 0], jnp.uint32), jnp.array([0xFFFFFFFF, 12345], jnp.uint32)):
        with jax.threefry_partitionable(partitionable):
            expected, actual = jax.jit(draw)(words), jax.jit(rewrite(draw))(words)
            remaining = RANDOM_BITS & primitives(rewrite(draw), words)
        for a, b in zip(expected, actual, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert bool(remaining) == (not partitionable)


def test_random_numbers_of_other_ciphers_stay_unchanged() -> None:
    def draw(words: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(words, impl="rbg"), (5,))

    words = jnp.arange(4, dtype=jnp.uint32)
    np.testing.assert_array_equal(jax.jit(draw)(words), jax.jit(rewrite(draw))(words))


@pytest.mark.slow
def test_dropout_and_noise_train_to_the_same_bits() -> None:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        stack = [keras.Input((6,)), layers.GaussianNoise(0.1), layers.Dense(64, "relu"), layers.Dropout(0.4), layers.Dense(3)]
        return research.supervised(
            keras.Sequential(stack), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="adam"
        )

    learner = build()
    batch = research.Batch(RNG.normal(size=(64, 6)).astype("float32"), RNG.integers(0, 3, 64).astype("int32"))
    states = [learner.init(), build().init()]
    steps = [jax.jit(learner.train), jax.jit(rewrite(learner.train))]
    assert "random_bits" in primitives(learner.train, states[0], batch)
    assert "random_bits" not in primitives(rewrite(learner.train), states[1], batch)
    for _ in range(10):
        states = [step(state, batch)[0] for step, state in zip(steps, states, strict=True)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)

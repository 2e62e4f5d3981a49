"""What is computed otherwise on the CPU, pooling and random bits, gives the same bits, wherever and of whatever."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import first_quick
from keras import layers

import research
from research.kernels import rewritten
from research.transforms import equations

RNG = np.random.default_rng(0)
POOLINGS = {
    "1d": (layers.MaxPooling1D, (3, 9, 2), {"pool_size": 2}),
    "2d": (layers.MaxPooling2D, (3, 8, 6, 2), {"pool_size": 2}),
    "2d with a rest": (layers.MaxPooling2D, (3, 7, 11, 2), {"pool_size": (3, 2)}),
    "2d same without padding": (layers.MaxPooling2D, (3, 8, 6, 2), {"pool_size": 2, "padding": "same"}),
    "3d": (layers.MaxPooling3D, (2, 4, 5, 6, 2), {"pool_size": 2}),
    "large windows": (layers.MaxPooling2D, (1, 24, 24, 1), {"pool_size": 12}),
}
OTHERS = {
    "2d same with padding": (layers.MaxPooling2D, (3, 7, 7, 2), {"pool_size": 2, "padding": "same"}),
    "2d overlapping": (layers.MaxPooling2D, (3, 8, 8, 2), {"pool_size": 3, "strides": 2}),
    "2d with gaps": (layers.MaxPooling2D, (3, 9, 9, 2), {"pool_size": 2, "strides": 3}),
    "average": (layers.AveragePooling2D, (3, 8, 8, 2), {"pool_size": 2}),
}


def values(shape: tuple[int, ...], kind: str) -> np.ndarray:
    x = RNG.normal(size=shape).astype("float32")
    return {
        "distinct": x,
        "ties": np.round(x),
        "mostly zero": np.maximum(x, 0) * (x > 1),
        "infinite": np.where(x > 0, np.inf, -np.inf),
    }[kind].astype("float32")


def primitives(function: Any, *args: Any) -> set[str]:
    return {equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)}


@pytest.mark.parametrize("dtype", first_quick(["float32", "bfloat16"]))
@pytest.mark.parametrize("kind", first_quick(["ties", "distinct", "mostly zero", "infinite"]))
@pytest.mark.parametrize("name", [*POOLINGS, *OTHERS])
def test_values_and_gradients_are_the_same_bits(name: str, kind: str, dtype: str) -> None:
    layer, shape, options = {**POOLINGS, **OTHERS}[name]
    pool, x = layer(**options, dtype=dtype), jnp.asarray(values(shape, kind), dtype)
    weights = jnp.asarray(RNG.normal(size=pool(x).shape), dtype)

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled, back = jax.vjp(pool, x)
        return pooled, back(weights)[0]

    for wanted, found in zip(jax.jit(both)(x), jax.jit(rewritten(both))(x), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(found, "float32"), np.asarray(wanted, "float32"))
    replaced = {"reduce_window_max", "select_and_scatter_add"} & primitives(rewritten(both), x)
    assert bool(replaced) == (name in OTHERS and name != "average")


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


def fitted(fit: Any) -> tuple[list[np.ndarray], Any, np.ndarray]:
    model = convnet()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = fit(model, X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0, validation_data=(X, Y)).history
    return [np.array(v) for v in model.variables], history, model.predict(X, verbose=0)


@pytest.mark.slow
def test_a_convolutional_network_trains_to_the_bits_of_keras_fit_without_walking_windows() -> None:
    weights, history, _ = fitted(keras.Model.fit)
    ours, logs, _ = fitted(research.fit)
    assert logs == history
    learner = research.supervised(
        convnet(), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="adam", metrics=["accuracy"]
    )
    held = research.arrays(X, Y.astype("int32"), batch_size=8, shuffle=False)
    state, _ = research.train(learner, held, epochs=2)
    for wanted, found in zip(weights, ours, strict=True):
        np.testing.assert_array_equal(found, wanted)
    model = convnet()
    research.write_back(state, model)
    for wanted, trained in zip(weights, model.variables, strict=True):
        np.testing.assert_array_equal(trained, wanted)
    batch = held.batch(0)
    assert "select_and_scatter_add" in primitives(learner.train, state, batch)
    assert not {"reduce_window_max", "select_and_scatter_add"} & primitives(rewritten(learner.train), state, batch)


def test_what_is_not_compiled_is_left_alone() -> None:
    seen: list[bool] = []

    def noticed(x: jax.Array) -> jax.Array:
        seen.append(isinstance(x, jax.core.Tracer))
        return layers.MaxPooling1D(2)(x)

    with jax.disable_jit():
        rewritten(noticed)(jnp.ones((1, 4, 1)))
    rewritten(noticed)(jnp.ones((1, 4, 1)))
    assert seen == [False, True]


DRAWS = {
    "bits": lambda key: [jax.random.bits(key, (3, 5), dtype) for dtype in (jnp.uint8, jnp.uint16, jnp.uint32)],
    "no numbers": lambda key: jax.random.bits(key, (0, 4)),
    "normal": lambda key: jax.random.normal(key, (7,)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (33, 17)),
    "permutation": lambda key: jax.random.permutation(key, 11),
    "split": lambda key: jax.random.split(key, (2, 3)),
    "fold_in": lambda key: jax.random.fold_in(key, 7),
    "a key for each": lambda key: jax.vmap(lambda one: jax.random.uniform(one, (3,)))(jax.random.split(key, 4)),
}


@pytest.mark.parametrize("partitionable", first_quick([True, False]))
@pytest.mark.parametrize("typed", first_quick([True, False]))
@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_same_bits(name: str, typed: bool, partitionable: bool) -> None:
    def drawn(words: jax.Array) -> Any:
        made = DRAWS[name](jax.random.wrap_key_data(words) if typed else words)
        return [
            jax.random.key_data(each) if jnp.issubdtype(each.dtype, jax.dtypes.prng_key) else each
            for each in jax.tree.leaves(made)
        ]

    for words in (jnp.array([0, 0], jnp.uint32), jnp.array([0xFFFFFFFF, 12345], jnp.uint32)):
        with jax.threefry_partitionable(partitionable):
            wanted, found = jax.jit(drawn)(words), jax.jit(rewritten(drawn))(words)
            left = {"random_bits", "random_split", "random_fold_in"} & primitives(rewritten(drawn), words)
        for a, b in zip(wanted, found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        assert bool(left) == (name == "a key for each" or not partitionable)  # only what is drawn from one key is spelled out


def test_other_ciphers_are_left_alone() -> None:
    def drawn(words: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(words, impl="rbg"), (5,))

    words = jnp.arange(4, dtype=jnp.uint32)
    np.testing.assert_array_equal(jax.jit(drawn)(words), jax.jit(rewritten(drawn))(words))


@pytest.mark.slow
def test_dropout_and_noise_train_to_the_same_bits() -> None:
    def made() -> Any:
        keras.utils.set_random_seed(0)
        parts = [keras.Input((6,)), layers.GaussianNoise(0.1), layers.Dense(64, "relu"), layers.Dropout(0.4), layers.Dense(3)]
        return research.supervised(
            keras.Sequential(parts), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), optimizer="adam"
        )

    x, held = RNG.normal(size=(64, 6)).astype("float32"), made()
    batch = research.Batch(x, RNG.integers(0, 3, 64).astype("int32"))
    states = [held.init(), made().init()]
    programs = [jax.jit(held.train), jax.jit(rewritten(held.train))]
    assert "random_bits" in primitives(held.train, states[0], batch)
    assert "random_bits" not in primitives(rewritten(held.train), states[1], batch)
    for _ in range(10):
        states = [program(state, batch)[0] for program, state in zip(programs, states, strict=True)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)

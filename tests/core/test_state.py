"""States from shapes alone and directly on their devices, names of leaves, and values written back to Keras."""

import resource
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import CASES
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from keras import layers

import research


def build(width: int = 16, optimizer: Any = "adam") -> research.Learner:
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(width, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            layers.Dense(8),
        ]
    )
    return research.supervised(model, loss="mse", optimizer=optimizer, metrics=["mae"])


def test_init_abstract_makes_no_array() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner, shapes = research.init_abstract(lambda: build(500_000_000))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert research.count_parameters(shapes) == 500_000_000 * (8 + 1 + 2 + 8) + 8
    assert grown < 200_000  # kibibytes; the weights and slots alone would be 114 GB
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.structure(learner.names) == jax.tree.structure(shapes)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("optax", marks=[pytest.mark.promotes, pytest.mark.slow])])
def test_a_learner_built_from_shapes_trains_a_state_of_these_shapes(optimizer: str) -> None:
    def make() -> research.Learner:
        return build(optimizer=optax.adam(1e-3) if optimizer == "optax" else optimizer)

    learner, shapes = research.init_abstract(make)
    state = make().init()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    batch = research.Batch(np.ones((4, 8), "float32"), np.ones((4, 8), "float32"))
    result, expected = (jax.jit(each.train)(state, batch) for each in (learner, make()))
    jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.slow
def test_a_sharded_state_is_created_in_parts_on_eight_devices() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def layout(shapes: Any) -> Any:
        def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            split = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
            return NamedSharding(mesh, P("data") if split else P())

        return jax.tree.map(place, shapes)

    learner, state = research.init_sharded(build, layout)
    kernel = state.trainable[0]
    assert kernel.sharding == NamedSharding(mesh, P("data"))
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 16)}
    assert len(kernel.sharding.device_set) == 8
    unsharded = build().init()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, unsharded)
    batch = research.Batch(np.ones((16, 8), "float32"), np.ones((16, 8), "float32"))
    (trained, _), (expected, _) = jax.jit(learner.train)(state, batch), jax.jit(build().train)(unsharded, batch)
    for a, b in zip(trained.non_trainable, expected.non_trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_creating_a_sharded_state_takes_the_memory_of_one_part_per_device() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "data"))

    def make() -> research.Learner:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), layers.Dense(80_000, use_bias=False)])
        return research.supervised(model, loss="mse", optimizer="sgd")

    _, shapes = research.init_abstract(make)
    layout = jax.tree.map(lambda leaf: sharding if leaf.ndim == 2 else NamedSharding(mesh, P()), shapes)
    memory = jax.jit(lambda: make().init(), out_shardings=layout).lower().compile().memory_analysis()
    size = 8 * 80_000 * 4  # bytes of the kernel on all devices
    assert memory.output_size_in_bytes < size / 8 * 1.1
    assert memory.temp_size_in_bytes < size / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_names_are_unique_shaped_like_the_state_and_equal_for_every_copy(name: str) -> None:
    def names() -> Any:
        case = CASES[name]
        example = research.Batch(*case.batch(np.random.default_rng(0)))
        learner = research.supervised(case.model(), example=example, **case.compile_args())
        assert jax.tree.structure(learner.names) == jax.tree.structure(learner.init())
        return learner.names

    first, second = names(), names()
    assert first == second
    for part in (first.trainable, first.non_trainable, first.optimizer):
        assert len(set(jax.tree.leaves(part))) == len(jax.tree.leaves(part))


def test_optax_slots_are_named_after_their_weights() -> None:
    labels = ["fast", "slow"] * 3
    for transformation, expected in [
        (optax.adam(1e-3), "0/mu/sequential/dense/kernel"),
        (optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), "inner_state/0/mu/sequential/dense/kernel"),
        (optax.chain(optax.clip(1.0), optax.masked(optax.trace(0.9), [True] * 6)), "1/inner_state/trace/sequential/dense/kernel"),
        (
            optax.multi_transform({"fast": optax.adam(1e-2), "slow": optax.sgd(1e-3)}, labels),
            "inner_states/fast/inner_state/0/mu/",
        ),
        (optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(), "acc_grads/sequential/dense/kernel"),
    ]:
        learner = build(optimizer=transformation)
        assert jax.tree.structure(learner.names) == jax.tree.structure(learner.init())
        names = jax.tree.leaves(learner.names.optimizer)
        assert any(expected in name for name in names), names
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_names_do_not_depend_on_models_built_before() -> None:
    code = "import sys; sys.path[:0] = ['tests', 'tests/core']; from test_state import build; {}print(build().names)"
    runs = [
        subprocess.run([sys.executable, "-c", code.format(extra)], capture_output=True, text=True, check=True).stdout
        for extra in ("", "build(); ")
    ]
    assert runs[0] == runs[1]
    assert "sequential/dense_1/kernel" in runs[0]


@pytest.mark.slow
def test_write_back_refuses_the_state_of_another_model() -> None:
    with pytest.raises(research.InvalidArgument, match="does not fit"):
        research.write_back(build(8).init(), keras.Sequential([keras.Input((8,)), layers.Dense(4)]))


@pytest.mark.slow
def test_write_back_assigns_metrics_of_a_compiled_model() -> None:
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_initializer="zeros")])
    model.compile(loss="mae", metrics=["mse"])
    learner = research.from_keras(model)
    state, _ = learner.train(learner.init(), research.Batch(jnp.ones((2, 1)), jnp.full((2, 1), 3.0)))
    research.write_back(state, model, model.optimizer)
    assert {name: float(value) for name, value in model.get_metrics_result().items()} == {"loss": 3.0, "mse": 9.0}


@pytest.mark.slow
def test_constants_of_a_functional_model_are_usable_after_building_from_shapes() -> None:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(4)(inputs) * keras.ops.sqrt(keras.ops.arange(4.0))
        return research.supervised(keras.Model(inputs, outputs), loss="mse", optimizer="sgd")

    expected = build()
    batch = research.Batch(jnp.ones((8, 4)), jnp.zeros((8, 4)))
    expected_state, expected_logs = jax.jit(expected.train)(expected.init(), batch)
    learner, shapes = research.init_abstract(build)
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, expected.init())
    state, logs = jax.jit(learner.train)(learner.init(), batch)
    np.testing.assert_array_equal(state.trainable[0], expected_state.trainable[0])
    assert float(logs["loss"]) == float(expected_logs["loss"])
    sharded, start = research.init_sharded(build, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(jax.jit(sharded.train)(start, batch)[0].trainable[0], expected_state.trainable[0])
    np.testing.assert_array_equal(jax.jit(sharded.predict)(state, batch), jax.jit(expected.predict)(expected_state, batch))

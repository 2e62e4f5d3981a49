"""States are born from shapes alone, where they are to live, and leaves are named by their place in the model."""

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


def test_abstract_makes_no_array() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner, shapes = research.abstract(lambda: build(500_000_000))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert research.parameters(shapes) == 500_000_000 * (8 + 1 + 2 + 8) + 8
    assert grown < 200_000  # kibibytes; the weights and slots alone would be 114 GB
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert jax.tree.structure(learner.names) == jax.tree.structure(shapes)


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("optax", marks=[pytest.mark.promotes, pytest.mark.slow])])
def test_an_abstract_learner_steps_on_a_state_of_its_shapes(optimizer: str) -> None:
    def make() -> research.Learner:
        return build(optimizer=optax.adam(1e-3) if optimizer == "optax" else optimizer)

    learner, shapes = research.abstract(make)
    state = make().init()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    batch = research.Batch(np.ones((4, 8), "float32"), np.ones((4, 8), "float32"))
    found, logs = jax.jit(learner.train)(state, batch)
    expected, wanted = jax.jit(make().train)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (found, logs), (expected, wanted))


@pytest.mark.slow
def test_a_state_is_born_in_parts_on_eight_devices() -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def layout(shapes: Any) -> Any:
        def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            split = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
            return NamedSharding(mesh, P("data") if split else P())

        return jax.tree.map(place, shapes)

    learner, state = research.born(build, layout)
    kernel = state.trainable[0]
    assert kernel.sharding == NamedSharding(mesh, P("data"))
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 16)}
    assert len(kernel.sharding.device_set) == 8
    whole = build().init()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, whole)
    batch = research.Batch(np.ones((16, 8), "float32"), np.ones((16, 8), "float32"))
    stepped, _ = jax.jit(learner.train)(state, batch)
    wanted, _ = jax.jit(build().train)(whole, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), stepped.non_trainable, wanted.non_trainable)


def test_the_largest_array_of_a_birth_is_a_part() -> None:
    """The compiled birth makes each device's share alone: its memory per device is the state's, divided by the devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "data"))

    def make() -> research.Learner:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), layers.Dense(80_000, use_bias=False)])
        return research.supervised(model, loss="mse", optimizer="sgd")

    _, shapes = research.abstract(make)
    layout = jax.tree.map(lambda leaf: sharding if leaf.ndim == 2 else NamedSharding(mesh, P()), shapes)
    memory = jax.jit(lambda: make().init(), out_shardings=layout).lower().compile().memory_analysis()
    whole = 8 * 80_000 * 4
    assert memory.output_size_in_bytes < whole / 8 * 1.1
    assert memory.temp_size_in_bytes < whole / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_names_are_unique_shaped_like_the_state_and_the_same_for_every_copy(name: str) -> None:
    def names() -> Any:
        case = CASES[name]
        example = research.Batch(*case.batch(np.random.default_rng(0)))
        learner = research.supervised(case.model(), example=example, **case.compiled())
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
        found = jax.tree.leaves(learner.names.optimizer)
        assert any(expected in name for name in found), found
        assert len(set(found)) == len(found)


@pytest.mark.slow
def test_names_do_not_depend_on_what_was_built_before() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); from test_state import build; {}print(build().names)"
    runs = [
        subprocess.run([sys.executable, "-c", code.format(extra)], capture_output=True, text=True, check=True).stdout
        for extra in ("", "build(); ")
    ]
    assert runs[0] == runs[1]
    assert "sequential/dense_1/kernel" in runs[0]


def test_write_back_refuses_another_models_state() -> None:
    with pytest.raises(research.Refused, match="does not fit"):
        research.write_back(build(8).init(), keras.Sequential([keras.Input((8,)), layers.Dense(4)]))


@pytest.mark.slow
def test_write_back_gives_metrics_to_a_compiled_model() -> None:
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, kernel_initializer="zeros")])
    model.compile(loss="mae", metrics=["mse"])
    learner = research.from_keras(model)
    state, _ = learner.train(learner.init(), research.Batch(jnp.ones((2, 1)), jnp.full((2, 1), 3.0)))
    research.write_back(state, model, model.optimizer)
    assert {name: float(value) for name, value in model.get_metrics_result().items()} == {"loss": 3.0, "mse": 9.0}


def test_constants_of_a_functional_model_survive_being_built_from_shapes() -> None:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        x = given = keras.Input((4,))
        x = keras.layers.Dense(4)(x) * keras.ops.sqrt(keras.ops.arange(4.0))
        return research.supervised(keras.Model(given, x), loss="mse", optimizer="sgd")

    whole = build()
    batch = research.Batch(jnp.ones((8, 4)), jnp.zeros((8, 4)))
    state, logs = jax.jit(whole.train)(whole.init(), batch)
    learner, shapes = research.abstract(build)
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, whole.init())
    found, again = jax.jit(learner.train)(learner.init(), batch)
    np.testing.assert_array_equal(found.trainable[0], state.trainable[0])
    assert float(again["loss"]) == float(logs["loss"])
    born, start = research.born(build, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(jax.jit(born.train)(start, batch)[0].trainable[0], state.trainable[0])
    np.testing.assert_array_equal(jax.jit(born.predict)(found, batch), jax.jit(whole.predict)(state, batch))

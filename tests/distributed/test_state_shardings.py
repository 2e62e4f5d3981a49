"""Optimizer slots and copies of weights lie as their weights do, whatever their names: they are matched by structure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import slow_after_first
from jax.sharding import PartitionSpec as P
from keras import layers

import research
from research import InvalidArgument, State, distributed
from research.distributed import layouts
from research.distributed.placement import replicated_leaves, state_shardings

KERAS_OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "Adam": keras.optimizers.Adam,
    "AdamW": keras.optimizers.AdamW,
    "Adam with amsgrad": lambda: keras.optimizers.Adam(amsgrad=True),
    "Muon": keras.optimizers.Muon,
    "Adafactor": keras.optimizers.Adafactor,
    "Lion": keras.optimizers.Lion,
    "SGD": keras.optimizers.SGD,
    "SGD with momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "RMSprop": keras.optimizers.RMSprop,
    "RMSprop with everything": lambda: keras.optimizers.RMSprop(momentum=0.9, centered=True),
    "LossScaleOptimizer": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    "use_ema": lambda: keras.optimizers.Adam(use_ema=True),
    "gradient accumulation": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2),
    "use_ema and gradient accumulation": lambda: keras.optimizers.Nadam(use_ema=True, gradient_accumulation_steps=2),
}
OPTAX_OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "masked": lambda: optax.masked(optax.adam(1e-3), lambda weights: [weight.ndim > 1 for weight in weights]),
    "multi_transform": lambda: optax.multi_transform(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2, momentum=0.9)},
        lambda weights: ["adam" if weight.ndim > 1 else "sgd" for weight in weights],
    ),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
}


def two_square_kernels(**options: Any) -> keras.Model:
    """Under `tensor` the kernel of `up` is split by its outputs, that of `attention_output`, of the same shape, by its inputs."""
    stack = [layers.Dense(64, name="up", **options), layers.Dense(64, name="attention_output", **options), layers.Dense(8)]
    return keras.Sequential([keras.Input((64,)), *stack])


def supervised(optimizer: Any, **options: Any) -> research.Learner:
    return research.supervised(two_square_kernels(**options), loss="mse", optimizer=optimizer)


def meaningless(names: Any) -> Any:
    """Names that say nothing, some of them equal."""
    leaves, structure = jax.tree.flatten(names)
    return jax.tree.unflatten(structure, [f"leaf{i % 3}" for i in range(len(leaves))])


def shardings_of(learner: research.Learner, names: Any, mesh: jax.sharding.Mesh, layout: Any) -> Any:
    return state_shardings(names, jax.eval_shape(learner.init), mesh, layout)


def weight_specs(learner: research.Learner, mesh: jax.sharding.Mesh) -> list[P]:
    return [weight.spec for weight in shardings_of(learner, learner.names, mesh, layouts.tensor).trainable]


def share_of_first_device(state: Any) -> float:
    leaves = jax.tree.leaves(state)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("optimizer", slow_after_first(KERAS_OPTIMIZERS))
def test_each_slot_of_a_keras_optimizer_lies_as_its_weight(optimizer: str) -> None:
    learner = supervised(KERAS_OPTIMIZERS[optimizer]())
    mesh = distributed.mesh(fsdp=4, tensor=2)
    specs = dict(zip(learner.names.trainable, weight_specs(learner, mesh), strict=True))
    assert specs["sequential/up/kernel"] == P("fsdp", "tensor")
    assert specs["sequential/attention_output/kernel"] == P("tensor", "fsdp")
    for names in (learner.names, learner.names._replace(optimizer=meaningless(learner.names.optimizer))):
        for name, slot in zip(learner.names.optimizer, shardings_of(learner, names, mesh, layouts.tensor).optimizer, strict=True):
            assert slot.spec == specs.get(name.partition("/")[2], P()), name


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop with everything", "use_ema", "Muon"])
def test_without_biases_between_equal_kernels_the_names_decide(optimizer: str) -> None:
    learner = supervised(KERAS_OPTIMIZERS[optimizer](), use_bias=False)
    mesh = distributed.mesh(fsdp=4, tensor=2)
    specs = dict(zip(learner.names.trainable, weight_specs(learner, mesh), strict=True))
    slots = shardings_of(learner, learner.names, mesh, layouts.tensor).optimizer
    for name, slot in zip(learner.names.optimizer, slots, strict=True):
        assert slot.spec == specs.get(name.partition("/")[2], P()), name


@pytest.mark.parametrize("optimizer", slow_after_first(OPTAX_OPTIMIZERS))
def test_each_slot_of_an_optax_transformation_lies_as_its_weight(optimizer: str) -> None:
    learner = supervised(OPTAX_OPTIMIZERS[optimizer]())
    mesh = distributed.mesh(fsdp=4, tensor=2)
    shapes = jax.eval_shape(learner.init)
    weights = [(leaf.shape, spec) for leaf, spec in zip(shapes.trainable, weight_specs(learner, mesh), strict=True)]
    for names in (learner.names, learner.names._replace(optimizer=meaningless(learner.names.optimizer))):
        shardings = jax.tree.leaves(shardings_of(learner, names, mesh, layouts.tensor).optimizer)
        matched = 0
        for (path, leaf), slot in zip(jax.tree_util.tree_leaves_with_path(shapes.optimizer), shardings, strict=True):
            shape, spec = weights[path[-1].idx] if isinstance(path[-1], jax.tree_util.SequenceKey) else ((), P())
            assert slot.spec == (spec if leaf.shape == shape else P()), path
            matched += leaf.shape == shape != ()
        assert matched >= 2


@pytest.mark.parametrize("optimizer", slow_after_first([*KERAS_OPTIMIZERS, *OPTAX_OPTIMIZERS]))
def test_names_decide_nothing_under_fsdp(optimizer: str) -> None:
    learner = supervised((KERAS_OPTIMIZERS | OPTAX_OPTIMIZERS)[optimizer]())
    mesh = distributed.mesh(fsdp=8)
    named, nameless = (shardings_of(learner, names, mesh, layouts.fsdp) for names in (learner.names, meaningless(learner.names)))
    assert jax.tree.leaves(named) == jax.tree.leaves(nameless)
    assert named.trainable[0].spec != P()


def test_slots_of_several_states_lie_as_the_weights_of_their_own_state() -> None:
    learners = {"first": supervised("adam"), "second": supervised(keras.optimizers.SGD(0.1, momentum=0.9))}
    names = {name: learner.names for name, learner in learners.items()}
    shapes = {name: jax.eval_shape(learner.init) for name, learner in learners.items()}
    rule = layouts.rules((r"^first/.*kernel$", P("fsdp")), (r"^second/.*kernel$", P(None, "fsdp")))
    shardings = state_shardings(names, shapes, distributed.mesh(fsdp=8), rule)
    for name, spec in (("first", P("fsdp")), ("second", P(None, "fsdp"))):
        for leaf, slot in zip(shapes[name].optimizer, shardings[name].optimizer, strict=True):
            assert slot.spec == (spec if leaf.ndim > 1 else P())


class Average(NamedTuple):
    """A learner's state beside an average of its weights and a target network."""

    training: State
    average: list[Any]
    target: dict[str, Any]
    history: Any


def test_copies_of_the_weights_lie_as_the_weights() -> None:
    learner = supervised("adam")
    shapes = jax.eval_shape(learner.init)
    state = Average(shapes, shapes.trainable, {"weights": shapes.trainable, "steps": shapes.optimizer[0]}, shapes.trainable[:1])
    for names in (jax.tree.map(lambda leaf: "x", state), Average(learner.names, *meaningless(state[1:]))):
        shardings = state_shardings(names, state, distributed.mesh(fsdp=4, tensor=2), layouts.fsdp)
        assert shardings.average == shardings.target["weights"] == shardings.training.trainable
        assert shardings.average[0].spec == P("fsdp", None)
        assert shardings.target["steps"].spec == P()
        assert shardings.history[0].spec == P()  # not a copy: one weight of several


def handwritten(names_of_slots: Callable[[int], str]) -> research.Learner:
    """Logistic regression with a hidden layer in plain JAX and optax, named by hand."""
    optimizer = optax.adam(1e-2)

    def init() -> State:
        keys = jax.random.split(jax.random.key(0))
        weights = {
            "hidden": {"kernel": jax.random.normal(keys[0], (64, 256)) / 8, "bias": jnp.zeros(256)},
            "output": {"kernel": jax.random.normal(keys[1], (256, 8)) / 16, "bias": jnp.zeros(8)},
        }
        return State(weights, [], optimizer.init(weights), {"loss": [jnp.zeros(())]})

    def train(state: State, batch: research.Batch) -> tuple[State, dict[str, Any]]:
        def loss(weights: Any) -> Any:
            hidden = jax.nn.relu(batch.x @ weights["hidden"]["kernel"] + weights["hidden"]["bias"])
            return jnp.mean((hidden @ weights["output"]["kernel"] + weights["output"]["bias"] - batch.y) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.trainable)
        updates, slots = optimizer.update(gradients, state.optimizer, state.trainable)
        weights = optax.apply_updates(state.trainable, updates)
        return State(weights, [], slots, {"loss": [value]}), {"loss": value}

    shapes = jax.eval_shape(init)
    slots, structure = jax.tree.flatten(shapes.optimizer)
    names = State(
        {layer: {part: f"{layer}/{part}" for part in parts} for layer, parts in shapes.trainable.items()},
        [],
        jax.tree.unflatten(structure, [names_of_slots(i) for i in range(len(slots))]),
        {"loss": ["loss"]},
    )
    return research.Learner(init, lambda state: state, train, lambda state, batch: train(state, batch), lambda s, b: b.x, names)


@pytest.mark.slow
@pytest.mark.promotes  # optax
@pytest.mark.parametrize("names_of_slots", [lambda i: f"adam/{i}", lambda i: f"optimizer_slot_{i}", lambda i: "slot"])
def test_moments_of_a_handwritten_optax_learner_are_split(names_of_slots: Callable[[int], str]) -> None:
    learner = handwritten(names_of_slots)
    mesh = distributed.mesh(fsdp=8)
    sharded = distributed.shard(learner, mesh)
    assert share_of_first_device(sharded.init()) < 0.14
    batch = research.Batch(np.ones((16, 64), "float32"), np.ones((16, 8), "float32"))
    state, logs = jax.jit(sharded.train)(sharded.init(), batch)
    expected, expected_logs = jax.jit(learner.train)(learner.init(), batch)
    assert share_of_first_device(state) < 0.14
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], rtol=2e-6)
    np.testing.assert_allclose(state.trainable["hidden"]["kernel"], expected.trainable["hidden"]["kernel"], rtol=1e-4, atol=1e-5)


def plain(learner: research.Learner) -> research.Learner:
    """The same learner over nested dicts instead of a `State`."""

    def to_dict(state: State) -> dict[str, Any]:
        return {"parameters": state.trainable, "adam": state.optimizer, "loss": state.metrics["loss"][0]}

    def from_dict(state: dict[str, Any]) -> State:
        return State(state["parameters"], [], state["adam"], {"loss": [state["loss"]]})

    def train(state: dict[str, Any], batch: research.Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        after, logs = learner.train(from_dict(state), batch)
        return to_dict(after), logs

    names = to_dict(learner.names)
    return research.Learner(lambda: to_dict(learner.init()), lambda s: s, train, train, lambda s, b: b.x, names)


@pytest.mark.slow
@pytest.mark.promotes  # optax
def test_a_learner_over_plain_dicts_is_split() -> None:
    learner = plain(handwritten(lambda i: f"adam/{i}"))
    sharded = distributed.shard(learner, distributed.mesh(fsdp=8))
    assert share_of_first_device(sharded.init()) < 0.14
    batch = research.Batch(np.ones((16, 64), "float32"), np.ones((16, 8), "float32"))
    state, logs = jax.jit(sharded.train)(sharded.init(), batch)
    _, expected = jax.jit(learner.train)(learner.init(), batch)
    assert share_of_first_device(state) < 0.14
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=2e-6)


def test_rules_and_tensor_apply_to_plain_dicts_by_name() -> None:
    learner = plain(handwritten(lambda i: f"adam/{i}"))
    mesh = distributed.mesh(data=4, tensor=2)
    by_rule = shardings_of(learner, learner.names, mesh, layouts.rules((r"^hidden/kernel$", P(None, "tensor"))))
    assert by_rule["parameters"]["hidden"]["kernel"].spec == P(None, "tensor")
    assert by_rule["parameters"]["output"]["kernel"].spec == P()
    by_shape = shardings_of(learner, learner.names, mesh, layouts.tensor)
    assert by_shape["parameters"]["hidden"]["kernel"].spec == P(None, "tensor")
    assert by_shape["parameters"]["output"]["kernel"].spec == P("tensor", None)


def test_weights_of_one_name_in_two_parts_of_a_state_are_two_weights() -> None:
    shape = jax.ShapeDtypeStruct
    state = State([shape((64, 64), "float32")], [shape((32, 100), "float32")], [], {})
    names = State(["dense/kernel"], ["dense/kernel"], [], {})
    shardings = state_shardings(names, state, distributed.mesh(fsdp=8), layouts.fsdp)
    assert (shardings.trainable[0].spec, shardings.non_trainable[0].spec) == (P("fsdp", None), P("fsdp", None))
    rule = layouts.rules((r"dense/kernel$", P("fsdp")))
    assert {leaf.spec for leaf in jax.tree.leaves(state_shardings(names, state, distributed.mesh(fsdp=8), rule))} == {P("fsdp")}


def test_large_leaves_that_stay_replicated_are_listed_largest_first() -> None:
    shape = jax.ShapeDtypeStruct
    state = {
        "odd": shape((1023, 1025), "float32"),
        "odder": shape((1025, 1027), "float32"),
        "even": shape((1024, 1024), "float32"),
    }
    names = {name: f"weights/{name}" for name in state}
    mesh = distributed.mesh(fsdp=8)
    shardings = state_shardings(names, state, mesh, layouts.fsdp)
    expected = [("weights/odder", 1025 * 1027 * 4), ("weights/odd", 1023 * 1025 * 4)]
    assert replicated_leaves(names, state, shardings) == expected
    assert replicated_leaves(names, state, shardings, minimum_bytes=4_200_000) == expected[:1]
    arrays = jax.tree.map(lambda leaf, where: shape(leaf.shape, leaf.dtype, sharding=where), state, shardings)
    assert replicated_leaves(names, arrays) == expected
    unsplit = distributed.mesh(data=8)
    assert replicated_leaves(names, state, state_shardings(names, state, unsplit, layouts.data)) == []


def test_names_and_layouts_that_do_not_fit_the_state_raise() -> None:
    learner = supervised("adam")
    shapes, mesh = jax.eval_shape(learner.init), distributed.mesh(fsdp=8)
    with pytest.raises(InvalidArgument, match="15 names for 22 leaves"):
        state_shardings(learner.names._replace(optimizer=learner.names.optimizer[:7]), shapes, mesh, layouts.fsdp)
    with pytest.raises(InvalidArgument, match="layout: no spec for sequential/up/kernel"):
        state_shardings(learner.names, shapes, mesh, lambda weights, mesh: {})

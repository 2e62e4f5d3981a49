"""Optimizers by the names of weights: each group is trained as by its optimizer alone."""

from typing import Any

import jax
import keras
import numpy as np
import optax
import pytest
from keras import layers

import research
from research.distributed import fsdp, mesh, shard
from research.transforms import by_path

RNG = np.random.default_rng(0)
BATCH = research.Batch(RNG.normal(size=(8, 5)).astype("float32"), RNG.normal(size=(8, 1)).astype("float32"))


def model() -> keras.Model:
    stack = [keras.Input((5,)), layers.Dense(6, "tanh", name="body"), layers.BatchNormalization(name="norm")]
    return keras.Sequential([*stack, layers.Dense(4, "tanh", name="neck"), layers.Dense(1, name="head")], name="net")


def trained(optimizer: Any, steps: int = 3) -> Any:
    keras.utils.set_random_seed(1)
    learner = research.supervised(model(), loss="mse", optimizer=optimizer)
    state = learner.init()
    for _ in range(steps):
        state, _ = jax.jit(learner.train)(state, BATCH)
    return learner, state


@pytest.mark.promotes
@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.Adam(0.01), lambda: optax.adamw(0.01)], ids=["keras", "optax"])
def test_one_rule_for_all_weights_is_that_optimizer_bit_for_bit(optimizer: Any) -> None:
    _, alone = trained(optimizer())
    _, grouped = trained(by_path({"": optimizer()}))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(grouped), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.promotes
def test_groups_have_their_own_optimizers_and_frozen_weights_stay_as_they_are() -> None:
    learner, state = trained(by_path({"body/": None, "head/": optax.sgd(0.5), "bias$": keras.optimizers.SGD(0.0), "": "adam"}))
    start = dict(zip(learner.names.trainable, learner.init().trainable, strict=True))
    after = dict(zip(learner.names.trainable, state.trainable, strict=True))
    unchanged = {name for name in start if (start[name] == after[name]).all()}
    assert unchanged == {"net/body/kernel", "net/body/bias", "net/neck/bias"}
    flat = jax.tree.leaves(learner.names.optimizer)
    assert not any("body" in name for name in flat)
    assert [name for name in flat if "momentum" in name] == [
        "group_2/momentum/net/norm/gamma",
        "group_2/momentum/net/norm/beta",
        "group_2/momentum/net/neck/kernel",
    ]
    assert len(set(jax.tree.leaves(learner.names))) == len(jax.tree.leaves(learner.names))


@pytest.mark.promotes
def test_a_group_moves_as_by_its_optimizer_on_the_same_gradients() -> None:
    _, two = trained(by_path({"head/": keras.optimizers.SGD(0.1), "": keras.optimizers.SGD(0.1)}), steps=4)
    _, one = trained(keras.optimizers.SGD(0.1), steps=4)
    for a, b in zip(two.trainable, one.trainable, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.promotes
def test_an_optimizer_that_evaluates_the_loss_gets_it_for_its_own_weights() -> None:
    def head(optimizer: Any, *, frozen: bool) -> Any:
        keras.utils.set_random_seed(1)
        body = layers.Dense(6, "tanh", name="body", trainable=not frozen)
        net = keras.Sequential([keras.Input((5,)), body, layers.Dense(1, name="head")])
        learner = research.supervised(net, loss="mse", optimizer=optimizer)
        state = learner.init()
        for _ in range(3):
            state, _ = jax.jit(learner.train)(state, BATCH)
        return state.trainable[-2:]

    expected, found = head(optax.lbfgs(), frozen=True), head(by_path({"head/": optax.lbfgs(), "": None}), frozen=False)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_slots_lie_on_a_mesh_as_their_weights_do() -> None:
    stack = [keras.Input((64,)), layers.Dense(128, name="body"), layers.Dense(64, name="head")]
    rules = by_path({"body/": "adam", "": keras.optimizers.SGD(0.1, momentum=0.9)})
    learner = research.supervised(keras.Sequential(stack), loss="mse", optimizer=rules)
    state = shard(learner, mesh(jax.devices()[:2], fsdp=2), fsdp).init()
    for weight, slot in ((state.trainable[0], state.optimizer[0][2]), (state.trainable[2], state.optimizer[1][2])):
        assert slot.shape == weight.shape
        assert slot.sharding == weight.sharding
        assert not slot.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({}, "by_path: there are no rules, expected a dict from regular expressions to optimizers."),
        ({"head/": "sgd"}, "by_path: no rule matches 'net/body/kernel'; add a last rule \"\" for all that is left."),
        (
            {"hed/": "sgd", "": "adam"},
            "by_path: 'hed/' matches no weight that an earlier rule leaves; the weights are net/body/kernel, net/body/bias, "
            "net/norm/gamma ...",
        ),
        ({"": None}, "by_path: the rules freeze all weights, expected an optimizer for some."),
        ({"(": "sgd"}, "by_path: '(' is no regular expression (missing ), unterminated subpattern at position 0)."),
        (
            {"": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())},
            "by_path: an optimizer scales the loss, which belongs to all weights; expected one without a scale.",
        ),
    ],
    ids=["none", "incomplete", "unmatched", "all frozen", "no pattern", "loss scale"],
)
def test_rules_that_cannot_work_raise_one_line(rules: Any, message: str) -> None:
    with pytest.raises(research.InvalidArgument) as error:
        research.supervised(model(), loss="mse", optimizer=by_path(rules))
    assert str(error.value) == message

"""Each trap is found by its name in a step that falls into it, and in none that does not."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import slow_after_first
from keras import layers

import research
from research.debugging import check
from research.debugging.traps import TRAPS

RNG = np.random.default_rng(0)
STATE = ("trainable", "non_trainable", "slots", "metrics")


def batches(*target: int) -> list[Any]:
    """Returns batches of (x, y, sample_weight), of two sequences with masked ends each."""
    found = []
    for _ in range(3):
        x = RNG.integers(1, 6, (2, 4)).astype("int32")
        x[1, 2:] = 0
        found.append((x, RNG.normal(size=(2, *target)).astype("float32"), RNG.uniform(0.5, 1, 2).astype("float32")))
    return found


class Hand:
    """Training written by hand after Keras' guide for JAX, with those of its lines wrong that `faults` name."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.model = keras.Sequential(
            [
                keras.Input((4,), dtype="int32"),
                layers.Embedding(6, 3, mask_zero=True),
                layers.Dense(3, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L2(0.1)),
                layers.BatchNormalization(),
                layers.Dropout(0.5),
                layers.Dense(1),
            ]
        )
        self.optimizer = keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5), momentum=0.9)
        self.optimizer.build(self.model.trainable_variables)
        self.metric = keras.metrics.Mean(name="error")
        self.objects = [self.model, self.optimizer, self.metric]

    def state(self) -> dict[str, Any]:
        model = self.model
        groups = model.trainable_variables, model.non_trainable_variables, self.optimizer.variables, self.metric.variables
        copy = (lambda value: value) if "shared buffers" in self.faults else jnp.copy
        state: dict[str, Any] = {name: [copy(v.value) for v in group] for name, group in zip(STATE, groups, strict=True)}
        if "state signature" in self.faults:
            state["metrics"][0] = 0.0  # a Python number, of a weak type, and a float32 after the first step
        return state

    def loss(self, trainable: Any, non_trainable: Any, batch: Any, training: bool) -> Any:
        x, y, weight = batch
        outputs, after, losses = self.model.stateless_call(trainable, non_trainable, x, training=training, return_losses=True)
        mask = jnp.ones(x.shape) if "masks ignored" in self.faults else (x != 0).astype("float32")
        weight = mask if "sample weights ignored" in self.faults else mask * weight[:, None]
        data_loss = jnp.sum(weight * (outputs[..., 0] - y) ** 2) / jnp.sum(mask)
        return data_loss + (0.0 if "losses of layers missing" in self.faults else sum(losses)), after

    def train(self, state: Any, batch: Any) -> Any:
        faults, model = self.faults, self.model
        trainable = [v.value for v in model.trainable_variables] if "constant weights" in faults else state["trainable"]
        others = [v.value for v in model.non_trainable_variables] if "constant seeds" in faults else state["non_trainable"]
        compute = jax.value_and_grad(self.loss, has_aux=True)
        (loss, after), grads = compute(trainable, others, batch, "inference mode in training" not in faults)
        slots = state["slots"]
        if "schedule not advancing" in faults:
            slots = [jnp.zeros_like(slots[0]), *slots[1:]]  # the rate is that of the start
        trainable, slots = self.optimizer.stateless_apply(slots, grads, state["trainable"])
        if "schedule not advancing" in faults:
            slots = [state["slots"][0] + 1, *slots[1:]]
        metrics = self.metric.stateless_update_state(state["metrics"], loss)
        logs = {"loss": loss, "error": self.metric.stateless_result(metrics)}
        old = state["non_trainable"]
        if "seeds not threaded" in faults:
            after = [b if b.dtype == jnp.uint32 else a for a, b in zip(after, old, strict=True)]
        if "statistics not threaded" in faults:
            after = [a if b.dtype == jnp.uint32 else b for a, b in zip(after, old, strict=True)]
        if "constant seeds" in faults:
            after = old
        slots = state["slots"] if "optimizer state not threaded" in faults else slots
        metrics = state["metrics"] if "metrics not updated" in faults else metrics
        return dict(zip(STATE, (list(trainable), list(after), list(slots), list(metrics)), strict=True)), logs

    def reset(self, state: Any) -> Any:
        return state if "metrics not reset" in self.faults else {**state, "metrics": [jnp.zeros(()), jnp.zeros(())]}

    def evaluate(self, state: Any, batch: Any) -> Any:
        training = "evaluation in training mode" in self.faults
        loss, _ = self.loss(state["trainable"], state["non_trainable"], batch, training)
        if "evaluation changes the state" in self.faults:
            state = {**state, "non_trainable": [v * 2 for v in state["non_trainable"]]}
        metrics = list(self.metric.stateless_update_state(state["metrics"], loss))
        return {**state, "metrics": metrics}, {"loss": loss, "error": self.metric.stateless_result(metrics)}

    def learner(self) -> research.Learner:
        names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), self.state())
        return research.Learner(self.state, self.reset, self.train, self.evaluate, lambda state, batch: batch, names)

    def found(self, as_learner: bool) -> dict[str, str]:
        data = batches(4)
        if as_learner:
            result = check(self.learner(), data, self.objects)
        else:
            result = check(self.train, data, self.objects, state=self.state(), reset=self.reset)
        return {trap.name: trap.verdict for trap in result.traps}


def wrong(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == "wrong"}


def test_a_right_learner_falls_into_no_trap() -> None:
    verdicts = Hand().found(as_learner=True)
    assert list(verdicts) == list(TRAPS)
    assert set(verdicts.values()) == {"ok"}


@pytest.mark.slow
def test_a_right_step_falls_into_no_trap() -> None:
    verdicts = Hand().found(as_learner=False)
    assert wrong(verdicts) == set()
    assert {name for name, verdict in verdicts.items() if verdict == "not checked"} == {
        "evaluation changes the state",
        "evaluation in training mode",
    }


# Faults that do not hide one another are tried together: each check compiles several programs.
FAULTS = [
    ("seeds not threaded", "metrics not updated", "sample weights ignored", "evaluation changes the state", "shared buffers"),
    ("statistics not threaded", "losses of layers missing", "optimizer state not threaded", "metrics not reset", "masks ignored"),
    ("inference mode in training", "schedule not advancing", "evaluation in training mode"),
    ("constant weights",),
    ("state signature",),
    ("constant seeds",),
]
FOUND_TOO = {
    "state signature": {"state signature", "recompilation"},
    "constant seeds": {"seeds not threaded", "statistics not threaded"},
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("faults", slow_after_first(FAULTS), ids=", ".join)
def test_a_step_that_falls_into_traps_is_found_by_their_names_and_no_other(faults: tuple[str, ...]) -> None:
    expected = set().union(*(FOUND_TOO.get(fault, {fault}) for fault in faults))
    assert wrong(Hand(*faults).found(as_learner=True)) == expected


def test_the_faults_are_all_traps() -> None:
    assert {name for faults in FAULTS for fault in faults for name in FOUND_TOO.get(fault, {fault})} == set(TRAPS)


def test_a_step_that_compiles_a_new_program_each_time_is_found() -> None:
    weights, batch = jnp.ones(3), jnp.ones(3)

    def step(state: Any, batch: Any) -> Any:
        return jax.jit(lambda state, batch: (state - 0.1 * batch, jnp.sum(state * batch)))(state, batch)

    kernel = keras.Variable(weights)
    layer = layers.Layer()
    layer.kernel, layer.built = kernel, True
    found = {
        name: wrong({t.name: t.verdict for t in check(train, [batch], layer, state=jnp.copy(weights)).traps})
        for name, train in {"each time": step, "once": jax.jit(step, donate_argnums=0)}.items()
    }
    assert found == {"each time": {"recompilation"}, "once": set()}


def test_two_leaves_in_one_buffer_and_another_dtype_are_found_before_anything_runs() -> None:
    zeros = jnp.zeros(3)

    def step(state: Any, batch: Any) -> Any:
        return {**state, "mean": state["mean"] + batch}, {}

    names = {"mean": "mean", "slot": "slot"}
    learner = research.Learner(lambda: {"mean": zeros, "slot": zeros}, lambda s: s, step, step, lambda s, b: b, names)
    data = [jnp.ones(3)]
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    assert [t.name for t in check(learner, data, model).traps] == ["shared buffers"]

    def half(state: Any, batch: Any) -> Any:
        return {**state, "mean": (state["mean"] + batch).astype(jnp.float16)}, {}

    own = learner._replace(init=lambda: {"mean": jnp.zeros(3), "slot": jnp.ones(3)}, train=half)
    (trap,) = check(own, data, model).traps
    assert (trap.name, trap.verdict) == ("state signature", "wrong")
    assert "float16[3], the state has float32[3]" in trap.detail


def test_a_step_without_anything_that_tells_its_weights_is_an_error_in_one_line() -> None:
    with pytest.raises(research.InvalidArgument, match="pass models="):
        check(lambda state, batch: (state, {}), [jnp.ones(3)], state=jnp.ones(3))
    with pytest.raises(research.InvalidArgument, match="state="):
        check(lambda state, batch: (state, {}), [jnp.ones(3)])

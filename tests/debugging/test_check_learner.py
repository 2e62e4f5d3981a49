"""A learner that breaks its contract is refused, and the message names the leaf."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, slow_after_first

import research
from research.debugging import check_learner
from research.transforms import ema

Tree = dict[str, Any]
BATCH = jnp.ones(4)


def init() -> Tree:
    return {"mean": jnp.zeros(()), "history": [jnp.zeros(3), jnp.ones(3)]}


def step(state: Tree, batch: Any) -> Any:
    return {**state, "mean": state["mean"] + batch.mean()}, {"mean": state["mean"]}


NAMES = {"mean": "mean", "history": ["history/0", "history/1"]}
LEARNER = research.Learner(init, lambda state: state, step, step, lambda state, batch: batch, NAMES)


def shared() -> Tree:
    zeros = jnp.zeros(3)
    return {**init(), "history": [zeros, zeros]}


def dropping(state: Tree, batch: Any) -> Any:
    return {"mean": state["mean"]}, {}


def growing(state: Tree, batch: Any) -> Any:
    return {**state, "history": [jnp.zeros(4), state["history"][1]]}, {}


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (LEARNER._replace(names={"mean": "mean"}), r"names lacks \['history'\]\[0\]"),
        (LEARNER._replace(names={**NAMES, "other": "other"}), r"names has \['other'\], which the state lacks"),
        (LEARNER._replace(names={**NAMES, "mean": 3}), r"names\['mean'\] is a int; expected a string"),
        (LEARNER._replace(names={**NAMES, "mean": "history/1"}), r"\['history'\]\[1\] and \['mean'\] are all called 'history/1'"),
        (LEARNER._replace(init=shared), r"\['history'\]\[0\] and \['history'\]\[1\] share one buffer"),
        (LEARNER._replace(train=dropping), r"train drops \['history'\]\[0\]"),
        (LEARNER._replace(evaluate=growing), r"evaluate returns \['history'\]\[0\] as float32\[4\], the state has float32\[3\]"),
        (LEARNER._replace(train=lambda state, batch: state), r"train returns dict; expected \(state, logs\)"),
        (LEARNER._replace(reset=lambda state: {}), r"reset drops \['history'\]\[0\]"),
    ],
)
def test_a_broken_contract_is_refused_by_the_leafs_name(learner: research.Learner, message: str) -> None:
    check_learner(LEARNER, LEARNER.init(), BATCH)
    with pytest.raises(research.InvalidArgument, match=message) as error:
        check_learner(learner, learner.init(), BATCH)
    assert "\n" not in str(error.value)


def test_states_need_a_dict_of_metrics_and_evaluation_returns_the_weights() -> None:
    state = research.State([jnp.zeros(2)], [], [], {})
    names = research.State(["weight"], [], [], {})

    def moving(state: research.State, batch: Any) -> Any:
        return state._replace(trainable=[state.trainable[0] * 0.5]), {}

    learner = LEARNER._replace(init=lambda: state, names=names, train=moving, evaluate=moving)
    with pytest.raises(research.InvalidArgument, match=r"evaluate changes \.trainable\[0\]"):
        check_learner(learner, learner.init(), BATCH)
    with pytest.raises(research.InvalidArgument, match=r"State\.metrics is a list; expected a dict"):
        check_learner(learner._replace(names=names._replace(metrics=[])), state._replace(metrics=[]))


@pytest.mark.promotes  # gradient accumulation in Keras' optimizers mixes dtypes
@pytest.mark.parametrize("name", slow_after_first(CASES))
def test_learners_of_the_library_keep_the_contract(name: str) -> None:
    case = CASES[name]
    batch = research.Batch(*case.batch(np.random.default_rng(0)))
    learner = research.supervised(case.model(), example=batch, **case.compile_args())
    for checked in (learner, ema(learner, 0.9), research.joint({"only": learner})):
        check_learner(checked, checked.init(), batch)

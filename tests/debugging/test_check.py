"""`check` finds training equal to Keras' `fit`, and names what differs."""

from typing import Any

import keras
import numpy as np
import pytest
from check_models import DEVIATING, EQUAL, numbers, watched

import research
from research.debugging import check

FAST = {"added_losses", "outer_call"}


def marks(name: str) -> list[Any]:
    return [pytest.mark.promotes] + [pytest.mark.slow] * (name not in FAST)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in EQUAL])
def test_models_of_many_kinds_train_as_in_keras_fit_to_the_last_bit(name: str) -> None:
    model, arguments, batch = EQUAL[name]()
    found = check(model, [batch] * 2, **arguments)
    assert found.ok, found.problem
    assert {row.ulps for row in found.tensors} == {0}
    assert {"weights", "slots", "metrics", "logs"} <= {row.group for row in found.tensors}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in DEVIATING])
def test_a_difference_that_is_meant_has_the_name_of_the_deviation(name: str) -> None:
    build, deviation = DEVIATING[name]
    model, arguments, batch = build()
    found = check(model, [batch] * 2, **arguments)
    assert found.ok, found.problem
    assert {row.deviation for row in found.tensors if row.ulps} == {deviation}


def dense(**options: Any) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, **options)])


def test_the_model_has_the_same_values_afterwards() -> None:
    model = dense()
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"])
    batch = research.Batch(numbers(4), numbers(1))
    model.train_on_batch(batch.x, batch.y)
    before = [np.array(v.value) for v in [*model.variables, *model.optimizer.variables]]
    assert check(model, [batch] * 2).ok
    for variable, value in zip([*model.variables, *model.optimizer.variables], before, strict=True):
        np.testing.assert_array_equal(variable.value, value)


def test_a_step_that_is_not_keras_own_differs_and_the_first_tensor_is_named() -> None:
    learner = research.supervised(dense(), loss="mse", optimizer="sgd")

    def train(state: Any, batch: Any) -> Any:
        after, logs = learner.train(state, batch)
        return after._replace(trainable=[w * np.float32(1.0000002) for w in after.trainable]), logs

    found = check(learner._replace(train=train), [research.Batch(numbers(4), numbers(1))] * 2)
    assert not found.ok
    assert found.problem is not None
    assert found.problem.startswith("weights sequential/dense/kernel differs from Keras' fit by ")
    assert "not equal" in str(found)


def test_what_keras_fit_cannot_do_is_an_error_in_one_line() -> None:
    batches = [research.Batch(numbers(4), numbers(1))]
    for subject, data, message in (
        (dense(), batches[0], "the data is a Batch"),
        (dense(), [], "the data has no batches"),
        (watched()[0], batches, "Metrics inside layers"),
    ):
        with pytest.raises(research.InvalidArgument, match=message):
            check(subject, data)


@pytest.mark.slow
def test_a_learner_that_keras_has_no_fit_for_is_looked_through_for_traps_only() -> None:
    learner = research.supervised(dense(), loss="mse", gradient_transform=lambda g: research.accumulate(g, 2))
    found = check(learner, [research.Batch(numbers(4), numbers(1))] * 2)
    assert found.tensors == []
    assert found.ok
    assert found.traps

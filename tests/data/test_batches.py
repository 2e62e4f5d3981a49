"""Batches are a pure function of source, seed and step, and what can't be trained on is refused in one line."""

from typing import Any

import jax
import numpy as np
import pytest

import research
from research.data import arrays, deferred, take

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)


def test_an_epoch_holds_every_example_once_and_the_next_in_another_order() -> None:
    data = arrays(X, Y, batch_size=4, seed=1)
    epochs = [[data.batch(epoch * 3 + i).y.tolist() for i in range(3)] for epoch in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    flat = [[label for batch in epoch for label in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10))
    assert flat[0] != flat[1] != list(range(10))


def test_a_batch_depends_on_its_step_alone() -> None:
    asked, again = (arrays(X, Y, batch_size=4, seed=1) for _ in range(2))
    wanted = [asked.batch(step) for step in range(9)]
    for step in (8, 2, 5, 0):
        jax.tree.map(np.testing.assert_array_equal, again.batch(step), wanted[step])
    assert arrays(X, Y, batch_size=4, seed=2).batch(0).y.tolist() != wanted[0].y.tolist()


def test_rows_of_resident_data_are_the_batches() -> None:
    data = arrays({"a": X, "b": Y}, Y, np.ones(10), batch_size=4, seed=1)
    assert data.resident is not None
    for step in range(4):
        gathered = jax.jit(take)(data.resident.source(), data.resident.rows(step, 1))
        jax.tree.map(np.testing.assert_array_equal, gathered, data.batch(step))


def test_large_data_stays_on_the_host() -> None:
    assert arrays(X, Y, batch_size=4, resident_bytes=X.nbytes).resident is None


def test_doubles_become_keras_floats() -> None:
    assert arrays(X.astype("float64"), batch_size=4).batch(0).x.dtype == np.float32


def test_deferred_data_is_known_before_it_is_loaded() -> None:
    loads = []

    def load() -> research.Batches:
        loads.append(1)
        return arrays(X, Y.astype("int32"), batch_size=4, shuffle=False)

    shapes = research.Batch(jax.ShapeDtypeStruct((4, 2), np.float32), jax.ShapeDtypeStruct((4,), np.int32))
    data = deferred(load, shapes, 10)
    assert (data.steps_per_epoch, data.examples, loads) == (3, 10, [])
    assert data.batch(2).y.tolist() == [8, 9]
    assert data.resident is not None
    assert data.resident.rows(0, 1).tolist() == [0, 1, 2, 3]
    assert loads == [1]
    with pytest.raises(research.Refused, match="expected 11"):
        deferred(load, shapes, 11).batch(0)


HOLE = X.copy()
HOLE[3, 1] = np.nan


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ((X, Y[:9]), {}, "y has 9 examples but x has 10"),
        ((X[:0], Y[:0]), {}, "x is empty"),
        ((HOLE, Y), {}, r"x has 1 values that are not finite, the first at \(3, 1\)"),
        ((X, Y, HOLE[:, 1]), {}, r"sample_weight has 1 values that are not finite"),
        ((X, Y), {"batch_size": 11}, "the batch size is 11 but there are 10 examples"),
        ((X, Y), {"batch_size": 0}, "the batch size is 0"),
        ((X, Y), {"classes": 9}, r"y holds the label 9 \(row 9\), expected 0 to 8"),
        ((X, Y - 1), {"classes": 10}, r"y holds the label -1 \(row 0\)"),
        ((X, Y.astype("float32")), {"classes": 10}, "y holds float32, expected whole class numbers"),
        ((X, np.eye(10, dtype="int32")), {"classes": 10}, r"y has the shape \(10, 10\), expected one class number"),
        ((X, Y.astype(str)), {}, "expected numbers"),
        (({"a": X, "b": Y[:3]}, Y), {}, r"x\['b'\] has 3 examples but x\['a'\] has 10"),
        ((np.float32(1), None), {}, "single number"),
    ],
)
def test_what_can_not_be_trained_on_is_refused_in_one_line(given: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(research.Refused, match=said) as refused:
        arrays(*given, **{"batch_size": 4, "name": "toys", **options})
    assert str(refused.value).startswith("toys: ")
    assert "\n" not in str(refused.value)


def test_infinities_that_cancel_are_found() -> None:
    x = np.array([[np.inf], [-np.inf]], "float32")
    with pytest.raises(research.Refused, match="2 values that are not finite"):
        arrays(x, batch_size=1)

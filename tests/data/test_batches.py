"""Batches are a pure function of source, seed and step. Unusable data raises `InvalidArgument` with a one-line message."""

from typing import Any

import jax
import numpy as np
import pytest

import research
from research.data import from_arrays, lazy, take_rows

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)


def test_each_epoch_has_every_example_once_in_a_different_order() -> None:
    data = from_arrays(X, Y, batch_size=4, seed=1)
    epochs = [[data.batch(epoch * 3 + i).y.tolist() for i in range(3)] for epoch in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    flat = [[label for batch in epoch for label in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == list(range(10))
    assert flat[0] != flat[1] != list(range(10))


def test_a_batch_depends_only_on_its_step() -> None:
    first, second = (from_arrays(X, Y, batch_size=4, seed=1) for _ in range(2))
    in_order = [first.batch(step) for step in range(9)]
    for step in (8, 2, 5, 0):
        jax.tree.map(np.testing.assert_array_equal, second.batch(step), in_order[step])
    assert from_arrays(X, Y, batch_size=4, seed=2).batch(0).y.tolist() != in_order[0].y.tolist()


def test_gathered_rows_of_resident_data_equal_its_batches() -> None:
    data = from_arrays({"a": X, "b": Y}, Y, np.ones(10), batch_size=4, seed=1)
    assert data.resident is not None
    for step in range(4):
        gathered = jax.jit(take_rows)(data.resident.source(), data.resident.rows(step, 1))
        jax.tree.map(np.testing.assert_array_equal, gathered, data.batch(step))


def test_large_data_stays_on_the_host() -> None:
    assert from_arrays(X, Y, batch_size=4, resident_bytes=X.nbytes).resident is None


def test_float64_becomes_float32() -> None:
    assert from_arrays(X.astype("float64"), batch_size=4).batch(0).x.dtype == np.float32


def test_lazy_data_is_described_before_it_is_loaded() -> None:
    loads = []

    def load() -> research.Batches:
        loads.append(1)
        return from_arrays(X, Y.astype("int32"), batch_size=4, shuffle=False)

    shapes = research.Batch(jax.ShapeDtypeStruct((4, 2), np.float32), jax.ShapeDtypeStruct((4,), np.int32))
    data = lazy(load, shapes, 10)
    assert (data.steps_per_epoch, data.examples, loads) == (3, 10, [])
    assert data.batch(2).y.tolist() == [8, 9]
    assert data.resident is not None
    assert data.resident.rows(0, 1).tolist() == [0, 1, 2, 3]
    assert loads == [1]
    with pytest.raises(research.InvalidArgument, match="expected 11"):
        lazy(load, shapes, 11).batch(0)


WITH_NAN = X.copy()
WITH_NAN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((X, Y[:9]), {}, "y has 9 examples but x has 10"),
        ((X[:0], Y[:0]), {}, "x is empty"),
        ((WITH_NAN, Y), {}, r"x has 1 values that are not finite, the first at \(3, 1\)"),
        ((X, Y, WITH_NAN[:, 1]), {}, r"sample_weight has 1 values that are not finite"),
        ((X, Y), {"batch_size": 11}, "the batch size is 11 but there are 10 examples"),
        ((X, Y), {"batch_size": 0}, "the batch size is 0"),
        ((X, Y), {"classes": 9}, "y has label 9 in row 9, expected 0 to 8"),
        ((X, Y - 1), {"classes": 10}, "y has label -1 in row 0"),
        ((X, Y.astype("float32")), {"classes": 10}, "y has dtype float32, expected integer labels"),
        ((X, np.eye(10, dtype="int32")), {"classes": 10}, r"y has shape \(10, 10\), expected one integer label"),
        ((X, Y.astype(str)), {}, "expected numbers"),
        (({"a": X, "b": Y[:3]}, Y), {}, r"x\['b'\] has 3 examples but x\['a'\] has 10"),
        ((np.float32(1), None), {}, "x is a scalar"),
    ],
)
def test_unusable_data_raises_an_error_of_one_line(arrays: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(research.InvalidArgument, match=message) as error:
        from_arrays(*arrays, **{"batch_size": 4, "name": "toys", **options})
    assert str(error.value).startswith("toys: ")
    assert "\n" not in str(error.value)


def test_infinities_of_opposite_sign_are_detected() -> None:
    x = np.array([[np.inf], [-np.inf]], "float32")
    with pytest.raises(research.InvalidArgument, match="2 values that are not finite"):
        from_arrays(x, batch_size=1)

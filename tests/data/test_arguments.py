"""Arguments and arrays that no data set can be made of raise `InvalidArgument`: one line with the name of the data set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest

import research
from research.data import from_arrays, from_batches, from_examples, from_iterable, lazy

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10) % 3
LARGE = np.array([0, 2**31] * 5)
SHAPES = research.Batch(jax.ShapeDtypeStruct((4, 2), np.float32))


pytestmark = pytest.mark.usefixtures("as_users_run_it")


def arrays(x: Any = X, y: Any = Y, weight: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: from_arrays(x, y, weight, **{"batch_size": 4, "name": "toys", **options})


def batches(source: Any, **options: Any) -> Callable[[], Any]:
    return lambda: from_batches(source, **{"name": "toys", **options})


def examples(source: Any, **options: Any) -> Callable[[], Any]:
    return lambda: from_examples(source, **{"batch_size": 2, "name": "toys", **options}).batch(0)


def iterable(source: Any, **options: Any) -> Callable[[], Any]:
    return lambda: from_iterable(source, **{"name": "toys", **options})


MASKED = np.ma.masked_array(X, X == 3)
ONE_HOT = np.eye(3)[Y]
PIXELS = np.zeros((10, 4, 4), "int32")
INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    # Numbers.
    "batch size 0": (arrays(batch_size=0), "the batch size is 0, expected an integer of at least 1."),
    "batch size -3": (arrays(batch_size=-3), "the batch size is -3, expected an integer of at least 1."),
    "batch size '32'": (arrays(batch_size="32"), "the batch size is '32', expected an integer of at least 1."),
    "batch size 1.5": (arrays(batch_size=1.5), "the batch size is 1.5, expected an integer of at least 1."),
    "batch size 4.0": (arrays(batch_size=4.0), "the batch size is 4.0, expected an integer of at least 1."),
    "batch size None": (arrays(batch_size=None), "the batch size is None, expected an integer of at least 1."),
    "batch size True": (arrays(batch_size=True), "the batch size is True, expected an integer of at least 1."),
    "batch size array": (arrays(batch_size=np.array([4, 4])), "the batch size is array([4, 4]), expected an integer of"),
    "seed None": (arrays(seed=None), f"seed is None, expected an integer from 0 to {2**63 - 1}."),
    "seed '1'": (arrays(seed="1"), "seed is '1', expected an integer from 0 to"),
    "seed 0.5": (arrays(seed=0.5), "seed is 0.5, expected an integer from 0 to"),
    "seed -1": (arrays(seed=-1), "seed is -1, expected an integer from 0 to"),
    "seed too large": (arrays(seed=2**64), f"seed is {2**64}, expected an integer from 0 to"),
    "shuffle 'batch'": (arrays(shuffle="batch"), "shuffle is 'batch', expected True or False."),
    "shuffle None": (arrays(shuffle=None), "shuffle is None, expected True or False."),
    "drop_last 1": (arrays(drop_last=1), "drop_last is 1, expected True or False."),
    "classes '3'": (arrays(classes="3"), "classes is '3', expected an integer of at least 1."),
    "classes 0": (arrays(classes=0), "classes is 0, expected an integer of at least 1."),
    "resident_bytes -1": (arrays(resident_bytes=-1), "resident_bytes is -1, expected an integer of at least 0."),
    "resident_bytes 1e9": (arrays(resident_bytes=1e9), "resident_bytes is 1000000000.0, expected an integer of at least 0."),
    # Arrays.
    "no x": (arrays(None), "x holds no array, expected one whose first axis counts examples."),
    "nothing": (arrays(None, None), "x holds no array, expected one whose first axis counts examples."),
    "empty dict": (arrays({}), "x holds no array, expected one whose first axis counts examples."),
    "list of numbers": (
        arrays([1.0, 2.0], None),
        "x[0] is a scalar, expected an array whose first axis counts examples. A list holds several arrays: pass np.array(",
    ),
    "strings": (arrays(X, Y.astype(str)), "y has dtype <U21, expected numbers of one shape: encode or pad it first."),
    "bytes": (arrays(X, Y.astype("S1")), "y has dtype |S1, expected numbers of one shape: encode or pad it first."),
    "objects": (arrays(X.astype(object)), "x has dtype object, expected numbers of one shape: encode or pad it first."),
    "ragged": (arrays(np.array([X[:1], X[:2]], dtype=object)), "x has dtype object, expected numbers of one shape: encode or"),
    "dates": (arrays(Y.astype("datetime64[s]")), "x has dtype datetime64[s], expected numbers of one shape: encode or pad it"),
    "durations": (arrays(Y.astype("timedelta64[s]")), "x has dtype timedelta64[s], expected numbers of one shape: encode or"),
    "records": (arrays(np.zeros(10, "i4, f4")), "x has dtype [('f0', '<i4'), ('f1', '<f4')], expected numbers of one shape:"),
    "a model": (arrays(object()), "x has dtype object, expected numbers of one shape: encode or pad it first."),
    "keys": (arrays(jax.random.split(jax.random.key(0), 10)), "x can't become a NumPy array"),
    "masked": (arrays(MASKED), "x is a masked array, whose mask would be lost: fill it, or pass the mask as sample_weight."),
    # Values that a cast would change.
    "complex64": (
        arrays(X.astype("complex64")),
        "x has dtype complex64, whose imaginary part would be lost, expected real numbers: pass np.stack([x.real, x.imag], -1).",
    ),
    "complex128 y": (arrays(X, {"a": X + 0j}), "y['a'] has dtype complex64, whose imaginary part would be lost, expected real"),
    "int64": (
        arrays(X, LARGE),
        "y has the value 2147483648, but JAX holds int64 as int32, from -2147483648 to 2147483647: renumber or scale it, or set "
        "jax_enable_x64.",
    ),
    "negative int64": (arrays({"id": -LARGE - 1}), "x['id'] has the value -2147483649, but JAX holds int64 as int32, from"),
    "uint64": (arrays(X, (LARGE * 2).astype("uint64")), "y has the value 4294967296, but JAX holds uint64 as uint32, from 0 to"),
    "big-endian int64": (arrays(X, LARGE.astype(">i8")), "y has the value 2147483648, but JAX holds int64 as int32, from"),
    "float64": (arrays(X * np.float64(1e300)), "x has values too large for float32, which JAX holds it as: scale it."),
    "weights": (arrays(X, Y, np.full(10, 1e39)), "sample_weight has values too large for float32, which JAX holds it as: scale"),
    # Class weights.
    "weights as a list": (
        arrays(class_weight=[1.0, 2.0, 3.0]),
        "class_weight is a list, expected a dict from class numbers to weights: dict(enumerate(weights)).",
    ),
    "weights as an array": (arrays(class_weight=np.ones(3)), "class_weight is a ndarray, expected a dict from class numbers to"),
    "'balanced'": (arrays(class_weight="balanced"), "class_weight is a str, expected a dict from class numbers to weights:"),
    "class names": (arrays(class_weight={"cat": 2.0}), "class_weight has the entry 'cat': 2.0, expected a class and a finite"),
    "class 0.5": (arrays(class_weight={0.5: 2.0}), "class_weight has the entry 0.5: 2.0, expected a class and a finite weight."),
    "weight None": (arrays(class_weight={0: None}), "class_weight has the entry 0: None, expected a class and a finite weight."),
    "weight nan": (arrays(class_weight={0: np.nan}), "class_weight has the entry 0: nan, expected a class and a finite weight."),
    "both weights": (arrays(X, Y, np.ones(10), class_weight={0: 1.0}), "got both class_weight and sample_weight, expected one:"),
    "two targets": (arrays(X, [Y, Y], class_weight={0: 1.0}), "class_weight needs one target, y has 2: pass a sample_weight for"),
    "no target": (arrays(X, None, class_weight={0: 1.0}), "class_weight needs one target, y has 0: pass a sample_weight for"),
    "pixels": (
        arrays(X, PIXELS, class_weight={0: 2.0}),
        "class_weight weighs examples, but y has shape (10, 4, 4): pass a sample_weight for each position instead, of shape "
        "(10, 4, 4) for labels of positions, without the last axis for one-hot labels.",
    ),
    "one-hot pixels": (arrays(X, np.eye(3)[PIXELS], class_weight={0: 2.0}), "class_weight weighs examples, but y has shape (10,"),
    "pixels with an axis": (arrays(X, PIXELS[..., None], class_weight={0: 2.0}), "class_weight weighs examples, but y has"),
    "tokens": (
        arrays(X, PIXELS[0, 0, 0] + np.arange(30).reshape(10, 3) % 3, class_weight={0: 2.0}),
        "class_weight needs a class per example, but rows of y (shape (10, 3)) are not class probabilities that sum to 1: pass a "
        "sample_weight instead.",
    ),
    "several labels": (arrays(X, np.ones((10, 3)), class_weight={0: 2.0}), "class_weight needs a class per example, but rows"),
    "regression": (
        arrays(X, Y + 0.5, class_weight={0: 2.0}),
        "class_weight needs class numbers, but y has 0.5 in row 0: pass a sample_weight instead.",
    ),
    # Other sources.
    "batches of a generator": (
        batches(iter([X])),
        "the data set is a list_iterator, expected one with a length and items by position; for others see from_iterable.",
    ),
    "batches of nothing": (batches(None), "the data set is a NoneType, expected one with a length and items by position; for"),
    "batches of a dict": (batches({"x": X}), "the data set is a dict, expected one with a length and items by position; for"),
    "batches of numbers": (batches([1.0, 2.0]), "an item has the shapes x (); expected a batch: arrays whose first axes count"),
    "batches of None": (batches([None]), "an item has the shapes no array; expected a batch: arrays whose first axes count the"),
    "unequal lengths": (batches([(X, Y[:3])]), "an item has the shapes x (10, 2), y (3,); expected a batch: arrays whose first"),
    "batches of text": (batches(["one", "two"]), "x has dtype <U3, expected numbers of one shape: encode or pad it first."),
    "batches of complex": (batches([(X * 1j, Y)]), "x has dtype complex64, whose imaginary part would be lost, expected real"),
    "batches of int64": (batches([(X, LARGE)]), "y has the value 2147483648, but JAX holds int64 as int32, from"),
    "steps 0": (batches([X], steps_per_epoch=0), "steps_per_epoch is 0, expected an integer of at least 1."),
    "steps -1": (batches([X], steps_per_epoch=-1), "steps_per_epoch is -1, expected an integer of at least 1."),
    "steps 1.5": (iterable([X], steps_per_epoch=1.5), "steps_per_epoch is 1.5, expected an integer of at least 1."),
    "steps '2'": (iterable([X], steps_per_epoch="2"), "steps_per_epoch is '2', expected an integer of at least 1."),
    "steps 0 of an iterable": (iterable([X], steps_per_epoch=0), "steps_per_epoch is 0, expected an integer of at least 1."),
    "examples of a generator": (examples(iter([X])), "the data set is a list_iterator, expected one with a length and items by"),
    "examples of differing shapes": (
        examples([X[0], X], shuffle=False),
        "the examples of a batch differ in their shapes or parts (all input arrays must have the same shape): pad or crop them.",
    ),
    "examples without y": (examples([(X, Y), X], shuffle=False), "the examples of a batch differ in their shapes or parts ("),
    "examples, batch size '2'": (examples(X, batch_size="2"), "the batch size is '2', expected an integer of at least 1."),
    "examples, batch size -1": (examples(X, batch_size=-1), "the batch size is -1, expected an integer of at least 1."),
    "examples, seed None": (examples(X, seed=None), "seed is None, expected an integer from 0 to"),
    "a number": (iterable(3), "the data set is a int, expected an iterable of batches or a function that returns one."),
    "nothing to iterate": (iterable(None), "the data set is a NoneType, expected an iterable of batches or a function that"),
    "a function of nothing": (
        iterable(lambda: None, steps_per_epoch=1),
        "the function returned a NoneType, expected an iterable of batches.",
    ),
    "an iterable of complex": (iterable([X * 1j]), "x has dtype complex64, whose imaginary part would be lost, expected real"),
    "an iterable of text": (iterable(["a"]), "x has dtype <U1, expected numbers of one shape: encode or pad it first."),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_unusable_argument_raises_an_error_of_one_line(name: str) -> None:
    call, message = INVALID[name]
    with pytest.raises(research.InvalidArgument) as error:
        call()
    assert str(error.value).startswith(f"toys: {message}")
    assert "\n" not in str(error.value)


def test_lazy_data_checks_what_describes_it() -> None:
    with pytest.raises(research.InvalidArgument, match="lazy: examples is 'ten', expected an integer of at least 1"):
        lazy(arrays(X, None), SHAPES, "ten")  # type: ignore[arg-type]
    assert lazy(arrays(X, None), SHAPES, 3).shapes == SHAPES  # enough for a plan of a larger batch than there is data for
    with pytest.raises(research.InvalidArgument, match=r"data: loaded 10 examples in 3 batches of .*, expected 3 in 1 of "):
        lazy(arrays(X, None), SHAPES, 3).batch(0)
    for load, shapes in ((X, SHAPES), (arrays(X), None), (arrays(X), research.Batch(4))):
        with pytest.raises(research.InvalidArgument, match="lazy: expected a function that returns Batches, and the shapes of"):
            lazy(load, shapes, 10)  # type: ignore[arg-type]
    with pytest.raises(research.InvalidArgument, match="lazy: the function returned a ndarray, expected Batches"):
        lazy(lambda: X, SHAPES, 10).batch(0)  # type: ignore[arg-type, return-value]
    with pytest.raises(research.InvalidArgument, match=r"loaded 10 examples in 3 batches .* expected 10 in 2 of"):
        lazy(arrays(X, None), SHAPES, 10, drop_last=True).batch(0)
    with pytest.raises(research.InvalidArgument, match=r"stays on the host, but it is small: .* default resident_bytes"):
        lazy(arrays(X, None, resident_bytes=0), SHAPES, 10).batch(0)


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">u4", ">i8", ">f8", "<f4"])
def test_arrays_of_another_byte_order_are_converted(dtype: str) -> None:
    for data in (from_arrays(X.astype(dtype), batch_size=10, shuffle=False), from_batches([X.astype(dtype)])):
        x = data.batch(0).x
        assert x.dtype.isnative
        assert x.tolist() == np.asarray(jnp.asarray(x)).tolist() == X.tolist()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, np.float16, np.bool_, np.uint8])
def test_every_numeric_type_of_jax_is_accepted(dtype: Any) -> None:
    x = (X % 5).astype(dtype)
    for data in (from_arrays(x, batch_size=10, shuffle=False), from_batches([x]), from_iterable([x])):
        assert data.batch(0).x.dtype == dtype
        assert data.batch(0).x.tolist() == x.tolist()


def test_numpy_integers_are_integers() -> None:
    data = from_arrays(X, batch_size=np.int64(4), seed=np.uint8(3), shuffle=np.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, data.batch(1), from_arrays(X, batch_size=4, seed=3).batch(1))


def test_integers_that_fit_and_an_unused_mask_are_accepted() -> None:
    y = np.array([-(2**31), 2**31 - 1] * 5)
    assert from_arrays(X, y, batch_size=10, shuffle=False).batch(0).y.tolist() == y.tolist()
    assert from_arrays(np.ma.masked_array(X), batch_size=10, shuffle=False).batch(0).x.tolist() == X.tolist()
    with jax.enable_x64(True):
        assert from_arrays(X, LARGE, batch_size=10, shuffle=False).batch(0).y.tolist() == LARGE.tolist()


@pytest.mark.parametrize(
    ("floatx", "x64", "dtype"),
    [("float32", False, "float32"), ("float32", True, "float32"), ("float64", False, "float32"), ("float64", True, "float64")],
)
def test_float64_stays_float64_if_keras_and_jax_work_in_it(floatx: str, x64: bool, dtype: str) -> None:
    keras.config.set_floatx(floatx)
    try:
        with jax.enable_x64(x64):
            x = np.linspace(0, 1, 10)
            for data in (
                from_arrays(x, x, x, batch_size=10, shuffle=False),
                from_batches([(x, x, x)]),
                from_iterable([(x, x, x)]),
                from_examples(list(zip(x, x, x, strict=True)), batch_size=10, shuffle=False),
            ):
                assert {leaf.dtype for leaf in jax.tree.leaves(data.shapes)} == {np.dtype(dtype)}
                jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, x.astype(dtype)), data.batch(0))
            weights = from_arrays(x, Y, batch_size=10, class_weight={0: 0.1}).batch(0).sample_weight
            assert weights.dtype == jax.dtypes.canonicalize_dtype(floatx)
    finally:
        keras.config.set_floatx("float32")


@pytest.mark.parametrize(
    "y", [Y, Y.astype("float32"), Y[:, None], np.eye(3)[Y], np.eye(3, dtype=bool)[Y], 0.1 + 0.7 * np.eye(3)[Y]],
    ids=["numbers", "floats", "a column", "one-hot", "boolean", "smoothed"],
)  # fmt: skip
def test_class_weights_are_those_of_each_examples_class(y: np.ndarray) -> None:
    data = from_arrays(X, y, batch_size=10, shuffle=False, class_weight={0: 2.0, np.int64(2): 0.5})
    assert data.batch(0).sample_weight.tolist() == [{0: 2.0, 2: 0.5}.get(label, 1.0) for label in Y.tolist()]


def read(data: research.Batches, steps: int) -> list[list[int]]:
    return [data.batch(step).y.tolist() for step in range(steps)]


def test_drop_last_leaves_out_the_shorter_last_batch_of_each_epoch() -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 1}
    kept, dropped = from_arrays(X, np.arange(10), **options), from_arrays(X, np.arange(10), **options, drop_last=True)
    assert (kept.steps_per_epoch, dropped.steps_per_epoch, dropped.examples) == (3, 2, 10)
    batches = read(kept, 9)
    assert read(dropped, 6) == [batches[i] for i in (0, 1, 3, 4, 6, 7)]
    pairs = list(zip(X, np.arange(10), strict=True))
    assert read(from_examples(pairs, **options, drop_last=True), 6) == read(dropped, 6)
    shapes = jax.tree.map(lambda leaf: leaf, dropped.shapes)
    assert read(lazy(lambda: dropped, shapes, 10, drop_last=True), 6) == read(dropped, 6)
    assert from_arrays(X, batch_size=5, drop_last=True).steps_per_epoch == 2


def test_drop_last_leaves_out_a_shorter_last_item() -> None:
    items = [(X[start : start + 4], np.arange(10)[start : start + 4]) for start in (0, 4, 8)]
    data = from_batches(items, drop_last=True)
    assert (data.steps_per_epoch, data.examples) == (2, 8)
    assert read(data, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert from_batches(items[:2], drop_last=True).steps_per_epoch == 2


@pytest.mark.slow
@pytest.mark.parametrize("resident", [1 << 20, 0], ids=["resident", "host"])
def test_training_with_drop_last_equals_training_on_its_batches(resident: int) -> None:
    def train(data: research.Batches) -> Any:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        learner = research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(1e-3))
        state, logs = research.train(learner, data, epochs=3, evaluations={"val": data})
        return [np.asarray(weight).tolist() for weight in state.trainable], logs

    data = from_arrays(X, X[:, :1], batch_size=4, drop_last=True, resident_bytes=resident)
    assert train(data) == train(
        from_batches([data.batch(step) for step in range(6)], steps_per_epoch=2)._replace(batch=data.batch)
    )

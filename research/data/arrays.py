"""Users' arrays as NumPy arrays that JAX takes unchanged, and the checks of the arguments that describe a data set."""

import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import PyTree

from research.core.state import Batch, InvalidArgument

MAX_SEED = 2**63 - 1  # what one word of NumPy's Philox key takes


def to_numpy(leaf: Any, what: str) -> np.ndarray:
    """Returns a user's array as a NumPy array of numbers, in the machine's byte order. `what` stands for it in messages.

    float64 becomes float32, which rounds; it stays float64 if `keras.config.floatx()` is "float64" and JAX's x64 mode is on.
    Raises `InvalidArgument` for what is not numeric, and for values that JAX would change otherwise: complex and masked ones,
    integers that do not fit into JAX's 32 bits, floats beyond float32.

    >>> to_numpy([1.0, 2.0], "x"), to_numpy(np.array([1, 2], ">i4"), "x").dtype
    (array([1., 2.], dtype=float32), dtype('int32'))
    >>> to_numpy(np.array([2**31]), "x")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: x has the value 2147483648, but JAX holds int64 as int32, from -2147483648 to ...
    """
    if isinstance(leaf, np.ma.MaskedArray) and np.ma.is_masked(leaf):
        raise InvalidArgument(f"{what} is a masked array, whose mask would be lost: fill it, or pass the mask as sample_weight.")
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidArgument(f"{what} can't become a NumPy array ({reason}): pass arrays of numbers of one shape.") from error
    if array.dtype.kind == "c":
        raise InvalidArgument(
            f"{what} has dtype {array.dtype}, whose imaginary part would be lost, expected real numbers: "
            "pass np.stack([x.real, x.imag], -1)."
        )
    kinds = (np.bool_, np.signedinteger, np.unsignedinteger, np.floating)  # with those of JAX, such as bfloat16
    if array.dtype.kind == "m" or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise InvalidArgument(f"{what} has dtype {array.dtype}, expected numbers of one shape: encode or pad it first.")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        return _round(array, what)
    if array.dtype.kind in "iu":
        _check_fits(array, what)
    return array


def check_integer(value: Any, argument: str, name: str, low: int, high: int | None = None) -> int:
    """Returns an integer argument. Raises `InvalidArgument` for another type, and outside of `low` to `high`.

    >>> check_integer(np.int64(3), "batch_size", "data", 1)
    3
    >>> check_integer(1.5, "batch_size", "data", 1)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: data: batch_size is 1.5, expected an integer of at least 1.
    """
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = low - 1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low or (high is not None and number > high):
        raise InvalidArgument(f"{name}: {argument} is {_short(value)}, expected {expected}.")
    return number


def check_flag(value: Any, argument: str, name: str) -> None:
    """Raises `InvalidArgument` for an argument that is neither True nor False.

    >>> check_flag("batch", "shuffle", "data")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: data: shuffle is 'batch', expected True or False.
    """
    if not isinstance(value, bool | np.bool_):
        raise InvalidArgument(f"{name}: {argument} is {_short(value)}, expected True or False.")


def check_arrays(host: Batch, name: str) -> int:
    """Returns the number of examples. Raises `InvalidArgument` for arrays that a model can't be trained on.

    >>> check_arrays(Batch(np.zeros((5, 2)), np.zeros(5)), "data")
    5
    """
    named = [leaf for field in ("x", "y", "sample_weight") for leaf in named_leaves(field, getattr(host, field))]
    if not named or not jax.tree.leaves(host.x):
        raise InvalidArgument(f"{name}: x holds no array, expected one whose first axis counts examples.")
    first_path, first = named[0]
    for path, leaf in named:
        if leaf.ndim == 0:
            hint = " A list holds several arrays: pass np.array(...) for one." if "[" in path else ""
            raise InvalidArgument(f"{name}: {path} is a scalar, expected an array whose first axis counts examples.{hint}")
        if len(leaf) != len(first):
            raise InvalidArgument(
                f"{name}: {path} has {len(leaf)} examples but {first_path} has {len(first)}; "
                "expected the same number: remove examples without a counterpart."
            )
    if len(first) == 0:
        raise InvalidArgument(
            f"{name}: {first_path} is empty, expected at least one example: check the file or the split it was read from."
        )
    for path, leaf in named:
        if leaf.size and jnp.issubdtype(leaf.dtype, np.floating) and not np.isfinite([leaf.min(), leaf.max()]).all():
            positions = np.argwhere(~np.isfinite(leaf))
            if len(positions):
                position = tuple(map(int, positions[0]))
                raise InvalidArgument(
                    f"{name}: {path} has {len(positions)} values that are not finite, the first at {position}; "
                    "expected finite numbers: drop or fill those rows."
                )
    return len(first)


def check_labels(y: PyTree, classes: int, name: str) -> None:
    """Raises `InvalidArgument` unless `y` holds one integer label per example, from 0 to `classes - 1`.

    >>> check_labels(np.array([0, 3]), 3, "data")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: data: y has label 3 in row 1, expected 0 to 2: number the labels from 0, or ...
    """
    for path, leaf in named_leaves("y", y):
        if not np.issubdtype(leaf.dtype, np.integer):
            raise InvalidArgument(f"{name}: {path} has dtype {leaf.dtype}, expected integer labels from 0 to {classes - 1}.")
        if leaf.ndim > 2 or (leaf.ndim == 2 and leaf.shape[1] != 1):
            raise InvalidArgument(
                f"{name}: {path} has shape {leaf.shape}, expected one integer label per example: "
                "take the argmax of one-hot labels."
            )
        low, high = int(leaf.min()), int(leaf.max())
        if low < 0 or high >= classes:
            row = int(np.argmax(leaf == (low if low < 0 else high)))
            raise InvalidArgument(
                f"{name}: {path} has label {low if low < 0 else high} in row {row}, expected 0 to {classes - 1}: "
                "number the labels from 0, or give the model more classes."
            )


def class_weights(host: Batch, class_weight: Mapping[int, float], name: str) -> np.ndarray:
    """Returns a weight per example by its class, for class numbers or class probabilities. Classes not listed get 1, as in Keras.

    Raises `InvalidArgument` for targets that do not give each example one class: labels of positions, several labels.

    >>> class_weights(Batch(np.zeros((3, 2)), np.array([0, 1, 1])), {1: 2.0}, "data").tolist()
    [1.0, 2.0, 2.0]
    """
    if host.sample_weight is not None:
        raise InvalidArgument(
            f"{name}: got both class_weight and sample_weight, expected one: multiply the class weights into sample_weight."
        )
    if not isinstance(class_weight, Mapping):
        raise InvalidArgument(
            f"{name}: class_weight is a {type(class_weight).__name__}, expected a dict from class numbers to weights: "
            "dict(enumerate(weights))."
        )
    for label, weight in class_weight.items():
        if not _is_number(label) or label != int(label) or not _is_number(weight):
            raise InvalidArgument(
                f"{name}: class_weight has the entry {_short(label)}: {_short(weight)}, expected a class and a finite weight."
            )
    leaves = jax.tree.leaves(host.y)
    if len(leaves) != 1:
        raise InvalidArgument(
            f"{name}: class_weight needs one target, y has {len(leaves)}: pass a sample_weight for each output instead."
        )
    labels = _labels(leaves[0], name)
    weights = np.ones(labels.shape, jax.dtypes.canonicalize_dtype(keras.config.floatx()))
    for label, weight in class_weight.items():
        weights[labels == label] = weight
    return weights


def named_leaves(field: str, tree: PyTree) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree with their paths, for messages.

    >>> named_leaves("x", {"a": 1, "b": [2]})
    [("x['a']", 1), ("x['b'][0]", 2)]
    """
    return [(field + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _labels(y: np.ndarray, name: str) -> np.ndarray:
    """Returns the class of each example, from class numbers or class probabilities."""
    if y.ndim == 2 and y.shape[1] > 1:
        if y.min() < 0 or not np.allclose(y.sum(axis=1, dtype=np.float64), 1, atol=1e-3):
            raise InvalidArgument(
                f"{name}: class_weight needs a class per example, but rows of y (shape {y.shape}) are not class probabilities "
                "that sum to 1: pass a sample_weight instead."
            )
        return np.argmax(y, axis=1)
    if y.size != len(y):
        raise InvalidArgument(
            f"{name}: class_weight weighs examples, but y has shape {y.shape}: pass a sample_weight for each position instead, "
            f"of shape {y.shape} for labels of positions, without the last axis for one-hot labels."
        )
    labels = y.reshape(-1)
    inexact = np.flatnonzero(labels != np.round(labels))
    if inexact.size:
        raise InvalidArgument(
            f"{name}: class_weight needs class numbers, but y has {labels[inexact[0]]} in row {inexact[0]}: "
            "pass a sample_weight instead."
        )
    return labels


def _round(array: np.ndarray, what: str) -> np.ndarray:
    """Returns floats wider than float32 in the precision that JAX and Keras work with."""
    keep = keras.config.floatx() == "float64" and jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    dtype = np.float64 if keep else np.float32
    try:
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            return array.astype(dtype, copy=False)
    except FloatingPointError:
        raise InvalidArgument(f"{what} has values too large for {dtype.__name__}, which JAX holds it as: scale it.") from None


def _check_fits(array: np.ndarray, what: str) -> None:
    """Raises `InvalidArgument` for 64-bit integers that JAX would wrap around, because its x64 mode is off."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype.itemsize == array.dtype.itemsize or not array.size:
        return
    limits, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
    if low < limits.min or high > limits.max:
        raise InvalidArgument(
            f"{what} has the value {low if low < limits.min else high}, but JAX holds {array.dtype} as {dtype}, "
            f"from {limits.min} to {limits.max}: renumber or scale it, or set jax_enable_x64."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)


def _short(value: Any, limit: int = 40) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[:limit].rstrip() + " ..."

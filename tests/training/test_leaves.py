"""Any leaf that a state can have is saved and restored as it is: its kind, its dtype, its bits."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import research
from research.training import checkpoint

INTEGERS = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32")
FLOAT8 = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
FLOATS = ("float4_e2m1fn", *(f"float8_{name}" for name in FLOAT8), "bfloat16", "float16", "float32", "complex64")


def every_value(dtype: str) -> np.ndarray:
    """Returns all values of a dtype of at most 8 bits, otherwise random bits: NaNs and subnormal numbers too."""
    if dtype in INTEGERS:
        limits = jnp.iinfo(dtype)
        return np.linspace(int(limits.min), int(limits.max), 16).astype(np.int64).astype(jnp.dtype(dtype))
    bits = np.arange(16 if dtype.startswith("float4") else 256, dtype=np.uint8)
    if jnp.dtype(dtype).itemsize > 1:
        bits = np.random.default_rng(0).integers(0, 256, 64 * jnp.dtype(dtype).itemsize).astype(np.uint8)
    return bits.view(jnp.dtype(dtype)).reshape(-1, 8)


def round_trip(directory: Path, leaf: Any, like: Any = None) -> Any:
    path = checkpoint.save(directory / "checkpoints", 1, [leaf], ["scale"])
    (restored,) = checkpoint.restore(path, [leaf if like is None else like], ["scale"]).state
    return restored


def assert_same(restored: Any, leaf: Any) -> None:
    assert type(restored) is type(leaf)
    assert getattr(restored, "weak_type", None) == getattr(leaf, "weak_type", None)
    restored, leaf = np.asarray(restored), np.asarray(leaf)
    assert (restored.shape, restored.dtype.name) == (leaf.shape, leaf.dtype.name)
    assert restored.tobytes() == leaf.astype(leaf.dtype.newbyteorder("=")).tobytes()


@pytest.mark.parametrize("make", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
@pytest.mark.parametrize("dtype", ["bool", *INTEGERS, *FLOATS])
def test_every_dtype_of_jax_is_saved_with_its_bits(dtype: str, make: Callable[[Any], Any], tmp_path: Path) -> None:
    leaf = make(np.array([True, False]) if dtype == "bool" else every_value(dtype))
    assert leaf.dtype.name == dtype
    assert_same(round_trip(tmp_path, leaf), leaf)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3", "float8_e5m2"])
def test_narrow_dtypes_are_saved_from_shards_and_restored_on_other_devices(dtype: str, tmp_path: Path) -> None:
    def placed(devices: int) -> NamedSharding:
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        return NamedSharding(mesh, P("data"))

    leaf = every_value(dtype).reshape(8, -1)
    restored = round_trip(
        tmp_path, jax.device_put(leaf, placed(8)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed(4))
    )
    assert restored.sharding == placed(4)
    assert_same(np.asarray(restored), leaf)


@pytest.mark.parametrize(
    "leaf",
    [
        True, 3, -(2**40), 2**63, 0.1, float("nan"), 1 + 2j,
        np.float64(0.1), np.int64(2**40), np.uint64(2**63), np.float16(0.1), np.complex128(1 + 2j), np.bool_(True),
        np.linspace(0, 1, 5), np.arange(3) + 2**40, np.zeros((0, 3)), np.array(2**40), np.array([1 + 2j]),
        np.arange(6.0).reshape(2, 3).T, np.arange(6.0)[::-2], np.arange(3, dtype=">f4"), np.arange(3, dtype=">i8"),
        jnp.asarray(0.1), jnp.asarray(3), jnp.full((2, 3), 0.1), jnp.full(2, 3), jnp.zeros((0, 3)),
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_and_arrays_of_numpy_and_weak_types_are_restored_as_such(leaf: Any, tmp_path: Path) -> None:
    assert_same(round_trip(tmp_path, leaf), leaf)


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("text", "of type str"),
        (2**70, "of type int"),
        (object(), "of type object"),
        (np.array(["text"]), "an array of <U4"),
        (np.array([{}]), "an array of object"),
        (np.datetime64("2020"), r"an array of datetime64\[Y\]"),
        (np.ones(2, [("a", float)]), r"an array of \[\('a', '<f8'\)\]"),
        (np.longdouble(1), f"an array of {np.dtype(np.longdouble)}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_saved_is_named(leaf: Any, kind: str, tmp_path: Path) -> None:
    message = f"^the state's leaf 'scale' is {kind} and can't be saved; expected an array of numbers, or a number.$"
    with pytest.raises(research.InvalidArgument, match=message):
        round_trip(tmp_path, leaf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("leaf", "like", "difference"),
    [
        (np.ones(2), jnp.ones(2), r"float64\[2\] in it, expected float32\[2\]"),
        (jnp.ones(2, jnp.int4), jnp.ones(2, jnp.uint4), r"int4\[2\] in it, expected uint4\[2\]"),
        (jnp.ones(2, jnp.uint8), jnp.ones(2, jnp.uint4), r"uint8\[2\] in it, expected uint4\[2\]"),
        (1.0, 1, r"float64\[\] in it, expected int64\[\]"),
        (jnp.ones(2), 1.0, r"float32\[2\] in it, expected float32\[\]"),
    ],
)
def test_a_value_that_would_be_cast_raises_an_error(leaf: Any, like: Any, difference: str, tmp_path: Path) -> None:
    with pytest.raises(research.InvalidArgument, match=f"'scale' is {difference}"):
        round_trip(tmp_path, leaf, like)


class MixedState(NamedTuple):
    """A state as somebody writes it by hand: of numbers, NumPy arrays and arrays of few bits."""

    weight: Any
    quantized: Any
    codes: Any
    rate: Any
    steps: Any
    bounds: Any
    metric: Any


def mixed_learner() -> research.Learner:
    """Returns a learner whose result depends on the weak type of `rate`: it must not make `weight` float32."""

    def init() -> MixedState:
        weight, codes = jnp.ones(4, jnp.bfloat16), jnp.arange(4, dtype=jnp.int4)
        return MixedState(weight, weight.astype(jnp.float8_e4m3fn), codes, 0.1, 0, np.linspace(-3.0, 3.0, 4), np.zeros(()))

    def train(state: MixedState, batch: Any) -> tuple[MixedState, dict[str, Any]]:
        weight = state.weight - state.rate * (
            state.weight * state.codes.astype(jnp.bfloat16) - batch.x.mean().astype(jnp.bfloat16)
        )
        weight = jnp.clip(weight, state.bounds[0].astype(jnp.bfloat16), state.bounds[-1].astype(jnp.bfloat16))
        metric = state.metric + weight.astype(jnp.float32).sum()
        codes = (state.codes.astype(jnp.int32) * 3 % 7).astype(jnp.int4)
        state = MixedState(
            weight, weight.astype(jnp.float8_e4m3fn), codes, state.rate * 0.99, state.steps + 1, state.bounds, metric
        )
        return state, {"loss": metric}

    reset = lambda state: state._replace(metric=jnp.zeros_like(state.metric))  # noqa: E731
    names = MixedState(*MixedState._fields)
    return research.Learner(init, reset, train, train, lambda state, batch: state.weight, names)


@pytest.mark.slow
def test_a_state_of_all_kinds_trains_on_after_it_was_restored_as_if_never_saved(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    data, learner = research.from_arrays(x, batch_size=8, seed=1), mixed_learner()
    state, logs = research.train(learner, data, steps=13)
    with checkpoint.async_saver(tmp_path / "checkpoints", learner.names) as save:
        research.train(learner, data, steps=7, hooks=[(4, save)])
    for step in (4, 7):
        start = checkpoint.restore(tmp_path / "checkpoints" / f"{step:09d}", learner.init(), learner.names)
        resumed, resumed_logs = research.train(learner, data, steps=13, start=step, state=start.state, logs=start.logs)
        for leaf, resumed_leaf in zip(state, resumed, strict=True):
            assert_same(resumed_leaf, leaf)
        assert resumed_logs == logs


def test_the_saver_copies_arrays_of_numpy(tmp_path: Path) -> None:
    leaf = np.zeros(1_000_000)
    with checkpoint.async_saver(tmp_path / "checkpoints", ["w"]) as save:
        save(1, [leaf], {})
        leaf[:] = 1
    (restored,) = checkpoint.restore(tmp_path / "checkpoints" / "000000001", [leaf], ["w"]).state
    assert not restored.any()


@pytest.mark.slow
def test_two_processes_save_and_restore_leaves_of_all_kinds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).with_name("save_on_processes.py")), address]
    runs = [
        subprocess.Popen(
            [*script, str(i), str(tmp_path / "checkpoints")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        assert "can't be restored: its run is 'mine', expected 'another'" in output

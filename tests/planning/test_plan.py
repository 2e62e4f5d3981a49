"""Plans of small learners, compiled for v5e: costs against counts by hand, and programs that do not fit."""

import json
from collections.abc import Callable
from typing import Any

import jax
import keras
import pytest
from keras import layers
from plan_cases import needs_libtpu, shape

import research
from research import distributed
from research.planning import compiler, costs, hlo
from research.planning import plan as planning

pytestmark = [needs_libtpu, pytest.mark.slow]


def mlp(units: int, depth: int = 3) -> Callable[[], research.Learner]:
    def build() -> research.Learner:
        keras.utils.set_random_seed(0)
        hidden = [layers.Dense(units, "relu", use_bias=False) for _ in range(depth)]
        model = keras.Sequential([keras.Input((units,)), *hidden, layers.Dense(8)])
        return research.supervised(model, loss="mse", optimizer=keras.optimizers.AdamW(1e-3))

    return build


def plan(units: int, batch: int, *, depth: int = 3, **axes: int) -> planning.Plan:
    learner, shapes = research.init_abstract(mlp(units, depth))
    return planning.plan(learner, shapes, research.Batch(shape(batch, units), shape(batch, 8)), "v5e:2x4", axes)


def test_a_plan_counts_the_costs_of_one_chip(libtpu: None) -> None:
    units, batch, depth = 512, 1024, 3
    weights = units * (depth * units + 8)
    data, fsdp = plan(units, batch, depth=depth, data=8), plan(units, batch, depth=depth, fsdp=8)
    for result in (data, fsdp):
        assert result.chips == 8
        assert result.fits
        assert result.parameters == weights + 8
        assert result.model_flops == 6 * weights * batch - 2 * units * units * batch
        assert result.flops == pytest.approx(result.model_flops / 8, rel=0.02)
        assert result.donation_misses == {}
        assert result.roofline["step"] == max(result.roofline[name] for name in ("compute", "memory", "network"))
        assert 0 < result.roofline["utilisation"] <= 1
        assert result.hbm_gib["total"] < result.hbm_gib["limit"]
        json.dumps(result._asdict(), allow_nan=False)
    repeated = plan(units, batch, depth=depth, fsdp=8)  # with a compilation cache, whose entry can't be read back
    assert repeated._replace(compile_seconds=0.0) == fsdp._replace(compile_seconds=0.0)
    assert set(data.collectives) == {"all-reduce"}
    gradients = 2 * 4 * (weights + 8) * 7 / 8
    assert data.collectives["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.01)
    # fsdp splits the weights and their two moments eight ways.
    assert data.hbm_gib["arguments"] - fsdp.hbm_gib["arguments"] == pytest.approx(
        7 / 8 * 3 * 4 * units * units * depth / planning.GIB, rel=0.05
    )
    assert sum(collective["bytes"] for collective in fsdp.collectives.values()) > 0
    assert data.replicated == {}  # this mesh splits no weights


def test_a_model_that_is_too_large_is_a_result_with_the_largest_arrays(libtpu: None) -> None:
    result = plan(32768, 8, depth=2, data=8)
    assert not result.fits
    assert result.hbm_gib["total"] > result.hbm_gib["limit"] == 15.75
    assert result.largest
    assert result.hbm_gib["arguments"] == pytest.approx(3 * 2 * 4, rel=0.01)  # two kernels of 4 GiB with two moments each
    assert result.hbm_gib["temporaries"] >= 2 * 4 + 1  # at least their gradients
    assert result.largest[0]["gib"] >= 1
    assert "32768" in result.largest[0]["shape"]
    assert result.roofline is None
    json.dumps(result._asdict(), allow_nan=False)


def test_a_program_whose_code_exceeds_the_memory_does_not_fit(libtpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = plan(256, 8, data=8)
    chip, num_chips = planning.chips.parse_topology("v5e:2x4")
    smaller = chip._replace(memory=int(fitting.hbm_gib["total"] * planning.GIB) - 1)
    assert smaller.memory > (fitting.hbm_gib["arguments"] + fitting.hbm_gib["temporaries"]) * planning.GIB
    monkeypatch.setattr(planning.chips, "parse_topology", lambda name: (smaller, num_chips))
    exceeding = plan(256, 8, data=8)
    assert (fitting.fits, exceeding.fits) == (True, False)
    assert exceeding.largest
    assert exceeding.roofline == fitting.roofline


def test_a_large_bias_that_fsdp_can_not_split_is_listed_as_replicated(libtpu: None) -> None:
    def build() -> research.Learner:
        model = keras.Sequential([keras.Input((8,)), layers.Dense(300_001)])
        return research.supervised(model, loss="mse", optimizer="sgd")

    learner, shapes = research.init_abstract(build)
    result = planning.plan(learner, shapes, research.Batch(shape(8, 8), shape(8, 300_001)), "v5e:2x4", {"fsdp": 8})
    assert sorted(result.replicated.values()) == [4 * 300_001]
    assert next(iter(result.replicated)).endswith("bias")


def test_flops_agree_with_xla_without_a_loop_and_scale_with_the_trip_count_of_a_loop(libtpu: None) -> None:
    mesh = distributed.mesh(compiler.topology_devices("v5e:2x4"), data=8)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())

    def compiled(function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
        args = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated) for leaf in shapes]
        return jax.jit(function).lower(*args).compile()

    x, ws = shape(512, 512), shape(8, 512, 512)
    unrolled = compiled(lambda x, ws: jax.nn.relu(x @ ws[0]) @ ws[1], x, ws)
    assert costs.matrix_flops(hlo.parse(unrolled.as_text())) == 2 * 2 * 512**3
    assert unrolled.cost_analysis()["flops"] == pytest.approx(2 * 2 * 512**3, rel=0.01)

    def looped(x: Any, ws: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, ws)[0]

    counts = [costs.matrix_flops(hlo.parse(compiled(looped, x, shape(n, 512, 512)).as_text())) for n in (40, 80)]
    assert counts == [40 * 2 * 512**3, 80 * 2 * 512**3]

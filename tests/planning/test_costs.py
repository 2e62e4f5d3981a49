"""Costs of compiled programs: against counts by hand, against XLA's own count where that is right, and inside loops."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import distributed
from research.planning import costs
from research.planning.hlo import Program, aliased_arguments, execution_counts, parse


def compiled(function: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    return jax.jit(function).lower(*args).compile()


def program(function: Callable[..., Any], *args: Any) -> Program:
    return parse(compiled(function, *args).as_text())


def nested_scans(function: Callable[..., Any], *lengths: int) -> Callable[..., Any]:
    for length in lengths:
        inner = function
        function = lambda x, *rest, length=length, inner=inner: jax.lax.scan(  # noqa: E731
            lambda x, _: (inner(x, *rest), None), x, None, length=length
        )[0]
    return function


PRODUCTS = {
    "matrices": (lambda a, b: a @ b, [(32, 48), (48, 16)], 2 * 32 * 48 * 16),
    "batched matrices": (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(5, 8, 6), (5, 6, 7)], 2 * 5 * 8 * 6 * 7),
    "attention scores": (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 9, 3, 4), (2, 11, 3, 4)], 2 * 2 * 3 * 9 * 11 * 4),
    "two in sequence": (lambda a, b: jnp.sin(a @ b) @ b, [(8, 16), (16, 16)], 2 * 2 * 8 * 16 * 16),
}
CONVOLUTIONS = {
    "same": ((2, 8, 8, 3), (3, 3, 3, 5), {"padding": "SAME"}, 2 * 2 * 3 * 5 * 22 * 22),
    "valid": ((2, 8, 8, 3), (3, 3, 3, 5), {"padding": "VALID"}, 2 * 2 * 3 * 5 * 18 * 18),
    "strided": ((1, 9, 4), (3, 4, 6), {"padding": "VALID", "strides": 2}, 2 * 4 * 6 * 12),
    "grouped": ((2, 8, 4), (3, 2, 6), {"padding": "SAME", "groups": 2}, 2 * 2 * 2 * 6 * 22),
    "dilated": ((1, 8, 4), (3, 4, 6), {"padding": "VALID", "dilation": 2}, 2 * 4 * 6 * 12),
}


def convolution(x: Any, w: Any, padding: str, strides: int = 1, groups: int = 1, dilation: int = 1) -> Any:
    axes = x.ndim - 2
    letters = "HW"[:axes]
    return jax.lax.conv_general_dilated(
        x,
        w,
        (strides,) * axes,
        padding,
        rhs_dilation=(dilation,) * axes,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_multiply_add_counts_as_two_flops(name: str) -> None:
    function, shapes, expected = PRODUCTS[name]
    assert costs.matrix_flops(program(function, *map(jnp.ones, shapes))) == expected


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_taps_on_padding_do_not_count(name: str) -> None:
    x, w, options, expected = CONVOLUTIONS[name]
    function = functools.partial(convolution, **options)
    assert costs.matrix_flops(program(function, jnp.ones(x), jnp.ones(w))) == expected


@pytest.mark.parametrize("lengths", [(3,), (7,), (3, 5), (2, 3, 4)])
def test_a_loop_counts_once_per_iteration_though_xla_counts_it_once(lengths: tuple[int, ...]) -> None:
    layer = lambda x, w: jnp.sin(x @ w)  # noqa: E731
    x, w = jnp.ones((64, 64)), jnp.ones((64, 64))
    loop = compiled(nested_scans(layer, *lengths), x, w)
    assert costs.matrix_flops(program(layer, x, w)) == 2 * 64**3
    assert costs.matrix_flops(parse(loop.as_text())) == math.prod(lengths) * 2 * 64**3
    assert loop.cost_analysis()["flops"] < 1.5 * 2 * 64**3  # why XLA's count is not used


def test_twice_the_iterations_cost_twice_the_memory_traffic() -> None:
    x, w = jnp.ones((64, 64)), jnp.ones((40, 64, 64))

    def layers(x: Any, ws: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

    short, long = (costs.memory_bytes(program(layers, x, w[:length])) for length in (20, 40))
    assert long / short == pytest.approx(2, rel=0.02)
    # An iteration reads its own slice of the weights, not all of them.
    assert long < 3 * 40 * 5 * x.nbytes


@pytest.mark.parametrize("size", [(256, 256), (64, 1024)])
def test_without_a_loop_memory_traffic_is_near_the_count_of_xla(size: tuple[int, ...]) -> None:
    x, w = jnp.ones(size), jnp.ones((size[1], 128))
    product = compiled(lambda x, w: jnp.sin(x) @ w, x, w)
    assert costs.memory_bytes(parse(product.as_text())) == pytest.approx(product.cost_analysis()["bytes accessed"], rel=0.1)


N = 8 * 1024  # elements on each device


def traffic(function: Callable[..., Any], times: int = 1) -> dict[str, costs.Traffic]:
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((8 * N,), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
    step = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    return costs.collectives(program(nested_scans(step, times) if times > 1 else step, x))


COLLECTIVES = {
    "all-reduce": (lambda x: jax.lax.psum(x, "a"), 2 * 4 * N * 3 // 4),
    "all-gather": (lambda x: jnp.sin(jax.lax.all_gather(x, "a", tiled=True)).reshape(4, -1).sum(0), 4 * 4 * N * 3 // 4),
    "reduce-scatter": (lambda x: jnp.tile(jax.lax.psum_scatter(x, ("a", "b"), tiled=True), 8), 4 * N * 7 // 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True), 4 * N * 3 // 4),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), 4 * N),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_counts_the_bytes_that_a_chip_receives_in_every_iteration(name: str) -> None:
    function, received = COLLECTIVES[name]
    assert traffic(function) == {name: costs.Traffic(1, received)}
    assert traffic(function, 6) == {name: costs.Traffic(6, 6 * received)}


def test_a_sharded_product_gathers_the_split_operand() -> None:
    mesh = distributed.mesh(fsdp=8)
    sharded = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))  # noqa: E731
    product = program(
        lambda x, w: x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())),
        sharded((16, 64), "fsdp"),
        sharded((64, 32), None, "fsdp"),
    )
    assert costs.collectives(product) == {"all-gather": costs.Traffic(1, 64 * 32 * 4 * 7 // 8)}
    assert costs.matrix_flops(product) == 2 * 2 * 64 * 32
    assert product.chips == 8


# Output in the style of libtpu: an all-gather in three pieces that runs beside other fusions; S(1) is the memory of the core.
ASYNCHRONOUS = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {2}: (3, {}, must-alias) }, num_partitions=8

%start (p: bf16[1,4]) -> (bf16[1,4], bf16[8,4], u32[]) {
  %p = bf16[1,4]{1,0:T(4,128)(2,1)S(1)} parameter(0)
  %gather.1 = bf16[8,4]{1,0:T(4,128)(2,1)} all-gather(%p), channel_id=7, GROUPS, PIECE
  ROOT %begin = (bf16[1,4]{1,0:S(1)}, bf16[8,4]{1,0}, u32[]{:S(2)}) custom-call(%gather.1), TARGET="AsyncCollectiveStart"
}

%beside (p.1: bf16[1,4], p.2: bf16[8,4], p.3: f32[16,16]) -> (f32[16,16], bf16[1,4], bf16[8,4]) {
  %p.1 = bf16[1,4]{1,0:S(1)} parameter(0)
  %p.2 = bf16[8,4]{1,0} parameter(1)
  %p.3 = f32[16,16]{1,0} parameter(2)
  %product = f32[16,16]{1,0:T(8,128)S(1)} convolution(%p.3, %p.3), dim_labels=bf_io->bf, operand_precision={highest,highest}
  %gather.2 = bf16[8,4]{1,0} all-gather(%p.1), channel_id=7, GROUPS, PIECE
  ROOT %both = (f32[16,16]{1,0:S(1)}, bf16[1,4]{1,0:S(1)}, bf16[8,4]{1,0}) tuple(%product, %p.1, %gather.2)
}

%end (p.4: bf16[1,4], p.5: bf16[8,4]) -> bf16[8,4] {
  %p.4 = bf16[1,4]{1,0:S(1)} parameter(0)
  %p.5 = bf16[8,4]{1,0} parameter(1)
  %gather.3 = bf16[8,4]{1,0} all-gather(%p.4), channel_id=7, GROUPS, PIECE
  ROOT %done = bf16[8,4]{1,0} custom-call(%p.4, %p.5, %gather.3), TARGET="AsyncCollectiveDone"
}

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

ENTRY %main (a: bf16[1,4], b: f32[16,16]) -> (bf16[8,4], f32[16,16]) {
  %a = bf16[1,4]{1,0:S(1)} parameter(0)
  %b = f32[16,16]{1,0} parameter(1)
  %one = (bf16[1,4]{1,0:S(1)}, bf16[8,4]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %one.a = bf16[1,4]{1,0:S(1)} get-tuple-element(%one), index=0
  %one.b = bf16[8,4]{1,0} get-tuple-element(%one), index=1
  %two = (f32[16,16]{1,0:S(1)}, bf16[1,4]{1,0:S(1)}, bf16[8,4]{1,0}) fusion(%one.a, %one.b, %b), kind=kOutput, calls=%beside
  %two.a = f32[16,16]{1,0:S(1)} get-tuple-element(%two), index=0
  %two.b = bf16[8,4]{1,0} get-tuple-element(%two), index=2
  %three = bf16[8,4]{1,0} fusion(%one.a, %two.b), kind=kCustom, calls=%end
  %begun = f32[16,16]{1,0} all-reduce-start(%two.a), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
  %ended = f32[16,16]{1,0} all-reduce-done(%begun)
  %there = ((f32[16,16]{1,0}), f32[128,16]{1,0}, u32[]{:S(2)}) all-gather-start(%ended), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %here = f32[128,16]{1,0} all-gather-done(%there)
  ROOT %out = (bf16[8,4]{1,0}, f32[16,16]{1,0}) tuple(%three, %ended)
}
"""
GROUPS = "replica_groups=mesh['x'=4,'y'=2] {'x','y'}, dimensions={0}"
ASYNCHRONOUS = (
    ASYNCHRONOUS.replace("GROUPS", GROUPS)
    .replace("TARGET", "custom_call_target")
    .replace("PIECE", "async_collective_fusion_config={}")
)


def test_the_pieces_of_an_asynchronous_collective_count_once() -> None:
    assert costs.collectives(parse(ASYNCHRONOUS)) == {
        "all-gather": costs.Traffic(2, 64 * 7 // 8 + 8192 // 2),
        "all-reduce": costs.Traffic(1, 2 * 1024 * 3 // 4),
    }


def test_float32_products_in_higher_precision_take_more_passes() -> None:
    program = parse(ASYNCHRONOUS)
    assert (costs.matrix_flops(program), costs.matrix_flops(program, passes=True)) == (2 * 16**3, 6 * 2 * 16**3)


def test_buffers_in_the_memory_of_the_core_cause_no_traffic() -> None:
    """HBM traffic: gather writes 64 bytes, product reads 1,024, all-reduce writes 1,024, gather reads 1,024 and writes 8,192."""
    assert costs.memory_bytes(parse(ASYNCHRONOUS)) == 64 + 1024 + 1024 + 1024 + 8192


def test_arguments_whose_buffers_hold_results_are_aliased() -> None:
    assert aliased_arguments(parse(ASYNCHRONOUS)) == {0, 3}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[8]<=[8]", 8),
        ("{}", 8),
        ("mesh['x'=4,'y'=2] {'y'}", 2),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("mesh['x'=4,'y'=1,'z'=2], device_ids=([2,4]T(1,0)) {'x'}", 4),
        ("mesh['x'=8] {'x':(1)4}", 4),
        ("mesh['x'=8] {'x':(2)2}", 2),
    ],
)
def test_every_notation_of_replica_groups_is_parsed(groups: str, size: int) -> None:
    text = ASYNCHRONOUS.replace("replica_groups={{0,1},{2,3},{4,5},{6,7}}", f"replica_groups={groups}")
    all_gather = costs.collectives(parse(text))["all-gather"]
    assert all_gather.bytes == 64 * 7 // 8 + 8192 * (size - 1) // size


SCATTER = """\
HloModule step, num_partitions=8

%all-reduce-scatter.3 (input: f32[256,128]) -> f32[32,128] {
  %input = f32[256,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.150 = f32[256,128]{1,0} all-reduce(%input), channel_id=34, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %here = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %dynamic-slice.102 = f32[32,128]{1,0} dynamic-slice(%all-reduce.150, %here, %zero), dynamic_slice_sizes={32,128}
}

ENTRY %main (a: f32[256,128]) -> f32[32,128] {
  %a = f32[256,128]{1,0} parameter(0)
  ROOT %fusion = f32[32,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_a_fused_all_reduce_and_slice_counts_as_reduce_scatter() -> None:
    program, size = parse(SCATTER), 256 * 128 * 4
    assert costs.collectives(program) == {"reduce-scatter": costs.Traffic(1, size * 7 // 8)}
    assert costs.memory_bytes(program) == size + size // 8


LOOP = """\
HloModule loop

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %y = f32[8]{0} negate(%x)
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %y)
}

%condition (d: (s32[], f32[8])) -> pred[] {
  %d = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("attribute", "count"), [("", 12), (', backend_config={"known_trip_count":{"n":"5"}}', 5)])
def test_a_trip_count_is_noted_by_the_compiler_or_the_limit_in_the_condition(attribute: str, count: int) -> None:
    program = parse(LOOP.replace("body=%body", f"body=%body{attribute}"))
    assert execution_counts(program)[0] == {"main": 1, "body": count, "condition": count + 1}
    assert costs.memory_bytes(program) == count * 64 + (count + 1) * 9  # two operands of four bytes, a result of one

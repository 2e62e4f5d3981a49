"""Costs of a training step on TPUs that are not attached: memory, FLOPs, collectives and a lower bound on the step time.

The compiler is libtpu, the one that programs real TPUs; it needs none. Nothing runs. Times are lower bounds, from the published
peak rates of the chips (`research/planning/chips.py`).
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the examples in docstrings)
from jaxtyping import PyTree

from research import distributed
from research.core.learner import Learner
from research.core.state import count_parameters
from research.cpu.rewrite import for_other_platform
from research.data.batches import Batches
from research.planning import chips, compiler, costs, hlo
from research.planning.flops import model_flops
from research.transforms.jaxpr import equations

GIB = chips.GIB
MAX_LISTED = 10  # arrays in `Plan.largest`


class Plan(NamedTuple):
    """A training step on chips that are not attached.

    Fields:
        topology: as given, such as `v5e:16x16`.
        chips: the number of chips.
        mesh: the size of each mesh axis.
        layout: the name of the layout.
        batch: examples in a step, on all chips together.
        tokens_per_chip: None unless the inputs are sequences of integers.
        parameters: the number of parameters of the model.
        fits: whether the program fits in HBM.
        hbm_gib: GiB per chip: `arguments`, `temporaries`, `total` (with results and code) and `limit`.
        flops: FLOPs of matrix products and convolutions per chip.
        model_flops: FLOPs of all chips together, without recomputation.
        memory_bytes: HBM bytes that a chip reads and writes.
        collectives: for each collective the `count` and the `bytes` that a chip receives.
        roofline: the seconds that `compute`, `memory` and `network` take at best; `step`, the longest of them; and `utilisation`,
            the model FLOPs over the FLOPs that the chips can do in a step.
        bound_by: the part of the roofline that takes longest.
        donation_misses: bytes per chip of the leaves of the state that are not donated, by name.
        replicated: bytes of the leaves of at least a MiB that every chip holds complete, on a mesh that splits weights, by name.
        largest: the arrays that use most HBM, where the program does not fit.
        compile_seconds: how long the compiler took.

    Where the compiler gives up for lack of HBM there is no program: `flops`, `memory_bytes`, `collectives`, `roofline` and
    `bound_by` are None.

    >>> Plan._fields[:4]
    ('topology', 'chips', 'mesh', 'layout')
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    layout: str
    batch: int
    tokens_per_chip: float | None
    parameters: int
    fits: bool
    hbm_gib: dict[str, float]
    flops: int | None
    model_flops: int
    memory_bytes: int | None
    collectives: dict[str, dict[str, int]] | None
    roofline: dict[str, float] | None
    bound_by: str | None
    donation_misses: dict[str, int]
    replicated: dict[str, int]
    largest: list[dict[str, Any]]
    compile_seconds: float


class _Step(NamedTuple):
    """A sharded training step: the function, its abstract arguments with their shardings, and the mesh and layout used."""

    train: Callable[..., Any]
    names: PyTree
    state: PyTree
    batch: PyTree
    mesh: jax.sharding.Mesh
    layout: distributed.Layout


def plan(
    learner: Learner,
    shapes: PyTree,
    batch: PyTree,
    topology: str,
    axes: Mapping[str, int],
    layout: distributed.Layout | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Plan:
    """Compiles a learner's training step for a mesh of chips and returns its costs.

    `learner` and `shapes` are the results of `research.init_abstract`, `batch` holds the shapes of a full batch, `topology` and
    `axes` are as in `compiler.topology_devices` and `distributed.mesh`. `on_phase` is called with a description before each slow
    phase. A step that does not fit is a result (`fits`). Raises `InvalidArgument` for a mesh, layout or batch that is
    impossible on these chips, where libtpu is missing, and where the compiler fails for a reason other than memory.

    >>> import research
    >>> def build():
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> learner, shapes = research.init_abstract(build)
    >>> batch = research.Batch(jax.ShapeDtypeStruct((64, 4), "float32"), jax.ShapeDtypeStruct((64, 2), "float32"))
    >>> plan(learner, shapes, batch, "v5e:2x5", {"fsdp": 8})
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    chip, num_chips = chips.parse_topology(topology)
    mesh = compiler.topology_mesh(compiler.topology_devices(topology), topology, axes)
    step = _shard_step(learner, shapes, batch, mesh, layout or distributed.default_layout(mesh))
    with for_other_platform():
        on_phase("counting model FLOPs")
        needed = model_flops(learner.train, shapes, batch)
        on_phase("tracing and lowering")
        lowered = _lower(step)
    on_phase("compiling")
    started = time.perf_counter()
    result = compiler.compile_lowered(lowered, topology)
    seconds = time.perf_counter() - started
    on_phase("analysing the program")
    if isinstance(result, compiler.OutOfMemory):
        analysis, largest = _analyse_failure(result, step), result.largest
    else:
        analysis, largest = _analyse_program(result, step, chip, num_chips, needed), []
    if not analysis["fits"]:
        largest = sorted(largest or _largest_arrays(learner, shapes, batch, step), key=lambda array: -array["gib"])[:MAX_LISTED]
    return Plan(
        topology=topology,
        chips=num_chips,
        mesh=dict(mesh.shape),
        layout=getattr(step.layout, "__name__", "layout"),
        batch=_num_examples(batch),
        tokens_per_chip=_tokens_per_chip(batch, num_chips),
        parameters=count_parameters(shapes),
        model_flops=needed,
        replicated=dict(distributed.replicated_leaves(step.names, step.state)),
        largest=largest,
        compile_seconds=seconds,
        **analysis,
    )


def roofline(
    chip: chips.Chip, num_chips: int, needed: int, flops: int, memory_bytes: int, collectives: Mapping[str, costs.Traffic]
) -> tuple[dict[str, float], str]:
    """Returns the seconds that a step takes at best, in parts, and the name of the part that takes longest.

    `needed` is the model FLOPs of all chips. FLOPs, memory bytes and collectives are those of one chip. The bound assumes that
    all links receive at full rate and that compute, memory and network overlap completely: a real step takes longer. float32
    products at default precision count as bfloat16 products. Products that the compiler considers too small for the matrix unit
    are not in `flops`, so a chip's share of `needed` is the minimum.

    >>> from research.planning.costs import Traffic
    >>> v5e, _ = chips.parse_topology("v5e:2x4")
    >>> times, bound = roofline(v5e, 8, 8 * 197 * 10**9, 197 * 10**9, 10**8, {"all-gather": Traffic(3, 400 * 10**6)})
    >>> bound, {name: round(value, 4) for name, value in times.items()}
    ('network (all-gather)', {'compute': 0.001, 'memory': 0.0001, 'network': 0.002, 'step': 0.002, 'utilisation': 0.5})
    """
    seconds = {
        "compute": max(flops, needed / num_chips) / chip.flops,
        "memory": memory_bytes / chip.bandwidth,
        "network": sum(traffic.bytes for traffic in collectives.values()) / chip.network,
    }
    bound = max(seconds, key=seconds.__getitem__)
    step = seconds[bound]
    times = {**seconds, "step": step, "utilisation": needed / (num_chips * chip.flops * step) if step else 0.0}
    if bound == "network":
        bound += f" ({max(collectives, key=lambda name: collectives[name].bytes)})"
    return times, bound


def _shard_step(learner: Learner, shapes: PyTree, batch: PyTree, mesh: jax.sharding.Mesh, layout: distributed.Layout) -> _Step:
    shardings = distributed.state_shardings(learner.names, shapes, mesh, layout)
    # A learner that was built abstractly can't compute its initial state.
    zeros = learner._replace(init=lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    sharded = distributed.shard(zeros, mesh, layout)
    state = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)
    batches = distributed.shard_batches(Batches(lambda step: None, batch, 1, _num_examples(batch)), mesh)
    return _Step(sharded.train, learner.names, state, batches.shapes, mesh, layout)


def _lower(step: _Step) -> jax.stages.Lowered:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # reported by name, as `donation_misses`
        return jax.jit(step.train, donate_argnums=0, keep_unused=True).lower(step.state, step.batch)


def _analyse_failure(failure: compiler.OutOfMemory, step: _Step) -> dict[str, Any]:
    arguments = sum(_bytes_per_chip(leaf) for leaf in jax.tree.leaves((step.state, step.batch))) / GIB
    total = failure.used if failure.includes_arguments else failure.used + arguments
    memory = {"arguments": arguments, "temporaries": total - arguments, "total": total, "limit": failure.limit}
    unknown = dict.fromkeys(("flops", "memory_bytes", "collectives", "roofline", "bound_by"))
    return {"fits": False, "hbm_gib": memory, "donation_misses": {}, **unknown}


def _analyse_program(compiled: jax.stages.Compiled, step: _Step, chip: chips.Chip, num_chips: int, needed: int) -> dict[str, Any]:
    memory, program = _memory_gib(compiled, chip), hlo.parse(str(compiled.as_text()))
    received, moved = costs.collectives(program), costs.memory_bytes(program)
    times, bound = roofline(chip, num_chips, needed, costs.matrix_flops(program, passes=True), moved, received)
    return {
        "fits": memory["total"] <= memory["limit"],
        "hbm_gib": memory,
        "flops": costs.matrix_flops(program),
        "memory_bytes": moved,
        "collectives": {name: {"count": traffic.times, "bytes": traffic.bytes} for name, traffic in received.items()},
        "roofline": times,
        "bound_by": bound,
        "donation_misses": _donation_misses(step, hlo.aliased_arguments(program)),
    }


def _memory_gib(compiled: jax.stages.Compiled, chip: chips.Chip) -> dict[str, float]:
    """The compiler checks arguments and temporaries against the limit; the code is in HBM too, so it counts here."""
    sizes = compiled.memory_analysis()
    assert sizes is not None
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    rest = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.generated_code_size_in_bytes
    memory = {"arguments": arguments, "temporaries": temporaries, "total": arguments + temporaries + rest, "limit": chip.memory}
    return {part: size / GIB for part, size in memory.items()}


def _num_examples(batch: PyTree) -> int:
    return int(jax.tree.leaves(batch)[0].shape[0])


def _bytes_per_chip(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _tokens_per_chip(batch: PyTree, num_chips: int) -> float | None:
    leaves = jax.tree.leaves(getattr(batch, "x", batch))
    tokens = [leaf.size for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)]
    return sum(tokens) / num_chips if tokens else None


def _named_leaves(step: _Step) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    return zip(jax.tree.leaves(step.names), jax.tree.leaves(step.state), strict=True)


def _donation_misses(step: _Step, aliased: set[int]) -> dict[str, int]:
    return {name: _bytes_per_chip(leaf) for i, (name, leaf) in enumerate(_named_leaves(step)) if i not in aliased}


def _largest_arrays(learner: Learner, shapes: PyTree, batch: PyTree, step: _Step) -> list[dict[str, Any]]:
    """Returns the largest leaves of the state and the largest activations, where the compiler does not list arrays."""
    sized = sorted(((_bytes_per_chip(leaf), name, leaf) for name, leaf in _named_leaves(step)), key=lambda item: -item[0])
    leaves = [
        {"gib": size / GIB, "shape": f"{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}", "what": name}
        for size, name, leaf in sized[:MAX_LISTED]
    ]
    return leaves + _largest_activations(learner.train, shapes, batch, step.mesh)


def _largest_activations(
    train: Callable[..., Any], shapes: PyTree, batch: PyTree, mesh: jax.sharding.Mesh
) -> list[dict[str, Any]]:
    """Returns the largest arrays with a row per example in the traced step; the compiler stores only some of them."""
    num_examples, num_parts = _num_examples(batch), mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    primitives: dict[tuple[Any, ...], Counter[str]] = {}
    for equation in equations(jax.make_jaxpr(train)(shapes, batch)):
        name = equation.primitive.name
        for out in equation.outvars:
            if getattr(out.aval, "shape", ())[:1] == (num_examples,) and name not in ("jit", "broadcast_in_dim"):
                primitives.setdefault((out.aval.dtype, out.aval.shape), Counter())[name] += 1
    activations = [
        {
            "gib": math.prod(shape) * dtype.itemsize / num_parts / GIB,
            "shape": f"{dtype}{[shape[0] // num_parts, *shape[1:]]}",
            "what": f"one of {names.total()} in the traced step ({', '.join(name for name, _ in names.most_common(3))})",
        }
        for (dtype, shape), names in primitives.items()
    ]
    return sorted(activations, key=lambda array: -array["gib"])[:MAX_LISTED]

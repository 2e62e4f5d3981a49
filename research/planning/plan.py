"""A training step compiled for chips that nobody has here: whether it fits, what it computes, moves and waits for, and how fast.

The compiler is the one that those chips are programmed with (libtpu), and needs none of them. Nothing runs: what is said of time
is a bound, each part of the chip at its published best (`research/chips.py`).
"""

import importlib.util
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the examples in docstrings)
from jax.experimental import topologies
from jaxtyping import PyTree

from research import chips, hlo, parallel
from research.data import Batches
from research.flops import model_flops
from research.kernels import elsewhere
from research.state import Refused, parameters
from research.step import Learner
from research.transforms import equations

GIB = chips.GIB
LARGE = 1 << 20  # bytes: what is smaller may lie whole everywhere
LISTED = 10  # arrays that take most of the memory


class Plan(NamedTuple):
    """A step on chips that are not here. Sizes, FLOPs and traffic are those of one chip, `model_flops` those of all together.

    `hbm_gib` has `arguments`, `temporaries`, `total` (results and code included) and `limit`; `collectives` a `count` and the
    `bytes` received for each kind; `roofline` the seconds that `compute`, `memory` and `network` take at best, the `step` that
    takes as long as the longest of them, and `utilisation`, the share of the chips' peak that the model's mathematics would be.
    `donation_misses` are leaves of the state that need memory twice, `replicated` those of a MiB or more that lie whole on every
    chip of a mesh that splits weights, both by name with their bytes; `largest` what takes most of the memory where there is too
    little. Where the compiler gives up for lack of memory there is no program: `flops` and what follows from it are None.
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


class Shortage(NamedTuple):
    """What the compiler says where memory does not suffice: GiB needed and to be had, and the largest arrays.

    `arguments` says whether the GiB needed are all, or without those of the step's arguments.
    """

    used: float
    limit: float
    arguments: bool
    largest: list[dict[str, Any]]


def topology(name: str) -> list[Any]:
    """The chips of a topology such as `v5e:16x16`, to compile for: as devices for `parallel.mesh`.

    Raises `Refused` for an unknown topology, and where the compiler is missing. It asks Google's servers what machine this is,
    and waits for them, unless the environment says otherwise: see `scripts/plan.py`.

    >>> topology("v5e:2x5")
    Traceback (most recent call last):
    research.state.Refused: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    chip, _ = chips.slice_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise Refused(
            f"topology {name}: libtpu, the compiler for TPUs, is not installed; expected it to be found by `import libtpu`: "
            "use `just plan`, which brings it, or install the extra `plan`."
        )
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", chip_config_name=chip.config).devices)
    except jax.errors.JaxRuntimeError as error:
        raise Refused(f"topology {name}: this libtpu can't compile for it ({_line(error)}); choose another.") from error


def plan(
    learner: Learner,
    shapes: PyTree,
    batch: PyTree,
    name: str,
    axes: Mapping[str, int],
    layout: parallel.Layout | None = None,
    say: Callable[[str], None] = lambda phase: None,
) -> Plan:
    """Compiles a learner's training step for a mesh of chips, and tells what comes of it.

    `learner` and `shapes` are as `research.abstract` gives them, `batch` holds the shapes of a whole batch, `name` and `axes` are
    as `topology` and `parallel.mesh` take them. `say` is told what is done next. Too little memory is an answer (`fits`); raises
    `Refused` where the mesh, the layout or the batch does not fit the chips, or the compiler fails otherwise.
    """
    devices = topology(name)
    chip, count = chips.slice_of(name)
    mesh = wired(devices, name, axes)
    layout = layout or parallel.fitting(mesh)
    placed = parallel.shardings(learner.names, shapes, mesh, layout)
    # A learner that was built from shapes alone can't make its first state.
    blank = learner._replace(init=lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    sharded = parallel.shard(blank, mesh, layout)
    state = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, placed)
    examples = jax.tree.leaves(batch)[0].shape[0]
    spread = parallel.spread(Batches(lambda step: None, batch, 1, examples), mesh).shapes

    with elsewhere():
        say("counting what the mathematics needs")
        needed = model_flops(learner.train, shapes, batch)
        say("tracing and lowering")
        lowered = _lowered(sharded.train, state, spread)
    say("compiling")
    began = time.perf_counter()
    found = _compiled(lowered, name)
    seconds = time.perf_counter() - began
    say("reading the program")
    held = sum(_bytes_on_a_chip(leaf) for leaf in jax.tree.leaves((state, spread))) / GIB
    if isinstance(found, Shortage):
        total = found.used if found.arguments else found.used + held
        memory = {"arguments": held, "temporaries": total - held, "total": total, "limit": found.limit}
        fits, missed, run = False, {}, dict.fromkeys(("flops", "memory_bytes", "collectives", "roofline", "bound_by"))
    else:
        memory, program = _memory(found, chip), hlo.read(str(found.as_text()))
        fits = memory["total"] <= memory["limit"]
        missed, run = _missed(learner.names, state, hlo.aliased(program)), _run(program, chip, count, needed)
    largest: list[dict[str, Any]] = []
    if not fits:
        told = found.largest if isinstance(found, Shortage) else []
        parts = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
        told = told or _largest(learner.names, state) + _kept(learner.train, shapes, batch, parts)
        largest = sorted(told, key=lambda each: -each["gib"])[:LISTED]
    return Plan(
        topology=name,
        chips=count,
        mesh=dict(mesh.shape),
        layout=getattr(layout, "__name__", "layout"),
        batch=examples,
        tokens_per_chip=_tokens(batch, count),
        parameters=parameters(shapes),
        fits=fits,
        hbm_gib=memory,
        model_flops=needed,
        donation_misses=missed,
        replicated=_replicated(learner.names, state, mesh),
        largest=largest,
        compile_seconds=seconds,
        **run,
    )


def _memory(found: jax.stages.Compiled, chip: chips.Chip) -> dict[str, float]:
    """What a program takes, in GiB. The compiler leaves no room for its code, which lies in the chip's memory too."""
    sizes = found.memory_analysis()
    assert sizes is not None
    arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    rest = sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.generated_code_size_in_bytes
    known = {"arguments": arguments, "temporaries": temporaries, "total": arguments + temporaries + rest, "limit": chip.memory}
    return {part: size / GIB for part, size in known.items()}


def _run(program: hlo.Program, chip: chips.Chip, count: int, needed: int) -> dict[str, Any]:
    """What a program computes and moves on a chip, and how long that takes at best."""
    received, moved = hlo.collectives(program), hlo.memory_bytes(program)
    roofline, bound = bounds(chip, count, needed, hlo.matrix_flops(program, passes=True), moved, received)
    return {
        "flops": hlo.matrix_flops(program),
        "memory_bytes": moved,
        "collectives": {kind: {"count": each.times, "bytes": each.bytes} for kind, each in received.items()},
        "roofline": roofline,
        "bound_by": bound,
    }


def wired(devices: Sequence[Any], name: str, axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of a topology's chips, next to each other as they are wired. Raises `Refused` where that can't be.

    >>> dict(wired(jax.devices()[:1], "v5e:2x2", {"fsdp": 1}).shape)
    {'fsdp': 1}
    """
    try:
        return parallel.mesh(devices, **axes)
    except NotImplementedError as error:
        told = ",".join(f"{axis}={size}" for axis, size in axes.items())
        sides = name.partition(":")[2]
        raise Refused(
            f"mesh: {told} can't be laid over {name}; expected sizes that are products of the sides {sides}: choose others."
        ) from error


def bounds(
    chip: chips.Chip, count: int, needed: int, flops: int, moved: int, received: Mapping[str, hlo.Traffic]
) -> tuple[dict[str, float], str]:
    """The seconds that a step takes at best on so many chips, and by what it is bound.

    `needed` is the model's FLOPs on all chips, the rest is of one: FLOPs, bytes moved to and from memory, bytes received from
    other chips. All links are taken to carry at full rate what a chip has to receive, in the direction in which it comes, and
    computing, memory and network to work at the same time: a real step takes longer. A product of float32 counts as one of
    bfloat16 where its precision is the default one. Products that the compiler takes to be too small for the matrix unit are not
    among `flops`: a chip's share of `needed` is the least that it computes.

    >>> from research.hlo import Traffic
    >>> v5e, _ = chips.slice_of("v5e:2x4")
    >>> roofline, bound = bounds(v5e, 8, 8 * 197 * 10**9, 197 * 10**9, 10**8, {"all-gather": Traffic(3, 400 * 10**6)})
    >>> bound, {name: round(value, 4) for name, value in roofline.items()}
    ('network (all-gather)', {'compute': 0.001, 'memory': 0.0001, 'network': 0.002, 'step': 0.002, 'utilisation': 0.5})
    """
    seconds = {
        "compute": max(flops, needed / count) / chip.flops,
        "memory": moved / chip.bandwidth,
        "network": sum(each.bytes for each in received.values()) / chip.network,
    }
    bound = max(seconds, key=seconds.__getitem__)
    step = seconds[bound]
    roofline = {**seconds, "step": step, "utilisation": needed / (count * chip.flops * step) if step else 0.0}
    if bound == "network":
        bound += f" ({max(received, key=lambda kind: received[kind].bytes)})"
    return roofline, bound


def shortage(message: str) -> Shortage | None:
    """What a compiler's message says about memory; None where it is about something else.

    >>> shortage("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.")
    Shortage(used=20.5, limit=15.75, arguments=True, largest=[])
    """
    told = re.search(r"Used ([\d.]+[KMGTP]?)B? of ([\d.]+[KMGTP]?)B? hbm", message)
    apart = re.search(r"temporaries \(([\d.]+[KMGTP]?)B?\) exceeds available HBM \(([\d.]+[KMGTP]?)B?\)", message)
    found = told or apart
    if found is None:
        return None
    largest = []
    for size, block in re.findall(r"\d+\. Size: ([\d.]+[KMGTP]?)B?\s*\n(.*?)(?:={5,}|\Z)", message, re.DOTALL):
        lines = dict(re.findall(r"^\s*(Operator|Shape|XLA label|Allocation type): (.*)$", block, re.MULTILINE))
        operator = re.search(r'op_name="([^"]*)"', lines.get("Operator", ""))
        label = str(lines.get("XLA label", lines.get("Allocation type", "")))
        what = operator[1] if operator else label.partition(" = ")[0]
        largest.append({"gib": _gib(size), "shape": lines.get("Shape", "").partition("{")[0], "what": what})
    return Shortage(_gib(found[1]), _gib(found[2]), told is not None, largest)


def _gib(size: str) -> float:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
    return float(size.rstrip("".join(units))) * units.get(size[-1], 1) / GIB


def _lowered(train: Callable[..., Any], state: PyTree, batch: PyTree) -> jax.stages.Lowered:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # they are told of by name
        return jax.jit(train, donate_argnums=0, keep_unused=True).lower(state, batch)


def _compiled(lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled | Shortage:
    try:
        with warnings.catch_warnings():  # where compiled programs are kept, one for absent chips can't be read back
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = shortage(str(error))
        if found is None:
            raise Refused(f"{name}: the compiler fails ({_line(error)}); try another mesh or layout.") from error
        return found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _bytes_on_a_chip(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _tokens(batch: PyTree, count: int) -> float | None:
    """Tokens a chip, where a batch's inputs are sequences of whole numbers."""
    leaves = jax.tree.leaves(getattr(batch, "x", batch))
    sequences = [leaf.size for leaf in leaves if leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.integer)]
    return sum(sequences) / count if sequences else None


def _replicated(names: PyTree, state: PyTree, mesh: jax.sharding.Mesh) -> dict[str, int]:
    if all(mesh.shape.get(axis, 1) == 1 for axis in ("fsdp", "tensor")):
        return {}
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True)
    found = {name: leaf.size * leaf.dtype.itemsize for name, leaf in leaves if leaf.sharding.is_fully_replicated}
    return {name: size for name, size in found.items() if size >= LARGE}


def _largest(names: PyTree, state: PyTree) -> list[dict[str, Any]]:
    """What takes most of a chip's memory among the state's arrays."""
    leaves = zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True)
    sized = sorted(((_bytes_on_a_chip(leaf), name, leaf) for name, leaf in leaves), key=lambda each: -each[0])
    return [
        {"gib": size / GIB, "shape": f"{leaf.dtype}{list(leaf.sharding.shard_shape(leaf.shape))}", "what": name}
        for size, name, leaf in sized[:LISTED]
    ]


def _kept(train: Callable[..., Any], shapes: PyTree, batch: PyTree, parts: int) -> list[dict[str, Any]]:
    """What takes most of it among what a step computes for its examples, as it is written: the compiler keeps a part of that."""
    examples = jax.tree.leaves(batch)[0].shape[0]
    found: dict[tuple[Any, ...], Counter[str]] = {}
    for equation in equations(jax.make_jaxpr(train)(shapes, batch).jaxpr):
        for out in equation.outvars:
            if getattr(out.aval, "shape", ())[:1] == (examples,) and equation.primitive.name not in ("jit", "broadcast_in_dim"):
                found.setdefault((out.aval.dtype, out.aval.shape), Counter())[equation.primitive.name] += 1
    listed = [
        {
            "gib": math.prod(shape) * dtype.itemsize / parts / GIB,
            "shape": f"{dtype}{[shape[0] // parts, *shape[1:]]}",
            "what": f"one of {names.total()} in the step as written ({', '.join(name for name, _ in names.most_common(3))})",
        }
        for (dtype, shape), names in found.items()
    ]
    return sorted(listed, key=lambda each: -each["gib"])[:LISTED]


def _missed(names: PyTree, state: PyTree, aliased: set[int]) -> dict[str, int]:
    leaves = enumerate(zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True))
    return {name: _bytes_on_a_chip(leaf) for i, (name, leaf) in leaves if i not in aliased}

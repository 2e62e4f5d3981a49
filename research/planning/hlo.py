"""Compiled programs read as text: what one chip computes, what it moves to and from its memory, what it waits for from others.

XLA's own cost analysis counts a loop's body once. Here everything inside a loop counts as often as the loop runs it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from research.flops import taps

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
PASSES = {"high": 3, "highest": 6}  # of bfloat16 products, for one of float32 in that precision


class Buffer(NamedTuple):
    """An array of a program: its dtype and shape, and the memory it is in: 0 is the chip's own, others are on the core.

    >>> Buffer("bf16", (8, 128), 0).moved, Buffer("bf16", (8, 128), 1).moved
    (2048, 0)
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Its bytes, without padding."""
        bits = BITS.get(self.dtype) or (0 if self.dtype in BITS else int(re.sub(r"^\D+|\D.*$", "", self.dtype) or 0))
        return math.prod(self.shape) * bits // 8

    @property
    def moved(self) -> int:
        """The bytes that reading or writing it moves between the chip and its memory: none where it is on the core."""
        return 0 if self.space else self.size


class Instruction(NamedTuple):
    """One line of a program; `settings` is what stands behind its operands."""

    name: str
    opcode: str
    results: tuple[Buffer, ...]
    operands: tuple[str, ...]
    settings: str


class Computation(NamedTuple):
    """A function of a program, in the order in which it runs."""

    instructions: Mapping[str, Instruction]
    root: str


class Program(NamedTuple):
    """A compiled program: its functions by name, which of them is the program itself, on how many chips, and its first line."""

    computations: Mapping[str, Computation]
    entry: str
    chips: int
    header: str


class Traffic(NamedTuple):
    """How often a kind of collective runs in a step, and the bytes that each chip receives by it."""

    times: int
    bytes: int


_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_BUFFER = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def read(text: str) -> Program:
    """Reads what `compiled.as_text()` gives.

    >>> import jax, jax.numpy as jnp
    >>> program = read(jax.jit(lambda a, b: a @ b).lower(jnp.ones((2, 3)), jnp.ones((3, 5))).compile().as_text())
    >>> matrix_flops(program), program.chips
    (60, 1)
    """
    header, *lines = text.split("\n")
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in lines:
        if line.endswith("{") and line[:1] not in (" ", "") and "->" in line:
            name, root, instructions = line.removeprefix("ENTRY ").split()[0].lstrip("%"), "", {}
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}") and name:
            computations[name], name = Computation(instructions, root or next(reversed(instructions))), ""
        elif name and (found := _LINE.match(line)):
            is_root, called, results, opcode, rest = found.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            settings = rest[:end] if opcode in ("parameter", "constant") else rest[end + 1 :]
            instructions[called] = Instruction(called, opcode, _buffers(results), operands, settings)
            root = called if is_root else root
    chips = math.prod(
        int(found[1]) for key in ("num_partitions", "replica_count") if (found := re.search(rf"{key}=(\d+)", header))
    )
    return Program(computations, entry, chips, header)


def trips(program: Program, loop: Instruction) -> int:
    """How often a `while` runs its body: as the compiler notes it, or what its condition compares with; 1 where unknown.

    >>> import jax, jax.numpy as jnp
    >>> loop = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) @ x, x))
    >>> program = read(loop.lower(jnp.ones((64, 64))).compile().as_text())
    >>> [trips(program, each) for each in program.computations[program.entry].instructions.values() if each.opcode == "while"]
    [7]
    """
    noted = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.settings)
    if noted:
        return int(noted[1])
    condition = program.computations[_called(loop, "condition")[0]].instructions.values()
    compared = [each for each in condition if "direction=LT" in each.settings]
    bounds = [int(each.settings) for each in condition if each.opcode == "constant" and each.settings.isdigit()]
    return bounds[0] if len(compared) == 1 and len(bounds) == 1 else 1


def runs(program: Program) -> tuple[Counter[str], Counter[str]]:
    """How often each function runs in a step: those whose instructions run one after the other, and those fused into one.

    Every branch of a conditional counts.

    >>> import jax, jax.numpy as jnp
    >>> loops = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.fori_loop(0, 5, lambda j, x: jnp.sin(x) @ x, x), x)
    >>> program = read(jax.jit(loops).lower(jnp.ones((64, 64))).compile().as_text())
    >>> max(runs(program)[0].values()), matrix_flops(program) == 15 * 2 * 64**3
    (18, True)
    """
    alone: Counter[str] = Counter()
    fused: Counter[str] = Counter()

    def visit(name: str, times: int, inside: bool) -> None:
        (fused if inside else alone)[name] += times
        for each in program.computations[name].instructions.values():
            if each.opcode == "while":
                count = trips(program, each)
                visit(_called(each, "body")[0], times * count, inside)
                visit(_called(each, "condition")[0], times * (count + 1), inside)
            elif each.opcode == "fusion":
                visit(_called(each, "calls")[0], times, True)
            elif each.opcode in ("call", "async-start", "conditional"):
                keys = ("to_apply", "calls", "called_computation", "branch_computations", "true_computation", "false_computation")
                for called in _called(each, *keys):
                    visit(called, times, inside)

    visit(program.entry, 1, False)
    return alone, fused


def matrix_flops(program: Program, passes: bool = False) -> int:
    """Multiplications and additions of one chip's matrix products and convolutions in a step.

    TPUs multiply in bfloat16: a product of float32 takes one pass by default and several in higher precision, `passes` counts
    them. What kernels written by hand compute is not seen.

    >>> import jax, jax.numpy as jnp
    >>> product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    >>> matrix_flops(read(jax.jit(product).lower(jnp.ones((5, 8, 6)), jnp.ones((5, 6, 7))).compile().as_text()))
    3360
    """
    alone, fused = runs(program)
    counted = 0
    for name, times in (alone + fused).items():
        computation = program.computations[name]
        for each in computation.instructions.values():
            if each.opcode in ("dot", "convolution"):
                found = (_dot if each.opcode == "dot" else _convolution)(computation, each)
                precision = re.search(r"operand_precision=\{(\w+)", each.settings)
                factor = PASSES.get(precision[1], 1) if passes and precision else 1
                counted += times * factor * found
    return counted


def collectives(program: Program) -> dict[str, Traffic]:
    """What each chip receives from others in a step, by kind of collective.

    A chip receives of n in a group: by all-gather and all-to-all all of the result but its own part, by reduce-scatter as much of
    the operand, by all-reduce twice that, by collective-permute the result. What starts here and ends there counts once.

    >>> import jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    >>> summed = jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P())
    >>> collectives(read(jax.jit(summed).lower(jnp.ones(4000)).compile().as_text()))
    {'all-reduce': Traffic(times=1, bytes=6000)}
    """
    alone, fused = runs(program)
    counts: Counter[str] = Counter()
    received: Counter[str] = Counter()
    pieces: dict[str, tuple[str, int, int, bool]] = {}
    for name, times in [*alone.items(), *fused.items()]:
        computation = program.computations[name]
        starts = _starts(computation)
        for each in computation.instructions.values():
            kind = each.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
                share = _received("reduce-scatter", _operands(computation, each), _members(program, each))
            else:
                share = _received(kind, _whole(computation, each, kind), _members(program, each))
            channel = re.search(r"channel_id=(\d+)", each.settings)
            if name in fused and channel is not None and _piece(each):
                # One collective, cut into pieces that run beside other work: it counts where it starts.
                _, before, _, started = pieces.get(channel[1], (kind, 0, 0, False))
                now = before + times if starts and started else times if starts else before if started else max(before, times)
                pieces[channel[1]] = (kind, now, share, started or starts)
                continue
            counts[kind] += times
            received[kind] += times * share
    for kind, times, share, _ in pieces.values():
        counts[kind] += times
        received[kind] += times * share
    return {kind: Traffic(counts[kind], received[kind]) for kind in COLLECTIVES if counts[kind]}


def memory_bytes(program: Program) -> int:
    """Bytes that one chip reads from and writes to its memory in a step, without the padding of small arrays.

    What an instruction takes and gives counts, unless it stays on the core. Of an array that is only looked up in, or written to
    in one place, that part counts.

    >>> import jax, jax.numpy as jnp
    >>> memory_bytes(read(jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(1000)).compile().as_text()))
    8000
    """
    alone, _ = runs(program)
    return sum(
        times * _moved(program, program.computations[name], each)
        for name, times in alone.items()
        for each in program.computations[name].instructions.values()
    )


def aliased(program: Program) -> set[int]:
    """The arguments, by number, whose memory the results use again.

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda a, b: (a + 1, b[:1]), donate_argnums=0)
    >>> aliased(read(step.lower(jnp.ones(4), jnp.ones(4)).compile().as_text()))
    {0}
    """
    return {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}(?:, (?:may|must)-alias)?\)", program.header)}


# Which names an instruction mentions, and what lies behind them.


def _closing(text: str) -> int:
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _buffers(text: str) -> tuple[Buffer, ...]:
    found = []
    for dtype, shape, layout in _BUFFER.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.strip(" <=")) for size in shape.split(",") if size.strip())
        found.append(Buffer(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def _called(instruction: Instruction, *keys: str) -> list[str]:
    found = []
    for key in keys:
        for listed, single in re.findall(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", instruction.settings):
            found += re.findall(r"%?([\w.\-]+)", listed) if listed else [single]
    return found


def _operands(computation: Computation, instruction: Instruction) -> tuple[Buffer, ...]:
    return tuple(buffer for name in instruction.operands for buffer in computation.instructions[name].results)


# Products.


def _dot(computation: Computation, dot: Instruction) -> int:
    left = _operands(computation, dot)[0].shape
    axes = _numbers(dot.settings, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(dot.results[0].shape) * math.prod(left[axis] for axis in axes)


def _convolution(computation: Computation, convolution: Instruction) -> int:
    """TPUs have no other products than convolutions: what looks like a window may be a batch, most of it padding."""
    inputs, kernel = (buffer.shape for buffer in _operands(computation, convolution)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.settings)
    assert labels is not None, convolution.settings
    window = re.search(r"window=\{([^}]*)\}", convolution.settings)
    told = dict(part.split("=") for part in window[1].split()) if window else {}
    met = 1
    for i in range(len(labels[1]) - 2):
        axis = str(i)
        low = int(told["pad"].split("x")[i].split("_")[0]) if "pad" in told else 0
        sizes = {key: int(told[key].split("x")[i]) if key in told else 1 for key in ("stride", "rhs_dilate", "lhs_dilate")}
        across = inputs[labels[1].index(axis)], convolution.results[0].shape[labels[3].index(axis)], kernel[labels[2].index(axis)]
        met *= taps(*across, sizes["stride"], low, sizes["rhs_dilate"], sizes["lhs_dilate"])
    groups = re.search(r"batch_group_count=(\d+)", convolution.settings)
    batch = inputs[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2 * batch * kernel[labels[2].index("o")] * kernel[labels[2].index("i")] * met


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(number) for number in found[1].split(",") if number] if found else []


# Collectives.


def _whole(computation: Computation, each: Instruction, kind: str) -> tuple[Buffer, ...]:
    """What the bytes of a collective are told by: its results, or the operands where those are larger."""
    given = _operands(computation, each)
    if kind == "reduce-scatter":
        return given
    if not each.opcode.endswith("-start") or kind == "all-reduce":
        return each.results
    if kind == "collective-permute":
        return given
    return each.results[len(given) : 2 * len(given)]  # (operands, results), and what the device needs besides


def _received(kind: str, buffers: tuple[Buffer, ...], members: int) -> int:
    size = sum(buffer.size for buffer in buffers)
    if kind == "collective-permute":
        return size
    return size * (members - 1) // members * (2 if kind == "all-reduce" else 1)


def _members(program: Program, each: Instruction) -> int:
    """How many chips talk with each other, in any of the ways in which this is written; all, where it is not."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{('[^}]*)\}", each.settings)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    counted = re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", each.settings)
    listed = re.search(r"replica_groups=\{\{([\d,]+)", each.settings)
    return int(counted[1]) if counted else len(listed[1].split(",")) if listed else program.chips


def _starts(computation: Computation) -> bool:
    return any('custom_call_target="AsyncCollectiveStart"' in each.settings for each in computation.instructions.values())


def _piece(each: Instruction) -> bool:
    """Whether it is a part of a collective that goes on beside other work."""
    return "async_collective_fusion_config" in each.settings or "AsyncCollective" in each.settings


# Memory.

_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id async-start
    opt-barrier domain add-dependency""".split()  # noqa: SIM905
)
_VIEWS = ("bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element")
_LOOKS = ("dynamic-slice", "slice", "gather")


def _moved(program: Program, computation: Computation, each: Instruction) -> int:
    if each.opcode in _FREE or each.opcode.endswith(("-done", "-update")) or '"ConcatBitcast"' in each.settings:
        return 0
    given, gives = _operands(computation, each), each.results
    if each.opcode == "fusion":
        return _fused(program, computation, each)
    if each.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        target = gives[0] if each.opcode == "copy-start" else gives[1]
        return target.moved + (0 if given[0].space else target.size)
    if each.opcode in _LOOKS:
        return gives[0].moved + (0 if given[0].space else gives[0].size) + sum(buffer.moved for buffer in given[1:])
    if each.opcode in ("dynamic-update-slice", "scatter"):
        change = given[1] if each.opcode == "dynamic-update-slice" else given[-1]
        return change.moved + (0 if gives[0].space else change.size)
    if each.opcode.endswith("-start"):
        gives = gives[len(given) :] or gives
    return sum(buffer.moved for buffer in (*given, *gives))


def _fused(program: Program, computation: Computation, fusion: Instruction) -> int:
    """What a fusion reads and writes: of what it only looks up in or changes in one place, that part."""
    inner = program.computations[_called(fusion, "calls")[0]]
    parameters = {int(each.settings): each.name for each in inner.instructions.values() if each.opcode == "parameter"}
    total = 0
    for i, name in enumerate(fusion.operands):
        whole = sum(buffer.moved for buffer in computation.instructions[name].results)
        total += min(whole, _read(program, inner, parameters[i])) if whole else 0
    root = inner.instructions[inner.root]
    if root.opcode != "tuple":
        return total + _written(inner, root, fusion.results)
    # A tuple within the tuple would count its parts one by one.
    parts = [(name, buffer) for name in root.operands for buffer in inner.instructions[name].results]
    pairs = zip(parts, fusion.results, strict=False)
    return total + sum(_written(inner, inner.instructions[name], (buffer,)) for (name, _), buffer in pairs)


def _read(program: Program, inner: Computation, name: str) -> int:
    """The bytes that a fused function reads of one of its arguments."""
    whole, total = sum(buffer.size for buffer in inner.instructions[name].results), 0
    for user in _users(inner, name):
        if user.opcode in _LOOKS and user.operands[0] == name:
            total += user.results[0].size
        elif user.opcode in _VIEWS:
            total += _read(program, inner, user.name)
        elif user.opcode == "fusion":
            nested = program.computations[_called(user, "calls")[0]]
            parameters = {int(each.settings): each.name for each in nested.instructions.values() if each.opcode == "parameter"}
            total += sum(_read(program, nested, parameters[i]) for i, each in enumerate(user.operands) if each == name)
        elif user.opcode == "tuple" or (user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name):
            continue
        elif user.opcode in COLLECTIVES or "AsyncCollective" in user.settings:
            total += whole if _starts(inner) or not _piece(user) else 0
        else:
            return whole
        if total >= whole:
            return whole
    return total


def _written(inner: Computation, each: Instruction, results: tuple[Buffer, ...]) -> int:
    """The bytes that a fused function writes for one of its results."""
    while each.opcode in ("bitcast", "reshape", "get-tuple-element"):
        each = inner.instructions[each.operands[0]]
    if each.opcode == "parameter":
        return 0
    if each.opcode == "dynamic-update-slice":
        return 0 if results[0].space else inner.instructions[each.operands[1]].results[0].size
    if each.opcode in COLLECTIVES or "AsyncCollective" in each.settings:
        if _starts(inner):
            return sum(buffer.moved for one in _collective(inner) for buffer in one.results)
        return 0 if _piece(each) else sum(buffer.moved for buffer in results)
    return sum(buffer.moved for buffer in results)


def _collective(inner: Computation) -> Iterator[Instruction]:
    return (each for each in inner.instructions.values() if each.opcode in COLLECTIVES)


def _users(inner: Computation, name: str) -> list[Instruction]:
    return [each for each in inner.instructions.values() if name in each.operands]

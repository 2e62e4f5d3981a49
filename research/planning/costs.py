"""What one chip computes, moves to and from its HBM, and receives from other chips in one execution of a compiled program.

XLA's own cost analysis counts the body of a loop once. Here it counts once per iteration.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from research.planning.flops import count_taps
from research.planning.hlo import (
    Buffer,
    Computation,
    Instruction,
    Program,
    called_computations,
    execution_counts,
    operand_buffers,
    parse,  # noqa: F401  (for the examples in docstrings)
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PASSES = {"high": 3, "highest": 6}  # bfloat16 products per float32 product of that precision


class Traffic(NamedTuple):
    """How often one collective runs in a step, and the bytes that each chip receives through it.

    >>> Traffic(2, 1024).bytes
    1024
    """

    times: int
    bytes: int


def matrix_flops(program: Program, passes: bool = False) -> int:
    """Returns the FLOPs of one chip's matrix products and convolutions; a multiply-add counts as two.

    TPUs multiply in bfloat16. A float32 product takes one pass by default and several in a higher precision; `passes`
    multiplies by their number. Pallas kernels and other custom calls count as zero.

    >>> import jax, jax.numpy as jnp
    >>> product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
    >>> matrix_flops(parse(jax.jit(product).lower(jnp.ones((5, 8, 6)), jnp.ones((5, 6, 7))).compile().as_text()))
    3360
    """
    sequential, fused = execution_counts(program)
    total = 0
    for name, times in (sequential + fused).items():
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                flops = (_dot_flops if instruction.opcode == "dot" else _convolution_flops)(computation, instruction)
                precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
                total += times * flops * (PASSES.get(precision[1], 1) if passes and precision else 1)
    return total


def collectives(program: Program) -> dict[str, Traffic]:
    """Returns how often each collective runs and the bytes that each chip receives through it.

    In a group of n chips a chip receives: by all-gather and all-to-all the result except its own part, by reduce-scatter the same
    share of the operand, by all-reduce twice that share, by collective-permute the result. An asynchronous collective counts
    once.

    >>> from research.planning.hlo import EXAMPLE
    >>> collectives(parse(EXAMPLE.replace("tanh(%x)", "all-reduce(%x)")))  # 8 chips, 16 bytes each
    {'all-reduce': Traffic(times=1, bytes=28)}
    """
    sequential, fused = execution_counts(program)
    counts: Counter[str] = Counter()
    received: Counter[str] = Counter()
    pieces: dict[str, _Piece] = {}
    for name, times in [*sequential.items(), *fused.items()]:
        computation = program.computations[name]
        starts = _starts_collective(computation)
        for instruction in computation.instructions.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode not in COLLECTIVES:
                continue
            # The compiler names a fusion of an all-reduce and a slice so: it is implemented as a reduce-scatter.
            if opcode == "all-reduce" and "all-reduce-scatter" in name:
                opcode, buffers = "reduce-scatter", operand_buffers(computation, instruction)
            else:
                buffers = _collective_buffers(computation, instruction, opcode)
            num_bytes = _received_bytes(opcode, buffers, _group_size(program, instruction))
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if name in fused and channel is not None and _is_piece(instruction):
                pieces[channel[1]] = _merge_piece(pieces.get(channel[1]), opcode, times, num_bytes, starts)
                continue
            counts[opcode] += times
            received[opcode] += times * num_bytes
    for piece in pieces.values():
        counts[piece.opcode] += piece.times
        received[piece.opcode] += piece.times * piece.bytes
    return {opcode: Traffic(counts[opcode], received[opcode]) for opcode in COLLECTIVES if counts[opcode]}


def memory_bytes(program: Program) -> int:
    """Returns the bytes that one chip reads from and writes to its HBM, without the padding of small arrays.

    Operands and results of an instruction count unless they are in a memory of the core. Of an array that is only sliced,
    gathered from or updated in place, only that part counts.

    >>> import jax, jax.numpy as jnp
    >>> memory_bytes(parse(jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(1000)).compile().as_text()))
    8000
    """
    sequential, _ = execution_counts(program)
    return sum(
        times * _instruction_bytes(program, program.computations[name], instruction)
        for name, times in sequential.items()
        for instruction in program.computations[name].instructions.values()
    )


# Products.


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = operand_buffers(computation, dot)[0].shape
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    axes = [int(axis) for axis in match[1].split(",") if axis] if match else []
    return 2 * math.prod(dot.results[0].shape) * math.prod(left[axis] for axis in axes)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """TPUs have no products but convolutions. A window axis may be a batch axis, where most taps meet padding."""
    inputs, kernel = (buffer.shape for buffer in operand_buffers(computation, convolution)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution.attributes
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    taps = 1
    for i in range(len(labels[1]) - 2):
        axis = str(i)
        padding = int(settings["pad"].split("x")[i].split("_")[0]) if "pad" in settings else 0
        stride, dilation, input_dilation = (
            int(settings[key].split("x")[i]) if key in settings else 1 for key in ("stride", "rhs_dilate", "lhs_dilate")
        )
        sizes = inputs[labels[1].index(axis)], convolution.results[0].shape[labels[3].index(axis)], kernel[labels[2].index(axis)]
        taps *= count_taps(*sizes, stride, padding, dilation, input_dilation)
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    batch = inputs[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2 * batch * kernel[labels[2].index("o")] * kernel[labels[2].index("i")] * taps


# Collectives.


class _Piece(NamedTuple):
    """A collective that the compiler split into pieces, which run in fusions beside other work and share a channel."""

    opcode: str
    times: int
    bytes: int
    started: bool


def _merge_piece(piece: _Piece | None, opcode: str, times: int, num_bytes: int, starts: bool) -> _Piece:
    """The pieces count as one collective per start; where no piece is a start, as often as the piece that runs most."""
    if piece is None:
        return _Piece(opcode, times, num_bytes, starts)
    if starts:
        total = piece.times + times if piece.started else times
    else:
        total = piece.times if piece.started else max(piece.times, times)
    return _Piece(opcode, total, num_bytes, piece.started or starts)


def _collective_buffers(computation: Computation, instruction: Instruction, opcode: str) -> tuple[Buffer, ...]:
    """Returns the buffers that determine the traffic: the results, or the operands where those are larger."""
    operands = operand_buffers(computation, instruction)
    if opcode == "reduce-scatter":
        return operands
    if not instruction.opcode.endswith("-start") or opcode == "all-reduce":
        return instruction.results
    if opcode == "collective-permute":
        return operands
    return instruction.results[len(operands) : 2 * len(operands)]  # the results are (operands, results, scratch)


def _received_bytes(opcode: str, buffers: tuple[Buffer, ...], group_size: int) -> int:
    size = sum(buffer.nbytes for buffer in buffers)
    if opcode == "collective-permute":
        return size
    return size * (group_size - 1) // group_size * (2 if opcode == "all-reduce" else 1)


def _group_size(program: Program, instruction: Instruction) -> int:
    """Returns the number of chips in a group, from any of the notations of `replica_groups`; all chips where it is absent."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{('[^}]*)\}", instruction.attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    iota = re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", instruction.attributes)
    explicit = re.search(r"replica_groups=\{\{([\d,]+)", instruction.attributes)
    return int(iota[1]) if iota else len(explicit[1].split(",")) if explicit else program.chips


def _starts_collective(computation: Computation) -> bool:
    instructions = computation.instructions.values()
    return any('custom_call_target="AsyncCollectiveStart"' in instruction.attributes for instruction in instructions)


def _is_piece(instruction: Instruction) -> bool:
    return "async_collective_fusion_config" in instruction.attributes or "AsyncCollective" in instruction.attributes


# HBM traffic.

_NO_TRAFFIC = frozenset(
    """parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id async-start
    opt-barrier domain add-dependency""".split()  # noqa: SIM905
)
_PASS_THROUGH = ("bitcast", "reshape", "copy", "transpose", "convert", "get-tuple-element")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")


def _instruction_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith(("-done", "-update")) or '"ConcatBitcast"' in instruction.attributes:
        return 0
    operands, results = operand_buffers(computation, instruction), instruction.results
    if opcode == "fusion":
        return _fusion_bytes(program, computation, instruction)
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
        target = results[0] if opcode == "copy-start" else results[1]
        return target.hbm_bytes + (0 if operands[0].space else target.nbytes)
    if opcode in _SLICES:
        indices = sum(buffer.hbm_bytes for buffer in operands[1:])
        return results[0].hbm_bytes + (0 if operands[0].space else results[0].nbytes) + indices
    if opcode in _UPDATES:
        update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
        return update.hbm_bytes + (0 if results[0].space else update.nbytes)
    if opcode.endswith("-start"):
        results = results[len(operands) :] or results
    return sum(buffer.hbm_bytes for buffer in (*operands, *results))


def _fusion_bytes(program: Program, computation: Computation, fusion: Instruction) -> int:
    """Returns what a fusion reads and writes; of an array that it only slices or updates, that part."""
    inner = program.computations[called_computations(fusion, "calls")[0]]
    parameters = _parameters(inner)
    total = 0
    for i, name in enumerate(fusion.operands):
        size = sum(buffer.hbm_bytes for buffer in computation.instructions[name].results)
        total += min(size, _bytes_read(program, inner, parameters[i])) if size else 0
    root = inner.instructions[inner.root]
    if root.opcode != "tuple":
        return total + _bytes_written(inner, root, fusion.results)
    # A fusion's results are flat, while an operand of its root may be a tuple with several buffers.
    parts = [name for name in root.operands for _ in inner.instructions[name].results]
    pairs = zip(parts, fusion.results, strict=False)
    return total + sum(_bytes_written(inner, inner.instructions[name], (buffer,)) for name, buffer in pairs)


def _bytes_read(program: Program, inner: Computation, name: str) -> int:
    """Returns the bytes that a fused computation reads of the value called `name`."""
    size, total = sum(buffer.nbytes for buffer in inner.instructions[name].results), 0
    users = [instruction for instruction in inner.instructions.values() if name in instruction.operands]
    for user in users:
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.results[0].nbytes
        elif user.opcode in _PASS_THROUGH:
            total += _bytes_read(program, inner, user.name)
        elif user.opcode == "fusion":
            nested = program.computations[called_computations(user, "calls")[0]]
            parameters = _parameters(nested)
            positions = [i for i, operand in enumerate(user.operands) if operand == name]
            total += sum(_bytes_read(program, nested, parameters[i]) for i in positions)
        elif user.opcode == "tuple" or (user.opcode in _UPDATES and user.operands[0] == name):
            continue
        elif _is_collective(user):
            total += size if _starts_collective(inner) or not _is_piece(user) else 0
        else:
            return size
        if total >= size:
            return size
    return total


def _bytes_written(inner: Computation, instruction: Instruction, results: tuple[Buffer, ...]) -> int:
    """Returns the bytes that a fused computation writes for one of its results."""
    while instruction.opcode in ("bitcast", "reshape", "get-tuple-element"):
        instruction = inner.instructions[instruction.operands[0]]
    if instruction.opcode == "parameter":
        return 0
    if instruction.opcode == "dynamic-update-slice":
        return 0 if results[0].space else inner.instructions[instruction.operands[1]].results[0].nbytes
    if _is_collective(instruction):
        if _starts_collective(inner):
            started = [candidate for candidate in inner.instructions.values() if candidate.opcode in COLLECTIVES]
            return sum(buffer.hbm_bytes for collective in started for buffer in collective.results)
        return 0 if _is_piece(instruction) else sum(buffer.hbm_bytes for buffer in results)
    return sum(buffer.hbm_bytes for buffer in results)


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode in COLLECTIVES or "AsyncCollective" in instruction.attributes


def _parameters(computation: Computation) -> dict[int, str]:
    """Returns the names of a computation's parameters by index."""
    instructions = computation.instructions.values()
    return {int(instruction.attributes): instruction.name for instruction in instructions if instruction.opcode == "parameter"}

"""A parser for the text of compiled HLO programs, and how often each computation runs in one execution of the program."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # others: the digits


class Buffer(NamedTuple):
    """An array of a program: dtype, shape and memory space. Space 0 is the HBM, other spaces are memories of the core.

    >>> Buffer("bf16", (8, 128), 0).hbm_bytes, Buffer("bf16", (8, 128), 1).hbm_bytes
    (2048, 0)
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def nbytes(self) -> int:
        """The size in bytes, without padding."""
        bits = BITS.get(self.dtype) or (0 if self.dtype in BITS else int(re.sub(r"^\D+|\D.*$", "", self.dtype) or 0))
        return math.prod(self.shape) * bits // 8

    @property
    def hbm_bytes(self) -> int:
        """The bytes that reading or writing the buffer moves from or to HBM: 0 where it is in a memory of the core."""
        return 0 if self.space else self.nbytes


class Instruction(NamedTuple):
    """One line of a computation.

    `attributes` is the text after the operands; for a parameter or constant, the parameter's index or the constant's value.

    >>> program = parse(EXAMPLE)
    >>> program.computations["main"].instructions["y"]
    Instruction(name='y', opcode='tanh', results=(Buffer(dtype='f32', shape=(4,), space=0),), operands=('x',), attributes='')
    """

    name: str
    opcode: str
    results: tuple[Buffer, ...]
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """A function of a program: its instructions by name, in execution order, and the name of the root instruction.

    >>> parse(EXAMPLE).computations["main"].root
    'y'
    """

    instructions: Mapping[str, Instruction]
    root: str


class Program(NamedTuple):
    """A compiled program: its computations by name, the name of the entry computation, the number of chips, the first line.

    >>> program = parse(EXAMPLE)
    >>> program.entry, program.chips, list(program.computations)
    ('main', 8, ['main'])
    """

    computations: Mapping[str, Computation]
    entry: str
    chips: int
    header: str


EXAMPLE = """\
HloModule example, num_partitions=8

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} tanh(%x)
}
"""
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_BUFFER = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALL_ATTRIBUTES = (
    "to_apply",
    "calls",
    "called_computation",
    "branch_computations",
    "true_computation",
    "false_computation",
)


def parse(text: str) -> Program:
    """Parses the result of `compiled.as_text()`.

    >>> import jax, jax.numpy as jnp
    >>> program = parse(jax.jit(lambda a, b: a @ b).lower(jnp.ones((2, 3)), jnp.ones((3, 5))).compile().as_text())
    >>> [instruction.opcode for instruction in program.computations[program.entry].instructions.values()]
    ['parameter', 'parameter', 'dot']
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
        elif name and (match := _INSTRUCTION.match(line)):
            is_root, result, types, opcode, rest = match.groups()
            end = _closing_parenthesis(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            attributes = rest[:end] if opcode in ("parameter", "constant") else rest[end + 1 :]
            instructions[result] = Instruction(result, opcode, _parse_buffers(types), operands, attributes)
            root = result if is_root else root
    chips = math.prod(
        int(match[1]) for key in ("num_partitions", "replica_count") if (match := re.search(rf"{key}=(\d+)", header))
    )
    return Program(computations, entry, chips, header)


def trip_count(program: Program, loop: Instruction) -> int:
    """Returns how often a `while` runs its body, as noted by the compiler or compared with by its condition; 1 where unknown.

    >>> import jax, jax.numpy as jnp
    >>> loop = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) @ x, x))
    >>> program = parse(loop.lower(jnp.ones((64, 64))).compile().as_text())
    >>> instructions = program.computations[program.entry].instructions.values()
    >>> [trip_count(program, instruction) for instruction in instructions if instruction.opcode == "while"]
    [7]
    """
    known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[called_computations(loop, "condition")[0]].instructions.values()
    comparisons = [instruction for instruction in condition if "direction=LT" in instruction.attributes]
    constants = [instruction.attributes for instruction in condition if instruction.opcode == "constant"]
    limits = [int(constant) for constant in constants if constant.isdigit()]
    return limits[0] if len(comparisons) == 1 and len(limits) == 1 else 1


def execution_counts(program: Program) -> tuple[Counter[str], Counter[str]]:
    """Returns how often each computation runs: first those whose instructions run one by one, then those of fusions.

    Every branch of a conditional counts as run.

    >>> import jax, jax.numpy as jnp
    >>> loops = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.fori_loop(0, 5, lambda j, x: jnp.sin(x) @ x, x), x)
    >>> program = parse(jax.jit(loops).lower(jnp.ones((64, 64))).compile().as_text())
    >>> max(execution_counts(program)[0].values())
    18
    """
    sequential: Counter[str] = Counter()
    fused: Counter[str] = Counter()

    def visit(name: str, times: int, in_fusion: bool) -> None:
        (fused if in_fusion else sequential)[name] += times
        for instruction in program.computations[name].instructions.values():
            if instruction.opcode == "while":
                trips = trip_count(program, instruction)
                visit(called_computations(instruction, "body")[0], times * trips, in_fusion)
                visit(called_computations(instruction, "condition")[0], times * (trips + 1), in_fusion)
            elif instruction.opcode == "fusion":
                visit(called_computations(instruction, "calls")[0], times, True)
            elif instruction.opcode in ("call", "async-start", "conditional"):
                for callee in called_computations(instruction, *_CALL_ATTRIBUTES):
                    visit(callee, times, in_fusion)

    visit(program.entry, 1, False)
    return sequential, fused


def aliased_arguments(program: Program) -> set[int]:
    """Returns the indices of the arguments whose buffers are reused for results (donated arguments).

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda a, b: (a + 1, b[:1]), donate_argnums=0)
    >>> aliased_arguments(parse(step.lower(jnp.ones(4), jnp.ones(4)).compile().as_text()))
    {0}
    """
    aliases = re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}(?:, (?:may|must)-alias)?\)", program.header)
    return {int(index) for index in aliases}


def called_computations(instruction: Instruction, *keys: str) -> list[str]:
    """Returns the names of the computations that an instruction calls by the attributes `keys`.

    >>> called_computations(Instruction("loop", "while", (), ("state",), ", condition=%less, body=%next"), "body")
    ['next']
    """
    names = []
    for key in keys:
        for several, single in re.findall(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", instruction.attributes):
            names += re.findall(r"%?([\w.\-]+)", several) if several else [single]
    return names


def operand_buffers(computation: Computation, instruction: Instruction) -> tuple[Buffer, ...]:
    """Returns the buffers that an instruction of a computation takes.

    >>> main = parse(EXAMPLE).computations["main"]
    >>> operand_buffers(main, main.instructions["y"])
    (Buffer(dtype='f32', shape=(4,), space=0),)
    """
    return tuple(buffer for name in instruction.operands for buffer in computation.instructions[name].results)


def _closing_parenthesis(text: str) -> int:
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _parse_buffers(text: str) -> tuple[Buffer, ...]:
    buffers = []
    for dtype, shape, layout in _BUFFER.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.strip(" <=")) for size in shape.split(",") if size.strip())
        buffers.append(Buffer(dtype, sizes, int(space[1]) if space else 0))
    return tuple(buffers)

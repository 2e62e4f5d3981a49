"""Programs that differ in numbers alone, as one program of these numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core.state import InvalidArgument
from research.transforms.jaxpr import (
    bind_equation,
    called_program,
    constants,
    inner_programs,
    interpret,
    is_cond,
    is_literal,
    is_plain_call,
    is_program,
    layer_of,
    outputs,
    own_equations,
    parameters,
    scan,
)


class Merged(NamedTuple):
    """What several functions have in common: `call(numbers, *args)` is function i for the i-th row of each of `numbers`.

    >>> Merged(lambda numbers, x: numbers[0] * x, [np.array([2.0, 3.0])]).call([3.0], 5.0)
    15.0
    """

    call: Callable[..., Any]
    numbers: list[np.ndarray]


class Different(InvalidArgument):
    """Raised for functions that differ in more than numbers: `index` is that of the first which differs from function 0.

    >>> Different("", 3).index
    3
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


def merge(functions: Sequence[Callable[..., Any]], *args: Any) -> Merged:
    """Returns several functions as one, with the numbers in which their traced programs differ as an argument.

    The numbers are whatever a program holds as constants: a rate, a decay, a loss weight. Functions without differences need no
    numbers. `args` may be `jax.ShapeDtypeStruct`s; the result takes arguments of these shapes only. Raises `Different` for
    programs whose operations or shapes differ, and for numbers inside of an operation that cannot take them as arguments.

    >>> merged = merge([lambda x: 2.0 * jnp.sin(x), lambda x: 3.0 * jnp.sin(x)], jnp.ones(()))
    >>> merged.numbers[0].tolist(), merged.call([3.0], jnp.zeros(())).item()
    ([2.0, 3.0], 0.0)
    """
    programs, shapes = zip(*(jax.make_jaxpr(function, return_shape=True)(*args) for function in functions), strict=True)
    values: list[np.ndarray] = []
    for index, program in enumerate(programs[1:], 1):
        _compare(programs[0], program, index)
    plan = _plan(programs, values)
    if not values:
        return Merged(lambda numbers, *args: functions[0](*args), [])
    structure = jax.tree.structure(shapes[0])

    def call(numbers: Sequence[Any], *args: Any) -> Any:
        return jax.tree.unflatten(structure, _evaluate(programs[0], plan, numbers, jax.tree.leaves(args)))

    return Merged(call, values)


class _Plan(NamedTuple):
    """Where a program's numbers are: for each constant and each operand of each equation the position of its number, or None."""

    constants: list[int | None]
    operands: list[list[int | None]]
    results: list[int | None]
    inner: list[list["_Plan"]]

    def has_numbers(self) -> bool:
        own = [*self.constants, *self.results, *(number for operands in self.operands for number in operands)]
        return any(number is not None for number in own) or any(plan.has_numbers() for plans in self.inner for plan in plans)


def _compare(first: Any, other: Any, index: int) -> None:
    """Raises `Different` unless two programs consist of the same operations on the same shapes."""
    for a, b in zip(own_equations(first), own_equations(other), strict=False):
        same_shapes = [_aval(x) for x in [*a.invars, *a.outvars]] == [_aval(x) for x in [*b.invars, *b.outvars]]
        if a.primitive != b.primitive or not same_shapes or not _same_options(parameters(a), parameters(b)):
            raise Different(f"{_where(a)}: {_what(a)} in one, {_what(b)} in the other", index)
        for inner, other_inner in zip(inner_programs(a), inner_programs(b), strict=True):
            _compare(inner, other_inner, index)
    if len(own_equations(first)) != len(own_equations(other)):
        longer = max(own_equations(first), own_equations(other), key=len)
        rest = longer[min(len(own_equations(first)), len(own_equations(other)))]
        raise Different(f"{_where(rest)}: only one of them has {_what(rest)}", index)


def _same_options(first: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether two equations have the same options, but for programs and functions, which are compared otherwise."""
    return all(_same_option(value, other.get(name)) for name, value in first.items())


def _same_option(first: Any, other: Any) -> bool:
    if isinstance(first, tuple | list) and isinstance(other, tuple | list):
        return len(first) == len(other) and all(map(_same_option, first, other))
    shown = str(first)
    return is_program(first) or callable(first) or " at 0x" in shown or shown == str(other)


def _plan(programs: Sequence[Any], values: list[np.ndarray]) -> _Plan:
    """Returns where programs differ in numbers, and adds these to `values`, stacked."""

    def number(atoms: Sequence[Any]) -> int | None:
        found = [np.asarray(atom) for atom in atoms]
        if all(np.array_equal(each, found[0], equal_nan=each.dtype.kind == "f") for each in found):
            return None
        stacked = np.stack(found)
        same = (i for i, known in enumerate(values) if known.dtype == stacked.dtype and np.array_equal(known, stacked))
        position = next(same, len(values))
        values.extend([stacked] if position == len(values) else [])
        return position

    def literal(atoms: Sequence[Any]) -> int | None:
        return number([atom.val for atom in atoms]) if all(map(is_literal, atoms)) else None

    columns = list(zip(*map(own_equations, programs), strict=True))
    return _Plan(
        [number(column) for column in zip(*map(constants, programs), strict=True)],
        [[literal(atoms) for atoms in zip(*(equation.invars for equation in column), strict=True)] for column in columns],
        [literal(atoms) for atoms in zip(*map(outputs, programs), strict=True)],
        [[_plan(inner, values) for inner in zip(*map(inner_programs, column), strict=True)] for column in columns],
    )


def _evaluate(program: Any, plan: _Plan, numbers: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Returns a program's results with other numbers."""
    steps = iter(zip(plan.operands, plan.inner, strict=True))
    closed = iter(plan.constants)

    def lift(value: Any) -> Any:  # constants come before the first equation
        position = next(closed, None)
        return value if position is None else numbers[position]

    def apply(equation: Any, operands: list[Any]) -> list[Any]:
        positions, inner = next(steps)
        operands = [
            o if i is None else _number(numbers[i], atom) for o, i, atom in zip(operands, positions, equation.invars, strict=True)
        ]
        if not any(each.has_numbers() for each in inner):
            return bind_equation(equation, operands)
        return _call(equation, inner, numbers, operands)

    results = interpret(program, args, apply, lift)
    return [
        result if i is None else _number(numbers[i], atom)
        for result, i, atom in zip(results, plan.results, outputs(program), strict=True)
    ]


def _call(equation: Any, plans: Sequence[_Plan], numbers: Sequence[Any], operands: list[Any]) -> list[Any]:
    """Returns the results of an equation that holds programs with numbers."""
    inner, loop = inner_programs(equation), scan(equation)
    if is_plain_call(equation):
        return _evaluate(called_program(equation), plans[0], numbers, operands)
    if is_cond(equation):
        index, *args = operands
        branches = [
            lambda *args, program=program, plan=plan: _evaluate(program, plan, numbers, args)
            for program, plan in zip(inner, plans, strict=True)
        ]
        return list(jax.lax.switch(index, branches, *args))
    if loop is not None:
        consts, carry, inputs = np.split(np.arange(len(operands)), [loop.num_consts, loop.num_consts + loop.num_carry])
        fixed = [operands[i] for i in consts]

        def body(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            results = _evaluate(loop.body, plans[0], numbers, [*fixed, *state, *slices])
            return results[: loop.num_carry], results[loop.num_carry :]

        state, stacked = jax.lax.scan(
            body,
            [operands[i] for i in carry],
            [operands[i] for i in inputs],
            length=loop.length,
            reverse=loop.reverse,
            unroll=loop.unroll,
        )
        return [*state, *stacked]
    raise Different(f"{_where(equation)}: numbers inside of {equation.primitive.name!r} can't vary", 1)


def _number(number: Any, atom: Any) -> Any:
    return jnp.asarray(number, atom.aval.dtype)


def _aval(atom: Any) -> tuple[Any, Any]:
    return getattr(atom.aval, "shape", None), getattr(atom.aval, "dtype", None)


def _where(equation: Any) -> str:
    return f"in {layer_of(equation)!r}" if layer_of(equation) else "outside of the layers"


def _what(equation: Any) -> str:
    shapes = ", ".join(str(getattr(variable.aval, "shape", "")) for variable in equation.outvars[:1])
    return f"{equation.primitive.name!r} of shape {shapes}"

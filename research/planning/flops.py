"""Model FLOPs: the matrix products and convolutions that the results of a function need, without recomputation.

A program may compute some values twice to save memory (`jax.checkpoint`). Model FLOPs are the same with and without. So values
are numbered (value numbering, as in common subexpression elimination): the same primitive on the same operands gives the same
number, and each number counts once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.transforms.jaxpr import (
    Scan,
    called_program,
    inner_programs,
    inputs,
    interpret,
    is_program,
    parameters,
    scan,
)

IDENTITY_PRIMITIVES = ("optimization_barrier", "sharding_constraint", "copy", "copy_p", "name")


def model_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the FLOPs of the matrix products and convolutions that a function's results need; a multiply-add counts as two.

    `args` are arrays or `jax.ShapeDtypeStruct`s. Values that `jax.checkpoint` computes again count once; values that no result
    depends on do not count. The body of a `lax.scan` counts once per iteration. Of a `cond`, the branch with the most FLOPs
    counts. The body of a `while_loop`, whose trip count is unknown, counts once. Pallas kernels count as zero.

    >>> import jax.numpy as jnp
    >>> def layers(x, weights):
    ...     return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0].sum()
    >>> x, weights = jnp.ones((8, 16)), jnp.ones((3, 16, 16))
    >>> model_flops(layers, x, weights) == 3 * 2 * 8 * 16 * 16
    True
    >>> model_flops(jax.grad(jax.checkpoint(layers), 1), x, weights) == model_flops(jax.grad(layers, 1), x, weights)
    True
    """
    return _program_flops(jax.make_jaxpr(function)(*args))


@functools.cache
def count_taps(
    inputs: int, outputs: int, window: int, stride: int = 1, padding: int = 0, dilation: int = 1, input_dilation: int = 1
) -> int:
    """Returns how many (output, window tap) pairs along one axis of a convolution meet an input.

    Taps on padding, and on the gaps of a dilated input, do not count. `padding` is the padding before the first input, `dilation`
    the distance between two taps of the window, `input_dilation` the distance between two inputs.

    >>> count_taps(inputs=5, outputs=5, window=3, padding=1)
    13
    """
    starts = np.arange(outputs, dtype=np.int64) * stride - padding
    end = (inputs - 1) * input_dilation + 1
    count = 0
    for offset in range(0, window * dilation, dilation):
        positions = starts + offset
        count += int(np.count_nonzero((positions >= 0) & (positions < end) & (positions % input_dilation == 0)))
    return count


class _Values(NamedTuple):
    """A value numbering.

    `numbers` maps a value's key to its number, `dependencies[number]` are the numbers that it is computed from, `costs` the
    FLOPs of computing it. `stacked` maps the stacked output of a scan to the scan's length and the number of one slice.
    """

    numbers: dict[Any, int]
    dependencies: list[tuple[int, ...]]
    costs: dict[int, int]
    stacked: dict[int, tuple[int, int]]

    def number(self, key: Any, dependencies: Iterable[int] = ()) -> int:
        """Returns the number of a key; a new key gets a new number."""
        if key not in self.numbers:
            self.numbers[key] = len(self.dependencies)
            self.dependencies.append(tuple(dependencies))
        return self.numbers[key]


def _program_flops(program: Any) -> int:
    values = _Values({}, [], {}, {})
    arguments = [values.number(("argument", i)) for i in range(len(inputs(program)))]
    pending = _number_results(values, program, arguments, 1)
    needed: set[int] = set()
    while pending:
        number = pending.pop()
        if number not in needed:
            needed.add(number)
            pending.extend(values.dependencies[number])
    return sum(cost for number, cost in values.costs.items() if number in needed)


def _number_results(values: _Values, program: Any, arguments: Sequence[int], repeats: int) -> list[int]:
    """Returns the numbers of a program's results, from those of its arguments. The program runs `repeats` times."""

    def number_constant(value: Any) -> int:
        key = _key(value if isinstance(value, jax.Array) else np.asarray(value))
        return values.number(("constant", str(jax.typeof(value).dtype), key))

    def number_equation(equation: Any, operands: list[int]) -> list[int]:
        name, inner, loop = equation.primitive.name, called_program(equation), scan(equation)
        if name in IDENTITY_PRIMITIVES:
            return operands
        if inner is not None:
            return _number_results(values, inner, operands, repeats)
        if loop is not None:
            return _number_scan_results(values, loop, operands, repeats)
        number = values.number((name, _key(parameters(equation)), *operands), operands)
        flops = _equation_flops(equation)
        if flops:
            values.costs.setdefault(number, flops * repeats)
        return [values.number((number, i), (number,)) for i in range(len(equation.outvars))]

    return interpret(program, arguments, number_equation, number_constant)


def _number_scan_results(values: _Values, loop: Scan, operands: list[int], repeats: int) -> list[int]:
    """Returns the numbers of a scan's results.

    A slice of the stacked output of one scan has the same number in a later scan of the same length that iterates over that
    output: this is how a forward pass and its recomputation in the backward pass get the same numbers.
    """
    num_consts, num_carry, length, reverse = loop.num_consts, loop.num_carry, loop.length, loop.reverse
    consts, initial, iterated = (
        operands[:num_consts],
        operands[num_consts : num_consts + num_carry],
        operands[num_consts + num_carry :],
    )
    slices = [
        values.stacked[number][1]
        if values.stacked.get(number, (0, 0))[0] == length
        else values.number(("slice", length, number), (number,))
        for number in iterated
    ]

    def number_body(carry: list[int]) -> list[int]:
        return _number_results(values, loop.body, [*consts, *carry, *slices], repeats * length)

    # A carry is identified by its initial value and by its next value. The next value is known only after numbering the body, so
    # the body is numbered until the number of distinct carries is stable. Values of earlier rounds are needed by no result, so
    # they do not count.
    carry, num_distinct = [values.number(("carry", length, reverse, start), (start,)) for start in initial], 0
    while num_carry and len(set(carry)) > num_distinct:
        num_distinct = len(set(carry))
        following = number_body(carry)[:num_carry]
        pairs = zip(initial, following, strict=True)
        carry = [values.number(("carry", length, reverse, start, after), (start,)) for start, after in pairs]
    outputs = number_body(carry)
    for number, after in zip(carry, outputs[:num_carry], strict=True):
        values.dependencies[number] = (*values.dependencies[number], after)
    final = [values.number(("final", number), (number,)) for number in carry]
    stacks = [values.number(("stack", length, output), (output,)) for output in outputs[num_carry:]]
    values.stacked.update((stack, (length, output)) for stack, output in zip(stacks, outputs[num_carry:], strict=True))
    return [*final, *stacks]


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, parameters(equation)
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        return _convolution_flops(params, *(atom.aval.shape for atom in (*equation.invars, *equation.outvars)))
    flops = [_program_flops(program) for program in inner_programs(equation)]
    return (max if name == "cond" else sum)(flops) if flops else 0


def _convolution_flops(params: Any, inputs: Sequence[int], kernel: Sequence[int], outputs: Sequence[int]) -> int:
    numbers = params["dimension_numbers"]
    batch, *_ = numbers.lhs_spec
    features_out, features_in, *window = numbers.rhs_spec
    taps = math.prod(
        count_taps(
            inputs[numbers.lhs_spec[2 + i]],
            outputs[numbers.out_spec[2 + i]],
            kernel[axis],
            params["window_strides"][i],
            params["padding"][i][0],
            params["rhs_dilation"][i],
            params["lhs_dilation"][i],
        )
        for i, axis in enumerate(window)
    )
    return 2 * inputs[batch] // params["batch_group_count"] * kernel[features_out] * kernel[features_in] * taps


def _key(value: Any) -> Any:
    """Returns a hashable key of an equation's parameters or of a constant; equal values have equal keys."""
    if isinstance(value, dict):
        return tuple(sorted((name, _key(item)) for name, item in value.items() if name not in ("name", "debug_info")))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_key(item) for item in value)
    if isinstance(value, np.ndarray) or np.isscalar(value):
        array = np.asarray(value)
        return (array.shape, str(array.dtype), array.tobytes())
    if is_program(value):
        return str(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value

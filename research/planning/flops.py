"""What the mathematics of a function needs: the operations of its matrix products and convolutions, each thing counted once.

A program that is to fit into memory computes some values twice (`jax.checkpoint`). What a model needs is the same with and
without, so values are numbered: the same operation on the same operands gives the same number, and each number counts once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np

CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
SAME = ("optimization_barrier", "sharding_constraint", "copy", "copy_p", "name")  # what they give is what they are given


def model_flops(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions of the matrix products and convolutions that a function's results need.

    `args` are arrays or `jax.ShapeDtypeStruct`s. What is computed again by `jax.checkpoint` counts once, what no result needs not
    at all. A loop's body counts as often as a `lax.scan` runs it; of a `cond` the dearest branch; a `while_loop`, whose length
    nobody knows, once. What is inside a hand-written kernel (Pallas) is not looked into.

    >>> import jax.numpy as jnp
    >>> def layers(x, weights):
    ...     return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0].sum()
    >>> x, weights = jnp.ones((8, 16)), jnp.ones((3, 16, 16))
    >>> model_flops(layers, x, weights) == 3 * 2 * 8 * 16 * 16
    True
    >>> model_flops(jax.grad(jax.checkpoint(layers), 1), x, weights) == model_flops(jax.grad(layers, 1), x, weights)
    True
    """
    return _needed(jax.make_jaxpr(function)(*args))


@functools.cache
def taps(inputs: int, outputs: int, window: int, stride: int = 1, low: int = 0, spread: int = 1, gaps: int = 1) -> int:
    """How often a window that passes over an axis meets an input: neither padding nor a gap between inputs.

    `low` is the padding in front, `spread` the distance between the window's taps, `gaps` that between inputs.

    >>> taps(inputs=5, outputs=5, window=3, low=1)
    13
    """
    at = np.arange(outputs, dtype=np.int64) * stride - low
    end = (inputs - 1) * gaps + 1
    found = 0
    for tap in range(0, window * spread, spread):
        met = at + tap
        found += int(np.count_nonzero((met >= 0) & (met < end) & (met % gaps == 0)))
    return found


class _Values(NamedTuple):
    """Numbered values: by what they are, what each is made of, what each costs, and which are the parts of a loop's output."""

    known: dict[Any, int]
    parts: list[tuple[int, ...]]
    costs: dict[int, int]
    stacked: dict[int, tuple[int, int]]

    def number(self, key: Any, parts: Iterable[int] = ()) -> int:
        """The number of what is called so, a new one where it was not met before."""
        if key not in self.known:
            self.known[key] = len(self.parts)
            self.parts.append(tuple(parts))
        return self.known[key]


def _needed(closed: Any) -> int:
    values = _Values({}, [], {}, {})
    given = [values.number(("argument", i)) for i in range(len(closed.jaxpr.invars))]
    pending, seen = _walk(values, closed.jaxpr, closed.consts, given, 1), set()
    while pending:
        number = pending.pop()
        if number not in seen:
            seen.add(number)
            pending.extend(values.parts[number])
    return sum(cost for number, cost in values.costs.items() if number in seen)


def _walk(values: _Values, jaxpr: Any, consts: Sequence[Any], given: Sequence[int], times: int) -> list[int]:
    """The numbers of a program's results from those of its arguments; it runs so many times."""
    numbers = dict(zip(jaxpr.invars, given, strict=True))
    numbers.update((variable, values.number(_key(const))) for variable, const in zip(jaxpr.constvars, consts, strict=True))

    def of(atom: Any) -> int:
        if isinstance(atom, jax.extend.core.Literal):
            return values.number(("literal", str(jax.typeof(atom.val).dtype), _key(np.asarray(atom.val))))
        return numbers[atom]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, [of(atom) for atom in equation.invars]
        if name in SAME:
            found = operands
        elif name in CALLS:
            inner = equation.params[CALLS[name]]
            found = _walk(values, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, times)
        elif name == "scan":
            found = _scanned(values, equation.params, operands, times)
        else:
            whole = values.number((name, _key(equation.params), *operands), operands)
            found = [values.number((whole, i), (whole,)) for i in range(len(equation.outvars))]
            cost = _cost(equation)
            if cost:
                values.costs.setdefault(whole, cost * times)
        numbers.update(zip(equation.outvars, found, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _scanned(values: _Values, params: Any, operands: list[int], times: int) -> list[int]:
    """A loop: what one passes through at an index is the same value for a later loop that takes it up at that index."""
    length, fixed, carries = params["length"], params["num_consts"], params["num_carry"]
    consts, starts, columns = operands[:fixed], operands[fixed : fixed + carries], operands[fixed + carries :]
    slices = [
        values.stacked[column][1]
        if values.stacked.get(column, (0, 0))[0] == length
        else values.number(("slice", length, column), (column,))
        for column in columns
    ]
    inner, direction = params["jaxpr"], params["reverse"]

    def body(carried: list[int]) -> list[int]:
        return _walk(values, inner.jaxpr, inner.consts, [*consts, *carried, *slices], times * length)

    # A carried value is what it starts from and how it goes on. The latter is known when the body was walked, so this is done
    # until nothing more is told apart. What the earlier walks found is part of no result and does not count.
    carried, told = [values.number(("carried", length, direction, start), (start,)) for start in starts], 0
    while carries and len(set(carried)) > told:
        told = len(set(carried))
        onward = body(carried)[:carries]
        pairs = zip(starts, onward, strict=True)
        carried = [values.number(("carried", length, direction, start, on), (start,)) for start, on in pairs]
    outputs = body(carried)
    for number, on in zip(carried, outputs[:carries], strict=True):
        values.parts[number] = (*values.parts[number], on)
    last = [values.number(("last", number), (number,)) for number in carried]
    stacks = [values.number(("stack", length, output), (output,)) for output in outputs[carries:]]
    values.stacked.update((stack, (length, output)) for stack, output in zip(stacks, outputs[carries:], strict=True))
    return [*last, *stacks]


def _cost(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (left, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in left)
    if name == "conv_general_dilated":
        return _convolution(params, *(atom.aval.shape for atom in (*equation.invars, *equation.outvars)))
    inside = [leaf for leaf in jax.tree.leaves(list(params.values()), is_leaf=_is_program) if _is_program(leaf)]
    costs = [_needed(each if hasattr(each, "consts") else _Closed(each, ())) for each in inside]
    return (max if name == "cond" else sum)(costs) if costs else 0


class _Closed(NamedTuple):
    jaxpr: Any
    consts: Sequence[Any]


def _convolution(params: Any, inputs: Sequence[int], kernel: Sequence[int], outputs: Sequence[int]) -> int:
    numbers = params["dimension_numbers"]
    batch, *_ = numbers.lhs_spec
    features_out, features_in, *window = numbers.rhs_spec
    met = math.prod(
        taps(
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
    return 2 * inputs[batch] // params["batch_group_count"] * kernel[features_out] * kernel[features_in] * met


def _key(value: Any) -> Any:
    """Something to tell an equation's settings and constants by: equal for equal ones."""
    if isinstance(value, dict):
        return tuple(sorted((name, _key(each)) for name, each in value.items() if name not in ("name", "debug_info")))
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_key(each) for each in value)
    if isinstance(value, np.ndarray) or np.isscalar(value):
        array = np.asarray(value)
        return (array.shape, str(array.dtype), array.tobytes())
    if _is_program(value):
        return str(value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def _is_program(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)

"""Weights split over `fsdp` are gathered where they are used, and only there: this keeps memory small.

Left alone, the compiler propagates the sharding of a weight to what it is multiplied with and splits activations by features,
which takes far more memory and traffic than the weight. So in the traced step each product, convolution, lookup or loop that
takes a split weight gets a gathered one instead. Elementwise operations, such as an optimizer's, work on the local shards.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.transforms.jaxpr import (
    bind_checkpoint,
    bind_equation,
    bind_scan,
    called_program,
    interpret,
    is_checkpoint,
    is_plain_call,
    parameters,
    scan,
)

T = TypeVar("T")
AtUse = NamedSharding | None  # the sharding of a value where it is used; None: unchanged

ELEMENTWISE = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow reduce_precision
    rem round rsqrt select_n shift_left shift_right_logical sign sin sqrt square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905
UNCHANGED = ("optimization_barrier", "name")  # each result is the operand at its position
REDUCTIONS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")


def gather_at_use(function: Callable[..., T], at_use: PyTree) -> Callable[..., T]:
    """Wraps a function so that leaves of its first argument are gathered where they are used.

    `at_use` has the structure of the first argument: a leaf's sharding where it is used, or None to leave the leaf unchanged.
    The result of an elementwise operation on such a leaf is treated like the leaf: a weight in half precision, an updated
    weight. Each use gathers again, so that no complete weight is kept from the forward to the backward pass.

    >>> import jax.numpy as jnp
    >>> one_device = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> product = gather_at_use(lambda weights, x: x @ weights["kernel"], {"kernel": NamedSharding(one_device, P())})
    >>> product({"kernel": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    Array([[2.]], dtype=float32)
    """

    def call(first: Any, *rest: Any) -> T:
        shardings = jax.tree.leaves(at_use, is_leaf=lambda leaf: leaf is None)
        if jax.config.jax_disable_jit or not any(shardings):  # type: ignore[attr-defined]
            return function(first, *rest)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(first, *rest)
        leaves = jax.tree.leaves((first, *rest))
        unchanged = [None] * (len(leaves) - len(shardings))
        outputs, _ = _evaluate(program, leaves, [*shardings, *unchanged])
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return call


def _evaluate(program: Any, args: Sequence[Any], args_at_use: Sequence[AtUse]) -> tuple[list[Any], list[AtUse]]:
    """Evaluates a program equation by equation. Returns its outputs, and the sharding of each where it is used."""
    used: set[Any] = set()

    def apply(equation: Any, pairs: list[tuple[Any, AtUse]]) -> Sequence[tuple[Any, AtUse]]:
        operands, shardings = [value for value, _ in pairs], [use for _, use in pairs]
        name, split = (
            equation.primitive.name,
            {atom for atom, use in zip(equation.invars, shardings, strict=True) if use is not None},
        )
        results_at_use: list[AtUse] = [None] * len(equation.outvars)
        higher_order = next((rule for test, rule in _HIGHER_ORDER if test(equation)), None)
        if not any(shardings) or name in REDUCTIONS:
            results = bind_equation(equation, operands)
        elif higher_order is not None:
            results, results_at_use = higher_order(equation, operands, shardings)
            used.update(split)
        elif name in UNCHANGED:
            results, results_at_use = bind_equation(equation, operands), shardings
        elif name in ELEMENTWISE:
            results = bind_equation(equation, operands)
            results_at_use = [_elementwise_at_use(out.aval.shape, equation.invars, shardings) for out in equation.outvars]
        elif name == "transpose":
            results = bind_equation(equation, operands)
            results_at_use = [_transposed(shardings[0], parameters(equation)["permutation"])]
        else:
            # The barrier ties a repeated gather to the other operands: merged with the first one, its result would be kept.
            tied = jax.lax.optimization_barrier(operands) if split & used and not all(shardings) else operands
            used.update(split)
            results = bind_equation(equation, [_gather(value, use) for value, use in zip(tied, shardings, strict=True)])
        return list(zip(results, results_at_use, strict=True))

    results = interpret(program, list(zip(args, args_at_use, strict=True)), apply, lambda value: (value, None))
    return [value for value, _ in results], [use for _, use in results]


def _gather(value: Any, at_use: AtUse) -> Any:
    return value if at_use is None else jax.lax.with_sharding_constraint(value, at_use)


def _elementwise_at_use(shape: tuple[int, ...], atoms: Sequence[Any], shardings: Sequence[AtUse]) -> AtUse:
    """Returns the sharding at use of the first operand that has one and has the result's shape."""
    operands = zip(atoms, shardings, strict=True)
    return next((use for atom, use in operands if use is not None and atom.aval.shape == shape), None)


def _transposed(at_use: AtUse, order: Sequence[int]) -> AtUse:
    assert at_use is not None
    parts = [*at_use.spec, *[None] * (len(order) - len(at_use.spec))]
    return NamedSharding(at_use.mesh, P(*(parts[axis] for axis in order)))


def _call(equation: Any, operands: list[Any], shardings: list[AtUse]) -> tuple[list[Any], list[AtUse]]:
    return _evaluate(called_program(equation), operands, shardings)


def _checkpoint(equation: Any, operands: list[Any], shardings: list[AtUse]) -> tuple[list[Any], list[AtUse]]:
    """Gathers inside the rematerialised program, so that recomputing gathers again."""
    results_at_use: list[AtUse] = []

    def gathering(*args: Any) -> list[Any]:
        outputs, outputs_at_use = _evaluate(called_program(equation), args, shardings)
        results_at_use[:] = outputs_at_use
        return outputs

    return bind_checkpoint(equation, gathering, operands), results_at_use


def _scan(equation: Any, operands: list[Any], shardings: list[AtUse]) -> tuple[list[Any], list[AtUse]]:
    """Gathers inside the loop's body."""
    loop = scan(equation)
    assert loop is not None
    num_consts, num_carry = loop.num_consts, loop.num_carry
    xs_start = num_consts + num_carry
    sliced = [use if use is None else NamedSharding(use.mesh, P(*use.spec[1:])) for use in shardings[xs_start:]]
    body_shardings = [*shardings[:xs_start], *sliced]

    results = bind_scan(loop, lambda *args: _evaluate(loop.body, args, body_shardings)[0], operands)
    return results, [*shardings[num_consts:xs_start], *[None] * (len(results) - num_carry)]


_HIGHER_ORDER = ((is_plain_call, _call), (is_checkpoint, _checkpoint), (scan, _scan))

"""Derivatives that are 0 where those of a square root, a power or a quotient are infinite."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from research.transforms.jaxpr import bind_equation, bind_with, equations, inner_programs, interpret, is_literal, parameters

T = TypeVar("T")


def finite_derivatives(function: Callable[..., T]) -> Callable[..., T]:
    """Wraps a function so that its derivatives are 0 where a square root or another power of 0, or a quotient by 0, has none.

    The values stay the same. An optimizer that divides by the square root of a mean of squared gradients, such as Adam, has a
    slope there that is infinite where all gradients of a weight were 0 so far, and the derivative of training becomes NaN: the
    infinity times the 0 by which the gradient changes. The same happens to quotients by a norm of 0 that `jnp.where` leaves out.
    Derivatives that the function itself takes stay what they are. Functions with derivatives of their own inside
    (`jax.custom_jvp`, `jax.custom_vjp`) keep those, and the bodies of a `while_loop` are not changed.

    >>> def first_step(gradient):
    ...     return gradient / (jnp.sqrt(gradient**2) + 1e-8)
    >>> float(jax.grad(first_step)(0.0)), float(jax.grad(finite_derivatives(first_step))(0.0))
    (nan, 100000000.0)
    """

    def call(*args: Any) -> T:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = interpret_with_finite_derivatives(program, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    call.__name__ = getattr(function, "__name__", "call")
    return call


def interpret_with_finite_derivatives(program: Any, arguments: Sequence[Any]) -> list[Any]:
    """Returns a traced program's results, with the derivatives of `finite_derivatives`.

    >>> program = jax.make_jaxpr(jnp.sqrt)(0.0)
    >>> float(jax.grad(lambda x: interpret_with_finite_derivatives(program, [x])[0])(0.0))
    0.0
    """
    return interpret(program, arguments, _apply)


def _apply(equation: Any, operands: list[Any]) -> list[Any]:
    if _may_be_singular(equation):
        return [_finite(equation, operands)]
    if any(_may_be_singular(inner) for program in inner_programs(equation) for inner in equations(program)):
        results = bind_with(equation, operands, _apply)
        if results is not None:
            return results
    return bind_equation(equation, operands)


def _may_be_singular(equation: Any) -> bool:
    name, operands = equation.primitive.name, equation.invars
    if name not in ("sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "div") or not _is_float(equation.outvars[0]):
        return False
    if name == "integer_pow":
        return bool(parameters(equation)["y"] < 0)
    if name == "pow":  # x**2 and 0.9**x have derivatives everywhere
        return not (is_literal(operands[0]) or (is_literal(operands[1]) and np.all(operands[1].val >= 1)))
    return not is_literal(operands[name == "div"])


def _is_float(atom: Any) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.floating))


def _finite(equation: Any, operands: Sequence[Any]) -> Any:
    """Returns the result of an operation, whose derivatives are 0 at its singular points."""
    variable = [i for i, atom in enumerate(equation.invars) if not is_literal(atom)]
    position = variable.index(equation.primitive.name == "div")  # of the operand that is 0 there

    def value(*arguments: Any) -> Any:
        complete = list(operands)
        for i, argument in zip(variable, arguments, strict=True):
            complete[i] = argument
        return bind_equation(equation, complete)[0]

    @jax.custom_jvp
    def call(*arguments: Any) -> Any:
        return value(*arguments)

    @call.defjvp
    def differentiate(arguments: Any, tangents: Any) -> tuple[Any, Any]:
        elsewhere, zero = list(arguments), arguments[position] == 0
        if equation.primitive.name == "pow":
            exponent = arguments[1] if len(variable) == 2 else operands[1]
            zero &= exponent < 1
        # The derivative is taken at another point, so that no infinity gets into a product with 0.
        elsewhere[position] = jnp.where(zero, jnp.ones_like(arguments[position]), arguments[position])
        _, tangent = jax.jvp(value, elsewhere, list(tangents))
        return call(*arguments), jnp.where(zero, jnp.zeros_like(tangent), tangent)

    return call(*(operands[i] for i in variable))

"""What XLA's CPU compiler does otherwise inside a loop than outside: where it is slower, and where it rounds differently."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from research.cpu.rewrite import for_this_cpu
from research.transforms.jaxpr import called_program, equations, inner_programs, inputs, is_literal, own_equations

S = TypeVar("S")
T = TypeVar("T")

# The compiler hoists none of these on its own: it repeats them in each iteration, as it does outside of loops.
REPEATED = {"iota", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "random_wrap"}


def runs_well_in_loop(program: jax.stages.Traced) -> bool:
    """Returns whether a traced program is as fast inside a loop as outside, and gives the same bits.

    On the CPU this is false for programs with convolutions: inside a loop XLA runs them on one thread, with other kernels, which
    round differently. On other platforms it is always true.

    >>> runs_well_in_loop(jax.jit(jnp.dot).trace(jnp.ones(2), jnp.ones(2)))
    True
    >>> runs_well_in_loop(jax.jit(jnp.convolve).trace(jnp.ones(2), jnp.ones(2)))
    False
    """
    if jax.default_backend() != "cpu":
        return True
    return all(equation.primitive.name != "conv_general_dilated" for equation in equations(program.jaxpr))


def without_hoisting(step: Callable[[S, Any], T]) -> Callable[[S, Any], T]:
    """Wraps a step for the body of a loop so that on the CPU nothing that it computes is hoisted out of the loop.

    XLA computes before the loop what depends on neither the state nor the batch, such as the sines of a position encoding.
    Outside of a loop it fuses such a computation with what uses the result, and vectorizes and rounds it otherwise. It hoists
    nothing out of a branch, so a step with such a computation becomes the branch that is always taken.

    >>> def step(state, batch):
    ...     return state + batch * jnp.sin(jnp.arange(3.0))
    >>> "cond" in str(jax.make_jaxpr(without_hoisting(step))(jnp.zeros(3), jnp.ones(3)))
    True
    """

    def call(state: S, batch: Any) -> T:
        if not for_this_cpu():
            return step(state, batch)
        program, shapes = jax.make_jaxpr(step, return_shape=True)(state, batch)
        condition = _always_true((state, batch))
        if condition is None or not _has_invariants(program, set(inputs(program))):
            return step(state, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        result: T = jax.lax.cond(condition, step, lambda state, batch: zeros, state, batch)
        return result

    return call


def _has_invariants(program: Any, varying: set[Any]) -> bool:
    """Returns whether a program computes an array, other than of integers, from nothing that varies."""
    for equation in own_equations(program):
        operands = [not is_literal(atom) and atom in varying for atom in equation.invars]
        called, inner = called_program(equation), inner_programs(equation)
        for each in inner:
            arguments = inputs(each)
            if each is called and len(arguments) == len(operands):  # else what varies inside is not known
                arguments = [variable for variable, varies in zip(arguments, operands, strict=True) if varies]
            if _has_invariants(each, set(arguments)):
                return True
        if any(operands):
            varying.update(equation.outvars)
        elif not inner and equation.primitive.name not in REPEATED and any(map(_is_rounded_or_mask, equation.outvars)):
            return True
    return False


def _is_rounded_or_mask(variable: Any) -> bool:
    value = variable.aval
    return getattr(value, "size", 1) > 1 and not jnp.issubdtype(value.dtype, jnp.integer)


def _always_true(tree: Any) -> Any:
    """Returns a condition that is true, which the compiler cannot know; None if no leaf serves to compute it."""
    for leaf in jax.tree.leaves(tree):
        dtype = jnp.dtype(leaf.dtype) if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else None
        if leaf.size and dtype is not None and dtype.kind in "fiu" and dtype.itemsize in (1, 2, 4, 8):
            word = jax.lax.bitcast_convert_type(jnp.ravel(leaf)[0], jnp.dtype(f"uint{8 * dtype.itemsize}"))
            return jax.lax.population_count(word) < 100  # no word has as many bits
    return None

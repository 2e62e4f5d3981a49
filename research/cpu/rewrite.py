"""Replaces operations that XLA's CPU compiler runs slowly by equal ones that it runs fast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.extend

from research.cpu import pooling, threefry
from research.cpu.separate import compile_separately
from research.transforms.jaxpr import bind_equation, called_program, equations, interpret, is_plain_call

T = TypeVar("T")
Rule = Callable[[Any], Callable[..., list[Any]] | None]  # equation -> (operands -> results), or None to leave it unchanged

_tracing_for_other_platform = ContextVar("tracing_for_other_platform", default=False)


@contextmanager
def for_other_platform() -> Iterator[None]:
    """Turns `rewrite` off inside the context: programs traced there are compiled for another platform than this process' CPU.

    >>> with for_other_platform():
    ...     rewrite(lambda x: x + 1, rule=lambda equation: print)(1)
    2
    """
    token = _tracing_for_other_platform.set(True)
    try:
        yield
    finally:
        _tracing_for_other_platform.reset(token)


def for_this_cpu() -> bool:
    """Returns whether what is traced now is compiled for this process' CPU, not for another platform and not run eagerly.

    >>> with for_other_platform():
    ...     for_this_cpu()
    False
    """
    eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return not eager and not _tracing_for_other_platform.get() and jax.default_backend() == "cpu"


def exact_rules(equation: Any) -> Callable[..., list[Any]] | None:
    """Returns the replacement for a pooling or random-bits equation, which gives the same bits; None for other equations.

    >>> import jax.numpy as jnp
    >>> program = jax.make_jaxpr(jax.random.normal)(jax.random.key(0))
    >>> [equation.primitive.name for equation in equations(program) if exact_rules(equation)]
    ['random_bits']
    """
    replacement = pooling.rule(equation) or threefry.rule(equation)
    return None if replacement is None else lambda *operands: [replacement(*operands)]


def separate_gathers(equation: Any) -> Callable[..., list[Any]] | None:
    """Returns the replacement for an equation that gathers, which is compiled apart from what uses it; None for other equations.

    >>> import jax.numpy as jnp
    >>> rewrite(lambda x, rows: x[rows], rule=separate_gathers)(jnp.arange(4.0), jnp.array([3, 1])).tolist()
    [3.0, 1.0]
    """
    if equation.primitive.name != "gather":
        return None
    return lambda *operands: [compile_separately(lambda *operands: bind_equation(equation, operands)[0], *operands)]


def rewrite(function: Callable[..., T], rule: Rule = exact_rules) -> Callable[..., T]:
    """Wraps a function so that on the CPU `rule` replaces equations of its program.

    Derivatives taken inside the function are rewritten too. Loop bodies, branches and rematerialized parts stay unchanged. On
    other platforms, and under `jax.disable_jit`, the function is called as it is.

    >>> import jax.numpy as jnp, keras
    >>> pool = keras.layers.MaxPooling1D(2)
    >>> def peaks(x):
    ...     return jax.grad(lambda x: pool(x).sum())(x)
    >>> rewrite(peaks)(jnp.array([[[1.0], [1.0], [2.0], [3.0], [9.0]]])).ravel().tolist()
    [1.0, 0.0, 0.0, 1.0, 0.0]
    """

    def call(*args: Any) -> T:
        if not for_this_cpu():
            return function(*args)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _evaluate(program, jax.tree.leaves(args), rule)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    call.__name__ = getattr(function, "__name__", "call")
    return call


def _evaluate(program: Any, args: list[Any], rule: Rule) -> list[Any]:
    """Evaluates a program equation by equation, with the replacements of `rule`."""

    def apply(equation: Any, operands: list[Any]) -> list[Any]:
        replacement = rule(equation)
        if replacement is not None:
            return replacement(*operands)
        if is_plain_call(equation) and any(map(rule, equations(called_program(equation)))):
            return _evaluate(called_program(equation), operands, rule)
        return bind_equation(equation, operands)

    return interpret(program, args, apply)

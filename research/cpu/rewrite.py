"""What XLA's CPU compiler computes slowly, computed otherwise: the same bits in less time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.extend

from research import pooling, threefry
from research.transforms import bound, equations

T = TypeVar("T")
Rule = Callable[[Any], Callable[..., list[Any]] | None]  # what computes an equation's results otherwise; None for one that stays

_elsewhere = ContextVar("elsewhere", default=False)


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within it programs are traced for other chips than this process has: nothing is rewritten for its CPU.

    >>> with elsewhere():
    ...     rewritten(lambda x: x + 1, rule=lambda equation: print)(1)
    2
    """
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def same_bits(equation: Any) -> Callable[..., list[Any]] | None:
    """The rule for pooling and random bits, as `pooling` and `threefry` tell.

    >>> import jax.numpy as jnp
    >>> found = [same_bits(e) is not None for e in equations(jax.make_jaxpr(jax.random.normal)(jax.random.key(0)).jaxpr)]
    >>> any(found), all(found)
    (True, False)
    """
    replaced = pooling.replacement(equation) or threefry.replacement(equation)
    return None if replaced is None else lambda *given: [replaced(*given)]


def rewritten(function: Callable[..., T], rule: Rule = same_bits) -> Callable[..., T]:
    """The same function with what a rule is for computed as it tells, on the CPU alone.

    Derivatives that are taken inside the function, too. Run eagerly (`jax.disable_jit`) it is the function itself. Inside
    loops, branches and rematerialized parts all stays as it is.

    >>> import jax.numpy as jnp, keras
    >>> pool = keras.layers.MaxPooling1D(2)
    >>> def peaks(x):
    ...     return jax.grad(lambda x: pool(x).sum())(x)
    >>> rewritten(peaks)(jnp.array([[[1.0], [1.0], [2.0], [3.0], [9.0]]])).ravel().tolist()
    [1.0, 0.0, 0.0, 1.0, 0.0]
    """

    def call(*args: Any) -> T:
        if _elsewhere.get() or jax.default_backend() != "cpu" or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*args)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(program.jaxpr, program.consts, jax.tree.leaves(args), rule))

    call.__name__ = getattr(function, "__name__", "call")
    return call


def _run(jaxpr: Any, consts: list[Any], args: list[Any], rule: Rule) -> list[Any]:
    """Runs a program, an equation after the other, with what can be replaced replaced."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given, inner, replaced = [of(atom) for atom in equation.invars], equation.params.get("jaxpr"), rule(equation)
        if replaced is not None:
            found = replaced(*given)
        elif equation.primitive.name == "jit" and any(rule(each) for each in equations(inner.jaxpr)):
            found = _run(inner.jaxpr, inner.consts, given, rule)
        else:
            found = bound(equation, given)
        values.update(zip(equation.outvars, found, strict=True))
    return [of(atom) for atom in jaxpr.outvars]

"""Split weights made whole where they are used, and only there: what keeps memory small when weights lie on many devices.

Left alone the compiler sees a split weight and splits what is multiplied with it too, by features, which takes far more memory
and traffic than the weight. So in the traced step every product, convolution, lookup or loop that takes such a weight takes one
that is gathered for it; what goes through it number by number, as an optimizer does, works on the parts.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.extend
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.transforms import bound

T = TypeVar("T")
Tag = NamedSharding | None  # how a value is to lie where it is used; None: as it lies

NUMBER_BY_NUMBER = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf erf_inv exp exp2 expm1 floor ge gt
    integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow reduce_precision
    rem round rsqrt select_n shift_left shift_right_logical sign sin sqrt square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905
REDUCTIONS = ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum")


def gathering(function: Callable[..., T], whole: PyTree) -> Callable[..., T]:
    """The same function with leaves of its first argument gathered where they are used.

    `whole` is shaped like the first argument; a sharding there says how a leaf is to lie where it is used, None that it stays.
    What is computed from a leaf number by number is treated like the leaf: a weight in half precision, or after its update. A
    second use gathers anew, so that none is kept whole from the way forth to the way back.

    >>> import jax.numpy as jnp
    >>> device = NamedSharding(jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)), P())
    >>> gathering(lambda weights, x: x @ weights["kernel"], {"kernel": device})({"kernel": jnp.ones((2, 1))}, jnp.ones((1, 2)))
    Array([[2.]], dtype=float32)
    """

    def call(first: Any, *rest: Any) -> T:
        tags = jax.tree.leaves(whole, is_leaf=lambda leaf: leaf is None)
        if jax.config.jax_disable_jit or not any(tags):  # type: ignore[attr-defined]
            return function(first, *rest)
        program, shapes = jax.make_jaxpr(function, return_shape=True)(first, *rest)
        leaves = jax.tree.leaves((first, *rest))
        outputs, _ = _run(program.jaxpr, program.consts, leaves, [*tags, *[None] * (len(leaves) - len(tags))])
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return call


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], tags: Sequence[Tag]) -> tuple[list[Any], list[Tag]]:
    """Runs a program, an equation after the other; what it gives, and how each of that is to lie where it is used."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    tagged: dict[Any, Tag] = {variable: tag for variable, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
    used: set[Any] = set()

    def of(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    def tag_of(atom: Any) -> Tag:
        return None if isinstance(atom, jax.extend.core.Literal) else tagged.get(atom)

    for equation in jaxpr.eqns:
        given, wanted = [of(atom) for atom in equation.invars], [tag_of(atom) for atom in equation.invars]
        name = equation.primitive.name
        after: list[Tag] = [None] * len(equation.outvars)
        if not any(wanted) or name in REDUCTIONS:
            found = bound(equation, given)
        elif name in _INSIDE:
            found, after = _INSIDE[name](equation, given, wanted)
        elif name in NUMBER_BY_NUMBER:
            found = bound(equation, given)
            after = [_kept(out.aval.shape, equation.invars, wanted) for out in equation.outvars]
        elif name == "transpose":
            found, after = bound(equation, given), [_transposed(wanted[0], equation.params["permutation"])]
        else:
            again = any(tag is not None and atom in used for atom, tag in zip(equation.invars, wanted, strict=True))
            used |= {atom for atom, tag in zip(equation.invars, wanted, strict=True) if tag is not None}
            # Tied to the other operands a gathering can't be one with an earlier one, whose result would have to be kept.
            tied = jax.lax.optimization_barrier(given) if again and not all(wanted) else given
            found = bound(equation, [_gathered(value, tag) for value, tag in zip(tied, wanted, strict=True)])
        values.update(zip(equation.outvars, found, strict=True))
        tagged.update((out, tag) for out, tag in zip(equation.outvars, after, strict=True) if tag is not None)
    return [of(atom) for atom in jaxpr.outvars], [tag_of(atom) for atom in jaxpr.outvars]


def _gathered(value: Any, tag: Tag) -> Any:
    return value if tag is None else jax.lax.with_sharding_constraint(value, tag)


def _kept(shape: tuple[int, ...], atoms: Sequence[Any], tags: Sequence[Tag]) -> Tag:
    """The tag of the first operand of a result's shape that has one."""
    return next((tag for atom, tag in zip(atoms, tags, strict=True) if tag is not None and atom.aval.shape == shape), None)


def _transposed(tag: Tag, order: Sequence[int]) -> Tag:
    assert tag is not None
    parts = [*tag.spec, *[None] * (len(order) - len(tag.spec))]
    return NamedSharding(tag.mesh, P(*(parts[axis] for axis in order)))


def _call(equation: Any, given: list[Any], tags: list[Tag]) -> tuple[list[Any], list[Tag]]:
    inner = equation.params["jaxpr"]
    return _run(inner.jaxpr, inner.consts, given, tags)


def _rematerialized(equation: Any, given: list[Any], tags: list[Tag]) -> tuple[list[Any], list[Tag]]:
    """The gathering goes inside: what is computed again is gathered again."""
    after: list[Tag] = []

    def inside(*args: Any) -> list[Any]:
        outputs, found = _run(equation.params["jaxpr"], [], args, tags)
        after[:] = found
        return outputs

    program = jax.make_jaxpr(inside)(*given)
    assert not program.consts
    with equation.ctx.manager:
        found = equation.primitive.bind(*given, **{**equation.params, "jaxpr": program.jaxpr})
    return list(found), after


def _scanned(equation: Any, given: list[Any], tags: list[Tag]) -> tuple[list[Any], list[Tag]]:
    """The gathering goes into the loop's body."""
    params = equation.params
    consts, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    inner = params["jaxpr"]
    sliced = [tag if tag is None else NamedSharding(tag.mesh, P(*tag.spec[1:])) for tag in tags[carried:]]
    body_tags = [*tags[:carried], *sliced]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs, _ = _run(inner.jaxpr, inner.consts, [*given[:consts], *carry, *x], body_tags)
        return outputs[: params["num_carry"]], outputs[params["num_carry"] :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, given[consts:carried], given[carried:], **options)
    return [*carry, *outputs], [*tags[consts:carried], *[None] * len(outputs)]


_INSIDE = {"jit": _call, "checkpoint": _rematerialized, "remat2": _rematerialized, "scan": _scanned}

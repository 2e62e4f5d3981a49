"""Reading traced programs (jaxprs) and evaluating their equations one at a time.

This module alone knows how JAX stores a program: JAX's releases differ in the parameters of `scan`, of `jax.checkpoint` and of
other primitives that hold programs. The rest of the code reads programs through these functions. A program is what
`jax.make_jaxpr` returns, or what an equation holds.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)

V = TypeVar("V")
_PLAIN_CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
_HI_PRIMITIVE = "call_hi_primitive"  # its parameter is an object that expands to a program, see `jax.experimental.hijax`


class Scan(NamedTuple):
    """The program of a `lax.scan`'s body, which is called with constants, carry and a slice of the inputs, and its options.

    The body returns the next carry and a slice of the stacked outputs.
    """

    body: Any
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def equations(program: Any) -> Iterator[Any]:
    """Iterates over the equations of a program and, after each, over those of the programs that it holds.

    >>> [e.primitive.name for e in equations(jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + 1)(0.0))]
    ['jit', 'sin', 'add']
    """
    for equation in own_equations(program):
        yield equation
        for inner in inner_programs(equation):
            yield from equations(inner)


def own_equations(program: Any) -> Sequence[Any]:
    """Returns the equations of a program without those of the programs that they hold.

    >>> [e.primitive.name for e in own_equations(jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + 1)(0.0))]
    ['jit', 'add']
    """
    return getattr(program, "jaxpr", program).eqns


def inputs(program: Any) -> Sequence[Any]:
    """Returns the variables of a program's arguments."""
    return getattr(program, "jaxpr", program).invars


def outputs(program: Any) -> Sequence[Any]:
    """Returns the variables and literals that are a program's results.

    >>> program = jax.make_jaxpr(lambda x, y: (y, x + y))(1.0, 2.0)
    >>> [result in inputs(program) for result in outputs(program)]
    [True, False]
    """
    return getattr(program, "jaxpr", program).outvars


def constants(program: Any) -> Sequence[Any]:
    """Returns the arrays that a program's function closed over."""
    return getattr(program, "consts", ())


def constant_variables(program: Any) -> Sequence[Any]:
    """Returns the variables that stand for `constants` in a program's equations."""
    return getattr(program, "jaxpr", program).constvars


def is_literal(atom: Any) -> bool:
    """Returns whether an operand of an equation is a constant written in it, not a variable."""
    return isinstance(atom, jax.extend.core.Literal)


def interpret(
    program: Any,
    arguments: Sequence[V],
    apply: Callable[[Any, list[V]], Sequence[V]],
    lift: Callable[[Any], V] = lambda value: value,
) -> list[V]:
    """Returns a program's results, computed by `apply(equation, operands) -> results`, called for one equation after another.

    Values can be arrays or whatever else `apply` computes with; `lift` turns a constant of the program into such a value.

    >>> program = jax.make_jaxpr(lambda x, y: (jnp.sin(x) * y, x))(1.0, 2.0)
    >>> interpret(program, ["x", "y"], lambda equation, names: [f"{equation.primitive}({', '.join(names)})"])
    ['mul(sin(x), y)', 'x']
    """
    jaxpr = getattr(program, "jaxpr", program)
    values: dict[Any, V] = dict(zip(jaxpr.constvars, map(lift, constants(program)), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> V:
        return lift(atom.val) if is_literal(atom) else values[atom]

    for equation in jaxpr.eqns:
        values.update(zip(equation.outvars, apply(equation, [read(atom) for atom in equation.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind_equation(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Returns the results of a program's equation for these operands, as part of the same layer (`layer_of`).

    >>> (equation,) = own_equations(jax.make_jaxpr(jnp.sin)(0.0))
    >>> [float(result) for result in bind_equation(equation, [jnp.zeros(())])]
    [0.0]
    """
    with in_layer(equation), equation.ctx.manager:
        results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return list(results) if equation.primitive.multiple_results else [results]


def parameters(equation: Any) -> dict[str, Any]:
    """Returns the parameters of an operation on arrays: a product's dimension numbers, a window's strides.

    Of an equation that holds programs read `called_program`, `scan` and `inner_programs`.

    >>> (equation,) = own_equations(jax.make_jaxpr(lambda x: x.T)(jnp.ones((2, 3))))
    >>> parameters(equation)["permutation"]
    (1, 0)
    """
    return equation.params


def collective_axes(equation: Any) -> Sequence[Any]:
    """Returns the names of the mapped axes over which a collective such as `psum` reduces; empty for other operations."""
    return equation.params.get("axes", ())


def inner_programs(equation: Any) -> list[Any]:
    """Returns all programs that an equation holds: a loop's body and condition, the branches of a `cond`.

    >>> *_, equation = own_equations(jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x))(0.0))
    >>> [own_equations(branch)[0].primitive.name for branch in inner_programs(equation)]
    ['cos', 'sin']
    """
    if equation.primitive.name == _HI_PRIMITIVE:
        return [_expanded(equation)]
    return [leaf for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program) if is_program(leaf)]


def is_program(value: Any) -> bool:
    """Returns whether a value is a traced program."""
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def called_program(equation: Any) -> Any | None:
    """Returns the program that an equation runs once, with the equation's operands and results, or None if it does not.

    These are `jax.jit`, `jax.checkpoint`, and functions with derivatives of their own.

    >>> (equation,) = own_equations(jax.make_jaxpr(jax.checkpoint(jnp.sin))(0.0))
    >>> [inner.primitive.name for inner in own_equations(called_program(equation))]
    ['sin']
    """
    if equation.primitive.name == _HI_PRIMITIVE:
        return _expanded(equation)
    named_jaxpr = ("jit", "pjit", *_CHECKPOINTS)
    return equation.params.get("jaxpr" if equation.primitive.name in named_jaxpr else "call_jaxpr")


def is_plain_call(equation: Any) -> bool:
    """Returns whether an equation only calls a program, as `jax.jit` does: evaluating the program instead changes nothing."""
    return equation.primitive.name in _PLAIN_CALLS


def is_cond(equation: Any) -> bool:
    """Returns whether an equation runs one of its `inner_programs`: that of its first operand's number, on the other operands.

    >>> program = jax.make_jaxpr(lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos], x))(0, 0.0)
    >>> [is_cond(equation) for equation in own_equations(program)][-2:]
    [False, True]
    """
    return equation.primitive.name == "cond"


def is_checkpoint(equation: Any) -> bool:
    """Returns whether an equation is a part that `jax.checkpoint` computes again in the backward pass.

    >>> [is_checkpoint(e) for e in own_equations(jax.make_jaxpr(lambda x: jax.checkpoint(jnp.sin)(x) + 1)(0.0))]
    [True, False]
    """
    if equation.primitive.name == _HI_PRIMITIVE:
        return "policy" in equation.params["_prim"].params
    return equation.primitive.name in _CHECKPOINTS


def bind_checkpoint(equation: Any, function: Callable[..., list[Any]], operands: Sequence[Any]) -> list[Any]:
    """Returns the results of another function, computed again in the backward pass as the equation's own program is.

    `function` takes the operands one by one and returns a list, like the equation's program; it closes over no arrays.

    >>> (equation,) = own_equations(jax.make_jaxpr(jax.checkpoint(jnp.sin))(0.0))
    >>> bind_checkpoint(equation, lambda x: [x + 1], [jnp.ones(())])
    [Array(2., dtype=float32)]
    """
    with in_layer(equation), equation.ctx.manager:
        if equation.primitive.name == _HI_PRIMITIVE:
            options = equation.params["_prim"].params
            options = {name: options[name] for name in ("policy", "prevent_cse") if name in options}
            return list(jax.checkpoint(function, **options)(*operands))
        # Not by `jax.checkpoint`: the equation may be in a backward pass already, which its parameters say.
        program = jax.make_jaxpr(function)(*operands)
        assert not constants(program)
        jaxpr = program if isinstance(program, type(equation.params["jaxpr"])) else program.jaxpr
        return list(equation.primitive.bind(*operands, **{**equation.params, "jaxpr": jaxpr}))


def bind_with(equation: Any, operands: Sequence[Any], apply: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any] | None:
    """Returns the results of an equation that holds programs, whose equations are computed by `apply` as in `interpret`.

    Loops by `lax.scan` stay loops, branches stay branches, and what `jax.checkpoint` computes again is still computed again. None
    for other equations: operations, a `while_loop`, and functions with derivatives of their own.

    >>> program = jax.make_jaxpr(lambda xs: jax.lax.scan(lambda total, x: (total + jnp.sin(x), x), 0.0, xs)[0])(jnp.ones(2))
    >>> def with_cosine(equation, operands):
    ...     if equation.primitive.name == "sin":
    ...         return [jnp.cos(operands[0])]
    ...     results = bind_with(equation, operands, with_cosine)
    ...     return bind_equation(equation, operands) if results is None else results
    >>> float(interpret(program, [jnp.zeros(2)], with_cosine)[0])
    2.0
    """
    if is_plain_call(equation):
        with in_layer(equation):
            return interpret(called_program(equation), operands, apply)
    if is_checkpoint(equation):
        return bind_checkpoint(equation, lambda *args: interpret(called_program(equation), args, apply), operands)
    if is_cond(equation):
        branches = [functools.partial(_call_with, branch, apply) for branch in inner_programs(equation)]
        return list(jax.lax.switch(operands[0], branches, *operands[1:]))
    loop = scan(equation)
    return None if loop is None else bind_scan(loop, functools.partial(_call_with, loop.body, apply), operands)


def bind_scan(loop: Scan, function: Callable[..., Sequence[Any]], operands: Sequence[Any]) -> list[Any]:
    """Returns the results of a loop whose body is another function, of the operands of the loop's own body, one by one.

    >>> program = jax.make_jaxpr(lambda xs: jax.lax.scan(lambda total, x: (total + x, x), 0.0, xs)[0])(jnp.ones(2))
    >>> loop = scan(own_equations(program)[-1])
    >>> float(bind_scan(loop, lambda total, x: [total + 2 * x, x], [jnp.zeros(()), jnp.ones(2)])[0])
    4.0
    """
    consts, start = operands[: loop.num_consts], loop.num_consts + loop.num_carry

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = list(function(*consts, *carry, *xs))
        return results[: loop.num_carry], results[loop.num_carry :]

    options: dict[str, Any] = {"length": loop.length, "reverse": loop.reverse, "unroll": loop.unroll}
    carry, stacked = jax.lax.scan(body, list(operands[loop.num_consts : start]), list(operands[start:]), **options)
    return [*carry, *stacked]


def dependent_on(program: Any, sources: Iterable[Any], carries: Callable[[Any], bool] = lambda equation: True) -> set[Any]:
    """Returns the sources and the variables of a program that depend on any of them.

    Sources are arguments or results of equations, also of those in programs that are called. What depends on them through
    equations alone for which `carries(equation)` is False is left out.

    >>> program = jax.make_jaxpr(lambda x, y: (x + y, jnp.sign(x)))(1.0, 2.0)
    >>> def smooth(equation):
    ...     return equation.primitive.name != "sign"
    >>> found, smoothly = (dependent_on(program, inputs(program)[:1], rule) for rule in (lambda equation: True, smooth))
    >>> [out in found for out in outputs(program)], [out in smoothly for out in outputs(program)]
    ([True, True], [True, False])
    """
    sources = set(sources)
    found = set(sources)
    for equation in own_equations(program):
        operands, loop = _members(equation.invars, found), scan(equation)
        if is_plain_call(equation) or is_cond(equation) or loop is not None:
            results = _dependent_results(equation, loop, operands, sources, carries)
        else:
            results = [any(operands) and carries(equation)] * len(equation.outvars)
        found.update(variable for variable, depends in zip(equation.outvars, results, strict=True) if depends)
    return found


def _dependent_results(equation: Any, loop: Scan | None, operands: list[bool], sources: set[Any], carries: Any) -> list[bool]:
    """Returns which results of a call, a loop or a `cond` depend on the operands marked True, or on sources inside."""
    if is_cond(equation):
        programs, operands, on_index = inner_programs(equation), operands[1:], operands[0] and carries(equation)
    else:
        programs, on_index = [called_program(equation) if loop is None else loop.body], False
    carry = slice(0, 0) if loop is None else slice(loop.num_consts, loop.num_consts + loop.num_carry)
    while True:  # until the dependencies of a loop's carry no longer grow
        results = [on_index] * len(equation.outvars)
        for inner in programs:  # the same program may be called elsewhere, with other operands: only `sources` are common to both
            marked = {variable for variable, marks in zip(inputs(inner), operands, strict=True) if marks}
            inside = _members(outputs(inner), dependent_on(inner, sources | marked, carries))
            results = [a or b for a, b in zip(results, inside, strict=True)]
        carried = [a or b for a, b in zip(operands[carry], results, strict=False)]
        if carried == operands[carry]:
            return results
        operands[carry] = carried


def _members(atoms: Sequence[Any], variables: set[Any]) -> list[bool]:
    return [not is_literal(atom) and atom in variables for atom in atoms]


def _call_with(program: Any, apply: Callable[[Any, list[Any]], Sequence[Any]], *operands: Any) -> list[Any]:
    return interpret(program, operands, apply)


def is_unchecked_map(equation: Any) -> bool:
    """Returns whether an equation runs a program on each of several devices as `jax.pmap` does: without checking what differs.

    The derivative of a `psum` in such a program is another `psum`: wrong by the number of devices where its result is the same
    on all of them.

    >>> program = jax.make_jaxpr(jax.pmap(lambda x: x + 1))(jnp.ones((1, 2)))
    >>> [equation.primitive.name in ("shard_map", "xla_pmap") for equation in equations(program) if is_unchecked_map(equation)]
    [True]
    """
    name, params = equation.primitive.name, equation.params
    return name == "xla_pmap" or (name == "shard_map" and not params.get("check_vma", params.get("check_rep", True)))


def scan(equation: Any) -> Scan | None:
    """Returns the parts of a `lax.scan`, or None for another equation.

    >>> def running_sum(start, scale, xs):
    ...     return jax.lax.scan(lambda total, x: (total + scale * x, total), start, xs)
    >>> (equation,) = own_equations(jax.make_jaxpr(running_sum)(0.0, 2.0, jnp.ones(3)))
    >>> loop = scan(equation)
    >>> loop.num_consts, loop.num_carry, loop.length
    (1, 1, 3)
    """
    if equation.primitive.name != "scan":
        return None
    params = equation.params
    # What the loop iterates over has one axis more than the slice that its body sees: so it needs no parameter to tell it apart.
    num_inputs = sum(map(_has_loop_axis, equation.invars, inputs(params["jaxpr"])))
    num_carry = len(equation.outvars) - sum(map(_has_loop_axis, equation.outvars, outputs(params["jaxpr"])))
    num_consts = len(equation.invars) - num_inputs - num_carry
    return Scan(params["jaxpr"], num_consts, num_carry, params["length"], params["reverse"], params["unroll"])


def layer_of(equation: Any) -> str:
    """Returns the layer whose code an equation comes from, as Keras names it, for messages; "" if there is none.

    >>> import keras
    >>> layer = keras.layers.Dense(1, name="head")
    >>> layer.build((1, 2))
    >>> layer_of(own_equations(jax.make_jaxpr(layer)(jnp.ones((1, 2))))[0])
    'head'
    """
    path = re.sub(r"\w+\(([^()]*)\)", r"\1", str(equation.source_info.name_stack))  # without jvp(...) and transpose(...)
    return path.strip("/")


def in_layer(equation: Any) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which new equations come from the same layer, as `layer_of` and profiles show it.

    >>> with jax.named_scope("head"):
    ...     (equation,) = own_equations(jax.make_jaxpr(jnp.sin)(0.0))
    >>> def cos(x):
    ...     with in_layer(equation):
    ...         return jnp.cos(x)
    >>> layer_of(own_equations(jax.make_jaxpr(cos)(0.0))[0]) == layer_of(equation)
    True
    """
    name = layer_of(equation)
    context: contextlib.AbstractContextManager[None] = jax.named_scope(name) if name else contextlib.nullcontext()
    return context


def _has_loop_axis(outside: Any, inside: Any) -> bool:
    return len(getattr(outside.aval, "shape", ())) > len(getattr(inside.aval, "shape", ()))


def _expanded(equation: Any) -> Any:
    primitive = equation.params["_prim"]
    return jax.make_jaxpr(primitive.expand)(*primitive.in_avals)

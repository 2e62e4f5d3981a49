"""Traced programs are read the same in every release of JAX, and by one module only."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from research.transforms.jaxpr import (
    bind_checkpoint,
    bind_equation,
    bind_with,
    called_program,
    dependent_on,
    equations,
    inner_programs,
    inputs,
    interpret,
    is_checkpoint,
    is_plain_call,
    outputs,
    own_equations,
    scan,
)

ROOT = Path(__file__).parents[2]
XS, X = jnp.arange(6.0).reshape(3, 2), jnp.ones(2)


SCANS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, int, int, bool]]] = {
    "constants, carry and inputs": (
        lambda w, carry, xs: jax.lax.scan(lambda c, x: (c * w + x, c), carry, xs),
        (X, X, XS),
        (1, 1, 3, False),
    ),
    "only a carry": (lambda c: jax.lax.scan(lambda c, _: (jnp.sin(c), None), c, length=4), (X,), (0, 1, 4, False)),
    "only inputs": (lambda xs: jax.lax.scan(lambda _, x: (None, jnp.sin(x)), None, xs), (XS,), (0, 0, 3, False)),
    "only constants": (lambda w: jax.lax.scan(lambda _, __: (None, jnp.sin(w)), None, length=3), (X,), (1, 0, 3, False)),
    "a carry as long as the loop": (
        lambda carry, xs: jax.lax.scan(lambda c, x: (c + x.sum(), None), carry, xs),
        (jnp.ones((3, 2)), XS),
        (0, 1, 3, False),
    ),
    "several of each": (
        lambda v, w, a, b, xs: jax.lax.scan(lambda c, x: ((c[0] * v + x[0], c[1] * w), (x[1], c[0])), (a, b), (xs, xs)),
        (X, X, X, X, XS),
        (2, 2, 3, False),
    ),
    "backwards": (lambda c, xs: jax.lax.scan(lambda c, x: (c + x, None), c, xs, reverse=True), (X, XS), (0, 1, 3, True)),
    "keys": (
        lambda keys: jax.lax.scan(lambda c, key: (c + jax.random.bits(key), None), jnp.uint32(0), jax.random.split(keys, 3)),
        (jax.random.key(0),),
        (0, 1, 3, False),
    ),
    "none": (lambda c, xs: jax.lax.scan(lambda c, x: (c + x, x), c, xs), (X, XS[:0]), (0, 1, 0, False)),
}


@pytest.mark.parametrize("name", SCANS)
def test_the_parts_of_a_scan(name: str) -> None:
    function, args, expected = SCANS[name]
    (loop,) = filter(None, map(scan, own_equations(jax.make_jaxpr(function)(*args))))
    assert (loop.num_consts, loop.num_carry, loop.length, loop.reverse) == expected


def test_the_parts_of_a_scan_in_a_derivative() -> None:
    def total(w: Any, carry: Any, xs: Any) -> Any:
        return jax.lax.scan(lambda c, x: (jnp.sin(c @ w) + x, None), carry, xs)[0].sum()

    program = jax.make_jaxpr(jax.grad(total))(jnp.ones((2, 2)), X, XS)
    forward, backward = filter(None, map(scan, equations(program)))
    assert (forward.num_consts, forward.num_carry, forward.reverse) == (1, 1, False)
    assert (backward.num_consts, backward.num_carry, backward.reverse) == (1, 2, True)  # the carry's and the weight's gradient


def rebuild(equation: Any, operands: list[Any]) -> list[Any]:
    results = bind_with(equation, operands, rebuild)
    return bind_equation(equation, operands) if results is None else results


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_rebuilt_from_its_parts_computes_the_same(name: str) -> None:
    function, args, _ = SCANS[name]
    results = interpret(jax.make_jaxpr(function)(*args), args, rebuild)
    for result, expected in zip(results, jax.tree.leaves(function(*args)), strict=True):
        np.testing.assert_array_equal(result, expected)


def block(x: Any) -> Any:
    return jnp.sin(checkpoint_name(x @ x, "product"))


@jax.custom_vjp
def doubled(x: Any) -> Any:
    return x * 2


doubled.defvjp(lambda x: (x * 2, None), lambda _, gradient: (gradient * 3,))


@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.save_only_these_names("product")])
def test_a_checkpointed_part_is_a_call_of_its_program(policy: Any) -> None:
    program = jax.make_jaxpr(jax.checkpoint(block, policy=policy))(jnp.eye(2))
    (equation,) = own_equations(program)
    assert is_checkpoint(equation)
    names = [inner.primitive.name for inner in equations(program)]
    assert names.count("dot_general") == names.count("sin") == 1
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(interpret(called_program(equation), [x], rebuild)[0], block(x))
    assert len(inner_programs(equation)) == 1


def test_what_depends_on_a_variable_is_found_through_calls_branches_and_loops() -> None:
    half = jax.jit(lambda x: x / 2)

    def function(x: Any, y: Any) -> Any:
        looped = jax.lax.scan(lambda carry, _: ((carry[1], carry[1] + x, carry[2]), None), (y, y, y), length=3)[0]
        branch = jax.lax.cond(y > 0, lambda x, y: (x, y), lambda x, y: (y, y), x, y)
        return *looped, *branch, half(x), half(y), jnp.where(x > 0, y, y), jax.checkpoint(jnp.sin)(y)

    program = jax.make_jaxpr(function)(1.0, 2.0)
    found = dependent_on(program, inputs(program)[:1])
    assert [out in found for out in outputs(program)] == [True, True, False, True, False, True, False, True, False]
    called = next(called_program(e) for e in own_equations(program) if is_plain_call(e))  # `half`, which is called twice
    inside = dependent_on(program, [outputs(called)[0]])  # a result inside of a program that is called
    assert [out in inside for out in outputs(program)][5:7] == [True, True]


@pytest.mark.usefixtures("primitives")
def test_a_function_with_its_own_derivative_is_a_call_and_not_a_checkpointed_part() -> None:
    (equation,) = own_equations(jax.make_jaxpr(doubled)(2.0))
    assert not is_checkpoint(equation)
    assert [inner.primitive.name for inner in equations(called_program(equation))].count("mul") == 1
    assert bind_equation(equation, [jnp.ones(())]) == [2.0]


@pytest.mark.usefixtures("primitives")
@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_a_replaced_checkpointed_part_is_still_computed_again(policy: Any) -> None:
    (equation,) = own_equations(jax.make_jaxpr(jax.checkpoint(block, policy=policy))(jnp.eye(2)))

    def replaced(x: Any) -> Any:
        return bind_checkpoint(equation, lambda x: [jnp.tanh(x @ x)], [x])[0].sum()

    def plain(x: Any) -> Any:
        return jnp.tanh(x @ x).sum()

    x = jnp.array([[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_allclose(jax.jit(jax.grad(replaced))(x), jax.grad(plain)(x), rtol=1e-6)
    names = [equation.primitive.name for equation in equations(jax.make_jaxpr(jax.grad(replaced))(x))]
    expected = [equation.primitive.name for equation in equations(jax.make_jaxpr(jax.grad(plain))(x))]
    assert names.count("dot_general") == expected.count("dot_general") + (policy is None)


def test_variables_that_a_program_returns_unchanged_are_recognised() -> None:
    program = jax.make_jaxpr(lambda x, y: (y, x + y, 1.0))(1.0, 2.0)
    assert [result is inputs(program)[1] for result in outputs(program)] == [True, False, False]


def test_only_one_module_reads_the_parameters_of_equations() -> None:
    # Keras' callbacks and Optuna's trials have parameters too.
    others = {"research/transforms/jaxpr.py", "research/keras_fit/callbacks.py", "research/cli/sweep.py"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "research").rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in others
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("params", "eqns", "constvars")
    ]
    assert found == []

"""Rematerialisation: parts of the forward pass are computed again in the backward pass, in place of being stored."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the example in a docstring)
import keras  # noqa: F401

from research.core.objective import Objective
from research.core.state import InvalidArgument, State, check_type
from research.transforms.jaxpr import (
    bind_equation,
    bind_scan,
    bind_with,
    constant_variables,
    constants,
    equations,
    inner_programs,
    inputs,
    interpret,
    is_literal,
    layer_of,
    outputs,
    own_equations,
    scan,
)

Policy = Callable[..., Any]


def remat(objective: Objective, layers: str | None = None, policy: Policy | None = None) -> Objective:
    """Returns an objective whose backward pass computes what is inside of layers again, from the layers' inputs.

    The training step keeps less in memory and computes more; no number changes, but for how XLA rounds fused operations. Random
    numbers, batch statistics, `add_loss`, masks and metrics are those of the one forward pass: what a layer assigns is one of its
    results, and a repeated computation draws from the same seed. On a CPU the compiled step needs as much memory as without
    (XLA of JAX 0.10); the step of `experiments/gpt.py --preset 124m`, compiled for a TPU v5e, needs 0.8 GiB of temporaries in
    place of 1.7.

    `layers` is a regular expression that a layer's name must match as a complete name, `"block_.*"`: each call of the outermost
    layers that match becomes a part. By default these are the layers of each outermost model, and the losses. `policy` says what
    inside of a part is kept all the same, one of `jax.checkpoint_policies`, for example `dots_with_no_batch_dims_saveable`; by
    default nothing is. For the steps of recurrent layers see `remat_loops`.

    Pass it as `objective_transform` to `research.supervised` or `research.learner`. Raises `InvalidArgument`, when the step is
    traced, if no layer of the forward pass matches.

    >>> import research
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64, "gelu"), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd", objective_transform=remat)
    >>> state, logs = jax.jit(learner.train)(learner.init(), research.Batch(jnp.ones((8, 4)), jnp.ones((8, 1))))
    >>> list(logs)
    ['loss']
    """
    pattern = _compile("remat", layers)

    def rewrite(program: Any, arguments: Sequence[Any]) -> list[Any]:
        parts = [(key, list(group)) for key, group in groupby(own_equations(program), lambda e: _part_of(layer_of(e), pattern))]
        if not any(key for key, _ in parts):
            _raise_no_match("remat", layers, own_equations(program), "layer in a model")
        return _run_parts(program, parts, arguments, policy)

    return _transformed(objective, rewrite)


def remat_loops(objective: Objective, layers: str | None = None, policy: Policy | None = None) -> Objective:
    """Returns an objective whose backward pass computes what is inside of each step of a `lax.scan` again, from its carry.

    A recurrent layer then keeps its states, and computes its gates again. The step of `experiments/tickets.py`, compiled for a
    TPU v5e, moves 15 MB in place of 97 (128 examples a chip), and needs 4.6 MB of temporaries in place of 35. `layers` and
    `policy` are those of `remat`; by default the loops of all layers are changed. A layer of Keras with `unroll=True` has no
    loop.

    Raises `InvalidArgument`, when the step is traced, if there is no such loop.

    >>> import research
    >>> model = keras.Sequential([keras.Input((5, 2)), keras.layers.LSTM(3), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd", objective_transform=remat_loops)
    >>> state, logs = jax.jit(learner.train)(learner.init(), research.Batch(jnp.ones((8, 5, 2)), jnp.ones((8, 1))))
    >>> list(logs)
    ['loss']
    """
    pattern = _compile("remat_loops", layers)

    def chosen(equation: Any) -> bool:
        return scan(equation) is not None and (pattern is None or _part_of(layer_of(equation), pattern) != "")

    def apply(equation: Any, operands: list[Any]) -> list[Any]:
        loop = scan(equation)
        if loop is not None and chosen(equation):
            # In a loop, XLA merges nothing of the backward pass with the forward pass: `prevent_cse` is not needed.
            body = jax.checkpoint(lambda *args: interpret(loop.body, args, bind_equation), policy=policy, prevent_cse=False)
            return bind_scan(loop, body, operands)
        if any(chosen(inner) for program in inner_programs(equation) for inner in equations(program)):
            results = bind_with(equation, operands, apply)
            if results is not None:
                return results
        return bind_equation(equation, operands)

    def rewrite(program: Any, arguments: Sequence[Any]) -> list[Any]:
        if not any(map(chosen, equations(program))):
            _raise_no_match("remat_loops", layers, filter(scan, equations(program)), "lax.scan in a layer")
        return interpret(program, arguments, apply)

    return _transformed(objective, rewrite)


def _transformed(objective: Objective, rewrite: Callable[[Any, Sequence[Any]], list[Any]]) -> Objective:
    """Returns an objective that is traced, and then computed by `rewrite(program, arguments)`, in training."""

    def transformed(state: State, batch: Any, *, training: bool) -> Any:
        if not training:
            return objective(state, batch, training=False)
        program, shapes = jax.make_jaxpr(lambda *args: objective(*args, training=True), return_shape=True)(state, batch)
        return jax.tree.unflatten(jax.tree.structure(shapes), rewrite(program, jax.tree.leaves((state, batch))))

    return transformed


def _part_of(path: str, pattern: re.Pattern[str] | None) -> str:
    """Returns the path of the outermost layer of a path that matches; without a pattern, the second one; "" if there is none.

    >>> _part_of("gpt/block_1/attention/dense", None), _part_of("gpt/block_1/attention", re.compile("att.*")), _part_of("", None)
    ('gpt/block_1', 'gpt/block_1/attention', '')
    """
    names = path.split("/")
    depths = [depth for depth, name in enumerate(names) if (depth == 1 if pattern is None else pattern.fullmatch(name))]
    return "/".join(names[: depths[0] + 1]) if depths else ""


def _run_parts(
    program: Any, parts: Sequence[tuple[str, list[Any]]], arguments: Sequence[Any], policy: Policy | None
) -> list[Any]:
    """Returns a program's results, with each named part of its equations as one `jax.checkpoint`."""
    values = dict(zip([*constant_variables(program), *inputs(program)], [*constants(program), *arguments], strict=True))
    for (name, part), results in zip(parts, _results_of_parts(program, parts), strict=True):
        operands = [variable for variable in dict.fromkeys(_operands(part)) if variable in values]
        function = _as_function(part, operands, results)
        if name:
            function = jax.checkpoint(function, policy=policy)
        values.update(zip(results, function(*(values[variable] for variable in operands)), strict=True))
    return [atom.val if is_literal(atom) else values[atom] for atom in outputs(program)]


def _results_of_parts(program: Any, parts: Sequence[tuple[str, list[Any]]]) -> list[list[Any]]:
    """Returns the variables of each part that later parts use, or that are results of the program."""
    used, results = {atom for atom in outputs(program) if not is_literal(atom)}, []
    for _, part in reversed(parts):
        results.append([variable for equation in part for variable in equation.outvars if variable in used])
        used.update(_operands(part))
    return results[::-1]


def _operands(part: Sequence[Any]) -> Iterator[Any]:
    return (atom for equation in part for atom in equation.invars if not is_literal(atom))


def _as_function(part: Sequence[Any], operands: Sequence[Any], results: Sequence[Any]) -> Callable[..., list[Any]]:
    """Returns the function of some equations from the arrays of their operands to those of their results."""

    def function(*arrays: Any) -> list[Any]:
        values = dict(zip(operands, arrays, strict=True))
        for equation in part:
            found = bind_equation(equation, [atom.val if is_literal(atom) else values[atom] for atom in equation.invars])
            values.update(zip(equation.outvars, found, strict=True))
        return [values[variable] for variable in results]

    return function


def _compile(function: str, layers: str | None) -> re.Pattern[str] | None:
    check_type(layers, (str, type(None)), f"{function}: layers", "a regular expression of names of layers")
    try:
        return None if layers is None else re.compile(layers)
    except re.error as error:
        raise InvalidArgument(f"{function}: layers is {layers!r}, expected a regular expression ({error}).") from None


def _raise_no_match(function: str, layers: str | None, among: Iterable[Any], what: str) -> None:
    known = sorted({name for equation in among for name in layer_of(equation).split("/") if name})
    which = f"{what} whose name matches {layers!r}" if layers else what
    raise InvalidArgument(
        f"{function}: the forward pass has no {which}; the layers with one are {', '.join(known[:10]) or 'none'}."
    )

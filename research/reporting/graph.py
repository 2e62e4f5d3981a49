"""A Keras model as a graph: its layers, what each is, and which takes what from which."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
from jaxtyping import Array, PyTree

from research.state import Refused, State, mapped, unique

Shape = tuple[int | None, ...]


class Node(NamedTuple):
    """A layer, or an operation on tensors. `name` is a path: `decoder/dense` is in the nested model `decoder`."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    parameters: int
    frozen: bool


class Graph(NamedTuple):
    """The layers in the order they are called; edges from giver to taker; the class of each nested model by its path."""

    name: str
    kind: str
    nodes: list[Node]
    edges: list[tuple[str, str]]
    scopes: dict[str, str]


def graph(model: keras.Model) -> Graph:
    """The graph of a model, nested models taken apart, by Keras' public configuration.

    A layer called several times is one node with several edges. Where no graph is known (a model with a `call` of its own, or
    one that was never built), the layers stand in the order they were made in, without edges. Numbers that Keras gave to
    unnamed layers are counted again within each model, so that every copy of a model gives the same graph.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head_7")])
    >>> [(node.name, node.shapes, node.parameters) for node in graph(model).nodes]
    [('input_layer', ((None, 4),), 0), ('dense', ((None, 3),), 15), ('head_7', ((None, 2),), 8)]
    >>> graph(model).edges
    [('input_layer', 'dense'), ('dense', 'head_7')]
    """
    found = Graph(layer_names([model])[0], type(model).__name__, [], [], {})
    _add(found, model, _configured(model), "")
    return found


def activations(model: keras.Model, state: State, x: PyTree) -> dict[str, Array]:
    """What every layer of a model gives for inputs `x` in inference mode, with a state's weights, by the layers' names.

    The layers inside nested models too; of a layer called several times each result (`dense`, `dense/1`), but not what only
    layers called several times take. Raises `Refused` for a model whose graph is not known.

    >>> import jax.numpy as jnp
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, name="twice"), keras.layers.ReLU(name="positive")])
    >>> state = State([jnp.array([[2.0, -2.0]]), jnp.zeros(2)], [], [], {})
    >>> {name: value.tolist() for name, value in activations(model, state, jnp.ones((1, 1))).items()}
    {'twice': [[2.0, -2.0]], 'positive': [[2.0, 0.0]]}
    """
    weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
    configured = _configured(model)
    if configured is None:
        raise Refused(
            f"activations: {model.name!r} tells no graph of its layers (its call is its own, or it was never built); "
            "expected a functional or sequential model: build one of the same layers."
        )
    with keras.StatelessScope(mapped(weights)):
        return _activations(configured, keras.tree.flatten(x), "")[0]


def layer_names(operations: Sequence[Any]) -> list[str]:
    """The names of layers, or of anything else of Keras'; those that Keras numbered by itself are counted anew.

    >>> first, second = keras.layers.Dense(1), keras.layers.Dense(1)
    >>> layer_names([second, first, keras.layers.Dense(1, name="dense_of_mine")])
    ['dense', 'dense_1', 'dense_of_mine']
    """
    bases = []
    for operation in operations:
        snake = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(operation).__name__)
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", snake).lower()
        bases.append(snake if re.fullmatch(rf"{re.escape(snake)}(_\d+)?", operation.name) else operation.name)
    return unique(bases)


class _Configured(NamedTuple):
    """The same layers as a functional model, and its configuration."""

    model: Any
    config: dict[str, Any]


class _Ends(NamedTuple):
    """The nodes that take a model's inputs and give its outputs, in their order."""

    takers: list[str]
    givers: list[str]


def _configured(operation: Any) -> _Configured | None:
    """None for what is no model, where a model's graph is not known, and where one of its layers can't be told."""
    inputs = getattr(operation, "inputs", None)  # only what was made from, or built for, an Input has them
    if not isinstance(operation, keras.Model) or not inputs:
        return None
    functional = keras.Model(inputs, operation.outputs, name=operation.name)
    try:
        return _Configured(functional, functional.get_config())
    except (NotImplementedError, TypeError, ValueError):  # a layer of somebody's own without `get_config`
        return None


def _add(found: Graph, model: keras.Model, configured: _Configured | None, path: str) -> _Ends:
    """Adds a model's layers under a path."""
    if configured is None:
        for layer, name in zip(model.layers, layer_names(model.layers), strict=True):
            if isinstance(layer, keras.Model):
                found.scopes[path + name] = type(layer).__name__
                _add(found, layer, _configured(layer), f"{path}{name}/")
            else:
                found.nodes.append(_node(layer, path + name))
        return _Ends([], [])
    config = configured.config
    by_name = {operation.name: operation for operation in configured.model.operations}
    calls = {layer["name"]: [_histories(_tensors(call)) for call in layer["inbound_nodes"]] for layer in config["layers"]}
    shown = dict(zip(calls, layer_names([by_name[name] for name in calls]), strict=True))
    shapes, inside = _shapes(configured), {}
    for name, operation in ((name, by_name[name]) for name in calls):
        within = _configured(operation)
        if within is None:
            found.nodes.append(_node(operation, path + shown[name], shapes[name]))
        else:
            found.scopes[path + shown[name]] = type(operation).__name__
            inside[name] = _add(found, operation, within, f"{path}{shown[name]}/")

    def giver(name: str, position: int) -> str:
        return inside[name].givers[position] if name in inside else path + shown[name]

    for name, each in calls.items():
        for call in each:
            takers = inside[name].takers if name in inside else [path + shown[name]] * len(call)
            found.edges.extend((giver(of, position), taker) for (of, _, position), taker in zip(call, takers, strict=False))
    found.edges[:] = dict.fromkeys(found.edges)
    inputs, outputs = _histories(config["input_layers"]), _histories(config["output_layers"])
    return _Ends([path + shown[name] for name, *_ in inputs], [giver(name, position) for name, _, position in outputs])


def _activations(configured: _Configured, inputs: list[Any], path: str) -> tuple[dict[str, Array], list[Array]]:
    """What each layer gives, and the model's outputs."""
    functional, config = configured
    by_name = {operation.name: operation for operation in functional.operations}
    calls = {layer["name"]: [_histories(_tensors(call)) for call in layer["inbound_nodes"]] for layer in config["layers"]}
    outputs = _histories(config["output_layers"])
    held = dict(zip(outputs, functional.outputs, strict=True))
    for name, operation in ((name, by_name[name]) for name in calls if not isinstance(by_name[name], keras.Model)):
        with contextlib.suppress(AttributeError):  # called several times: there is no one input, no one output
            held.update({(name, 0, i): tensor for i, tensor in enumerate(keras.tree.flatten(operation.output))})
            held.update(zip(calls[name][0] if calls[name] else [], keras.tree.flatten(operation.input), strict=False))
    values = dict(zip(held, keras.Model(functional.inputs, list(held.values()))(inputs, training=False), strict=True))
    found: dict[str, Array] = {}
    for name, shown in zip(calls, layer_names([by_name[name] for name in calls]), strict=True):
        within = _configured(by_name[name])
        if within is not None and calls[name] and all(history in values for history in calls[name][0]):
            inner, given = _activations(within, [values[history] for history in calls[name][0]], f"{path}{shown}/")
            found.update(inner)
            values.update({(name, 0, i): value for i, value in enumerate(given)})
        elif not isinstance(by_name[name], keras.layers.InputLayer):
            results = [values[history] for history in sorted(values) if history[0] == name]
            found.update({f"{path}{shown}/{i}" if i else path + shown: result for i, result in enumerate(results)})
    return found, [values[history] for history in outputs]


def _node(operation: Any, name: str, shapes: tuple[Shape, ...] = ()) -> Node:
    weights = getattr(operation, "weights", [])  # an operation on tensors is no layer and has none
    frozen = bool(weights) and not operation.trainable_weights
    return Node(name, type(operation).__name__, shapes, sum(math.prod(weight.shape) for weight in weights), frozen)


def _tensors(tree: Any) -> Iterator[dict[str, Any]]:
    """The tensors among a call's arguments, as Keras configures them."""
    if isinstance(tree, dict) and tree.get("class_name") == "__keras_tensor__":
        yield tree["config"]
    elif isinstance(tree, dict | list | tuple):
        for branch in [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _histories(tree: Any) -> list[tuple[str, int, int]]:
    """Where tensors come from: the layer, which of its calls, and which of that call's results; of every tensor in a tree."""
    if isinstance(tree, list | tuple) and len(tree) == 3 and isinstance(tree[0], str):
        return [(tree[0], tree[1], tree[2])]
    if isinstance(tree, dict) and "keras_history" in tree:
        return _histories(tree["keras_history"])
    branches = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree
    return [history for branch in branches for history in _histories(branch)]


def _shapes(configured: _Configured) -> dict[str, tuple[Shape, ...]]:
    """The shapes that each layer gives: of the tensors that others take, and of the model's outputs."""
    model, config = configured
    told: dict[tuple[str, int, int], Shape] = {}
    for tensor in (tensor for layer in config["layers"] for tensor in _tensors(layer["inbound_nodes"])):
        told.update(dict.fromkeys(_histories(tensor), tuple(tensor["shape"])))
    told.update(zip(_histories(config["output_layers"]), (tuple(output.shape) for output in model.outputs), strict=True))
    found: dict[str, list[Shape]] = {layer["name"]: [] for layer in config["layers"]}
    for (name, *_), shape in sorted(told.items(), key=lambda item: item[0]):
        found[name] += [shape] * (shape not in found[name])
    return {name: tuple(shapes) for name, shapes in found.items()}

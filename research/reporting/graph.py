"""A Keras model as a graph: its layers, and which layer takes the outputs of which."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
from jaxtyping import Array, PyTree

from research.core.names import unique_names
from research.core.state import InvalidArgument, State, scope_mapping

Shape = tuple[int | None, ...]
Source = tuple[str, int, int]  # where a tensor comes from: a layer's name, which of its calls, which of the call's outputs


class Node(NamedTuple):
    """A layer, or an operation on tensors. `name` is a path: `decoder/dense` is in the nested model `decoder`.

    `shapes` are those of its outputs, `frozen` means that it has weights and none is trainable.

    >>> Node("decoder/dense", "Dense", ((None, 3),), parameters=15, frozen=False).class_name
    'Dense'
    """

    name: str
    class_name: str
    shapes: tuple[Shape, ...]
    parameters: int
    frozen: bool


class Graph(NamedTuple):
    """A model's layers in the order of their calls, and the edges between them, (source, target).

    `scopes` maps the path of each nested model to its class name.

    >>> model_graph(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])).class_name
    'Sequential'
    """

    name: str
    class_name: str
    nodes: list[Node]
    edges: list[tuple[str, str]]
    scopes: dict[str, str]


def model_graph(model: keras.Model) -> Graph:
    """Returns the graph of a model with the layers of nested models, from Keras' public configuration.

    A layer called several times is one node with several edges. If the graph is unknown (the model has its own `call`, or was
    never built), the layers are in the order of their creation, without edges. Keras numbers unnamed layers per process; here
    they are numbered within each model, so that every copy of a model has the same graph.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head_7")])
    >>> [(node.name, node.shapes, node.parameters) for node in model_graph(model).nodes]
    [('input_layer', ((None, 4),), 0), ('dense', ((None, 3),), 15), ('head_7', ((None, 2),), 8)]
    >>> model_graph(model).edges
    [('input_layer', 'dense'), ('dense', 'head_7')]
    """
    graph = Graph(layer_names([model])[0], type(model).__name__, [], [], {})
    _add_layers(graph, model, _functional(model), "")
    return graph


def activations(model: keras.Model, state: State, x: PyTree) -> dict[str, Array]:
    """Returns the outputs of every layer for inputs `x` in inference mode, with a state's weights, by the layers' names.

    Includes the layers of nested models. A layer called several times has an entry per output (`dense`, `dense/1`). Raises
    `InvalidArgument` if the model's graph is unknown.

    >>> import jax.numpy as jnp
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, name="linear"), keras.layers.ReLU(name="positive")])
    >>> state = State([jnp.array([[2.0, -2.0]]), jnp.zeros(2)], [], [], {})
    >>> {name: value.tolist() for name, value in activations(model, state, jnp.ones((1, 1))).items()}
    {'linear': [[2.0, -2.0]], 'positive': [[2.0, 0.0]]}
    """
    weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
    functional = _functional(model)
    if functional is None:
        raise InvalidArgument(
            f"activations: the graph of {model.name!r} is unknown (it has its own call, or was never built); "
            "expected a functional or sequential model: build one from the same layers."
        )
    with keras.StatelessScope(scope_mapping(weights)):
        return _activations(functional, keras.tree.flatten(x), "")[0]


def layer_names(operations: Sequence[Any]) -> list[str]:
    """Returns the names of layers or other Keras operations, with Keras' automatic numbers counted from the first of these.

    >>> first, second = keras.layers.Dense(1), keras.layers.Dense(1)
    >>> layer_names([second, first, keras.layers.Dense(1, name="my_dense")])
    ['dense', 'dense_1', 'my_dense']
    """
    names = []
    for operation in operations:
        snake = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(operation).__name__)
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", snake).lower()
        automatic = re.fullmatch(rf"{re.escape(snake)}(_\d+)?", operation.name)
        names.append(snake if automatic else operation.name)
    return unique_names(names)


class _Functional(NamedTuple):
    """A functional model of the same layers, and its configuration."""

    model: Any
    config: dict[str, Any]

    @property
    def operations(self) -> dict[str, Any]:
        """The layers by Keras' name, in the order of the configuration."""
        by_name = {operation.name: operation for operation in self.model.operations}
        return {layer["name"]: by_name[layer["name"]] for layer in self.config["layers"]}

    @property
    def calls(self) -> dict[str, list[list[Source]]]:
        """The sources of the inputs of each call of each layer."""
        return {layer["name"]: [_sources(_tensors(call)) for call in layer["inbound_nodes"]] for layer in self.config["layers"]}

    @property
    def names(self) -> dict[str, str]:
        """The layers' names as `layer_names` gives them, by Keras' names."""
        return dict(zip(self.operations, layer_names(list(self.operations.values())), strict=True))


class _Ends(NamedTuple):
    """The nodes that take a model's inputs, and the nodes that return its outputs, in order."""

    inputs: list[str]
    outputs: list[str]


def _functional(operation: Any) -> _Functional | None:
    """Returns a model as a functional model; None if it is not a model, its graph is unknown, or it can't be configured."""
    inputs = getattr(operation, "inputs", None)  # only models made from, or built for, an Input have them
    if not isinstance(operation, keras.Model) or not inputs:
        return None
    functional = keras.Model(inputs, operation.outputs, name=operation.name)
    try:
        return _Functional(functional, functional.get_config())
    except (NotImplementedError, TypeError, ValueError):  # a custom layer without `get_config`
        return None


def _add_layers(graph: Graph, model: keras.Model, functional: _Functional | None, path: str) -> _Ends:
    """Adds a model's layers to the graph, with names under a path."""
    if functional is None:
        for layer, name in zip(model.layers, layer_names(model.layers), strict=True):
            if isinstance(layer, keras.Model):
                graph.scopes[path + name] = type(layer).__name__
                _add_layers(graph, layer, _functional(layer), f"{path}{name}/")
            else:
                graph.nodes.append(_node(layer, path + name))
        return _Ends([], [])
    names, calls, shapes = functional.names, functional.calls, _shapes(functional)
    nested: dict[str, _Ends] = {}
    for name, operation in functional.operations.items():
        inner = _functional(operation)
        if inner is None:
            graph.nodes.append(_node(operation, path + names[name], shapes[name]))
        else:
            graph.scopes[path + names[name]] = type(operation).__name__
            nested[name] = _add_layers(graph, operation, inner, f"{path}{names[name]}/")

    def source_node(name: str, position: int) -> str:
        return nested[name].outputs[position] if name in nested else path + names[name]

    for name, calls_of_layer in calls.items():
        for call in calls_of_layer:
            targets = nested[name].inputs if name in nested else [path + names[name]] * len(call)
            graph.edges.extend(
                (source_node(source, position), target) for (source, _, position), target in zip(call, targets, strict=False)
            )
    graph.edges[:] = dict.fromkeys(graph.edges)
    inputs, outputs = _sources(functional.config["input_layers"]), _sources(functional.config["output_layers"])
    return _Ends([path + names[name] for name, *_ in inputs], [source_node(name, position) for name, _, position in outputs])


def _activations(functional: _Functional, inputs: list[Any], path: str) -> tuple[dict[str, Array], list[Array]]:
    """Returns the outputs of each layer by name, and the model's outputs."""
    operations, calls = functional.operations, functional.calls
    outputs = _sources(functional.config["output_layers"])
    tensors = dict(zip(outputs, functional.model.outputs, strict=True))
    for name, operation in operations.items():
        if isinstance(operation, keras.Model):
            continue
        with contextlib.suppress(AttributeError):  # a layer called several times has no single input or output
            tensors.update({(name, 0, i): tensor for i, tensor in enumerate(keras.tree.flatten(operation.output))})
            tensors.update(zip(calls[name][0] if calls[name] else [], keras.tree.flatten(operation.input), strict=False))
    arrays = keras.Model(functional.model.inputs, list(tensors.values()))(inputs, training=False)
    values = dict(zip(tensors, arrays, strict=True))
    results: dict[str, Array] = {}
    for name, short_name in functional.names.items():
        inner = _functional(operations[name])
        if inner is not None and calls[name] and all(source in values for source in calls[name][0]):
            inner_inputs = [values[source] for source in calls[name][0]]
            inner_results, inner_outputs = _activations(inner, inner_inputs, f"{path}{short_name}/")
            results.update(inner_results)
            values.update({(name, 0, i): value for i, value in enumerate(inner_outputs)})
        elif not isinstance(operations[name], keras.layers.InputLayer):
            layer_outputs = [values[source] for source in sorted(values) if source[0] == name]
            results.update(
                {f"{path}{short_name}/{i}" if i else path + short_name: output for i, output in enumerate(layer_outputs)}
            )
    return results, [values[source] for source in outputs]


def _node(operation: Any, name: str, shapes: tuple[Shape, ...] = ()) -> Node:
    weights = getattr(operation, "weights", [])  # an operation on tensors is not a layer and has none
    frozen = bool(weights) and not operation.trainable_weights
    return Node(name, type(operation).__name__, shapes, sum(math.prod(weight.shape) for weight in weights), frozen)


def _tensors(tree: Any) -> Iterator[dict[str, Any]]:
    """Yields the configurations of the tensors among a call's arguments."""
    if isinstance(tree, dict) and tree.get("class_name") == "__keras_tensor__":
        yield tree["config"]
    elif isinstance(tree, dict | list | tuple):
        for branch in [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _sources(tree: Any) -> list[Source]:
    """Returns the source of every tensor in a tree of configurations."""
    if isinstance(tree, list | tuple) and len(tree) == 3 and isinstance(tree[0], str):
        return [(tree[0], tree[1], tree[2])]
    if isinstance(tree, dict) and "keras_history" in tree:
        return _sources(tree["keras_history"])
    branches = [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree
    return [source for branch in branches for source in _sources(branch)]


def _shapes(functional: _Functional) -> dict[str, tuple[Shape, ...]]:
    """Returns the distinct output shapes of each layer: of tensors that other layers take, and of the model's outputs."""
    model, config = functional
    by_source: dict[Source, Shape] = {}
    for tensor in (tensor for layer in config["layers"] for tensor in _tensors(layer["inbound_nodes"])):
        by_source.update(dict.fromkeys(_sources(tensor), tuple(tensor["shape"])))
    by_source.update(zip(_sources(config["output_layers"]), (tuple(output.shape) for output in model.outputs), strict=True))
    shapes: dict[str, list[Shape]] = {layer["name"]: [] for layer in config["layers"]}
    for (name, *_), shape in sorted(by_source.items(), key=lambda item: item[0]):
        shapes[name] += [shape] * (shape not in shapes[name])
    return {name: tuple(distinct) for name, distinct in shapes.items()}

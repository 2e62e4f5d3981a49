"""The graph of a model has each layer once and every edge, and activations are the outputs of its layers."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from graph_models import custom_call, each_model, each_model_with_graph, shared, tickets, two_heads
from keras import layers

import research
from research.core.state import State, copy_values
from research.reporting.graph import activations, layer_names, model_graph


def weights_as_state(model: keras.Model) -> State:
    return State(copy_values(model.trainable_variables), copy_values(model.non_trainable_variables), [], {})


def random_inputs(model: keras.Model) -> Any:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4, (2, *(5 if n is None else n for n in x.shape[1:]))).astype("float32") for x in model.inputs]
    return keras.tree.pack_sequence_as(model.input, arrays)


@pytest.mark.sample(2)
@pytest.mark.slow
@each_model
def test_every_parameter_belongs_to_exactly_one_node(build: Callable[[], keras.Model]) -> None:
    model = build()
    nodes = model_graph(model).nodes
    assert sum(node.parameters for node in nodes) == model.count_params()
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.slow
@each_model
def test_every_copy_of_a_model_has_the_same_graph(build: Callable[[], keras.Model]) -> None:
    assert model_graph(build()) == model_graph(build())


@pytest.mark.slow
def test_edges_follow_the_calls_of_shared_layers_and_nested_models() -> None:
    graph = model_graph(shared())
    assert set(graph.edges) == {
        ("a", "twice"),
        ("b", "twice"),
        ("twice", "twice"),
        ("twice", "tower/input_layer"),
        ("tower/input_layer", "tower/dense"),
        ("tower/dense", "tower/dense_1"),
        ("tower/dense_1", "tower/input_layer"),
        ("tower/dense_1", "add"),
        ("twice", "add"),
    }
    assert graph.scopes == {"tower": "Sequential"}
    graph = model_graph(two_heads())
    assert ("middle/dense", "middle/twins/x") in graph.edges
    assert {("middle/twins/left", "middle/concatenate"), ("middle/twins/right", "middle/concatenate")} < set(graph.edges)
    assert {node.name: node.shapes for node in graph.nodes}["middle/twins/right"] == ((None, 2),)


def test_a_model_with_a_layer_that_has_no_config_is_a_list_of_layers() -> None:
    class WithoutConfig(layers.Layer):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def call(self, x: Any) -> Any:
            return self.function(x)

    x = keras.Input((3,))
    graph = model_graph(keras.Model(x, WithoutConfig(lambda y: 2 * y)(layers.Dense(2)(x))))
    assert [node.class_name for node in graph.nodes] == ["InputLayer", "Dense", "WithoutConfig"]
    assert graph.edges == []


@pytest.mark.slow
def test_frozen_layers_are_marked() -> None:
    model = tickets()
    model.get_layer("priority").trainable = False
    assert [node.name for node in model_graph(model).nodes if node.frozen] == ["priority"]


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.promotes
@each_model_with_graph
def test_activations_are_the_outputs_of_the_layers_with_the_weights_of_the_state(build: Callable[[], keras.Model]) -> None:
    model = build()
    x = random_inputs(model)
    state = weights_as_state(model)
    state = state._replace(trainable=[weight + 1 for weight in state.trainable])  # differs from the model's weights
    results = activations(model, state, x)
    research.write_back(state, model)
    outputs = keras.tree.flatten(model(x))
    assert all(any(np.array_equal(output, value) for value in results.values()) for output in outputs)
    for name, layer in zip(layer_names(model.layers), model.layers, strict=True):
        if name != "twice" and not isinstance(layer, keras.Model | layers.InputLayer):  # these have a single output
            np.testing.assert_array_equal(results[name], keras.Model(model.input, layer.output)(x))
    names = {node.name for node in model_graph(model).nodes if node.class_name != "InputLayer"}
    assert {re.sub(r"/\d$", "", name) for name in results} == names


def test_activations_of_a_model_without_a_graph_raise() -> None:
    model = custom_call()
    with pytest.raises(research.InvalidArgument, match="is unknown"):
        activations(model, weights_as_state(model), np.ones((1, 4)))

"""A model's graph, its drawing, and what its layers give: whatever the model, nothing is lost, doubled or drawn over another."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import research
from research import graph as graphs
from research import layout, picture
from research.graph import activations, graph
from research.loop import Entry
from research.state import State, values


def tickets() -> keras.Model:
    """Three inputs, two outputs."""
    title, body, tags = keras.Input((None,), name="title"), keras.Input((None,), name="body"), keras.Input((12,), name="tags")
    read = [layers.LSTM(8)(layers.Embedding(50, 4)(text)) for text in (title, body)]
    both = layers.Concatenate()([*read, tags])
    return keras.Model([title, body, tags], [layers.Dense(1, name="priority")(both), layers.Dense(4, name="department")(both)])


def autoencoder() -> keras.Model:
    """Two models in a third."""
    image = keras.Input((8, 8, 1), name="image")
    encoder = keras.Model(image, layers.Flatten()(layers.Conv2D(4, 3)(image)), name="encoder")
    decoder = keras.Sequential([keras.Input((144,)), layers.Dense(64), layers.Reshape((8, 8, 1))], name="decoder")
    seen = keras.Input((8, 8, 1))
    return keras.Model(seen, decoder(encoder(seen)), name="autoencoder")


def residual() -> keras.Model:
    """Edges over several rows."""
    x = start = keras.Input((6,))
    for _ in range(2):
        x = layers.Add()([layers.Dense(6)(layers.Dense(6)(x)), x])
    return keras.Model(start, [x, x + start])


def shared() -> keras.Model:
    """A layer and a model that are called twice, the model on what it gave itself."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    tower = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(4)], name="tower")
    again = layers.Dense(4, name="again")
    return keras.Model({"a": a, "b": b}, {"sum": tower(tower(again(a))) + again(b), "loop": again(again(a))})


def two_heads() -> keras.Model:
    """A nested model with two outputs, in a nested model."""
    x = keras.Input((5,), name="x")
    twins = keras.Model(x, [layers.Dense(1, name="left")(x), layers.Dense(2, name="right")(x)], name="twins")
    y = keras.Input((5,), name="y")
    middle = keras.Model(y, layers.Concatenate()(twins(layers.Dense(5)(y))), name="middle")
    z = keras.Input((5,), name="z")
    return keras.Model(z, middle(z))


class Own(keras.Model):
    """A `call` of its own: no graph is known."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="encoder")
        self.blocks = [layers.Dense(3), layers.Dense(3)]
        self.head = layers.Dense(2)

    def call(self, x: Any) -> Any:
        x = self.encoder(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def own() -> keras.Model:
    model = Own()
    model(np.ones((1, 4), np.float32))
    return model


MODELS = [tickets, autoencoder, residual, shared, two_heads, own]
GRAPHS = MODELS[:-1]
each_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
each_graph = pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)


def state(model: keras.Model) -> State:
    return State(values(model.trainable_variables), values(model.non_trainable_variables), [], {})


def inputs(model: keras.Model) -> Any:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 4, (2, *(5 if n is None else n for n in x.shape[1:]))).astype("float32") for x in model.inputs]
    return keras.tree.pack_sequence_as(model.input, arrays)


@pytest.mark.slow
@each_model
def test_every_parameter_is_in_one_box(build: Callable[[], keras.Model]) -> None:
    model = build()
    nodes = graph(model).nodes
    assert sum(node.parameters for node in nodes) == model.count_params()
    assert len({node.name for node in nodes}) == len(nodes)


@pytest.mark.slow
@each_model
def test_every_copy_of_a_model_gives_the_same_graph(build: Callable[[], keras.Model]) -> None:
    assert graph(build()) == graph(build())


def test_the_graph_is_that_of_the_calls() -> None:
    found = graph(shared())
    assert set(found.edges) == {
        ("a", "again"),
        ("b", "again"),
        ("again", "again"),
        ("again", "tower/input_layer"),
        ("tower/input_layer", "tower/dense"),
        ("tower/dense", "tower/dense_1"),
        ("tower/dense_1", "tower/input_layer"),
        ("tower/dense_1", "add"),
        ("again", "add"),
    }
    assert found.scopes == {"tower": "Sequential"}
    found = graph(two_heads())
    assert ("middle/dense", "middle/twins/x") in found.edges
    assert {("middle/twins/left", "middle/concatenate"), ("middle/twins/right", "middle/concatenate")} < set(found.edges)
    assert {node.name: node.shapes for node in found.nodes}["middle/twins/right"] == ((None, 2),)


def test_a_layer_that_cannot_be_configured_leaves_a_list_of_layers() -> None:
    class Unnamed(layers.Layer):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def call(self, x: Any) -> Any:
            return self.function(x)

    x = keras.Input((3,))
    found = graph(keras.Model(x, Unnamed(lambda y: 2 * y)(layers.Dense(2)(x))))
    assert [node.kind for node in found.nodes] == ["InputLayer", "Dense", "Unnamed"]
    assert found.edges == []


def test_frozen_layers_are_told() -> None:
    model = tickets()
    model.get_layer("priority").trainable = False
    assert [node.name for node in graph(model).nodes if node.frozen] == ["priority"]


def placed(model: keras.Model) -> layout.Layout:
    found = graph(model)
    sizes = {node.name: (1.0 + 0.1 * len(node.name), 0.4) for node in found.nodes}
    return layout.layout(sizes, found.edges, dict.fromkeys(found.scopes, 1.0))


def apart(a: layout.Box, b: layout.Box) -> bool:
    across = a.x + a.width <= b.x + 1e-9 or b.x + b.width <= a.x + 1e-9
    return across or a.y + a.height <= b.y + 1e-9 or b.y + b.height <= a.y + 1e-9


def within(a: layout.Box, b: layout.Box) -> bool:
    inside_x = b.x - 1e-9 <= a.x and a.x + a.width <= b.x + b.width + 1e-9
    return inside_x and b.y - 1e-9 <= a.y and a.y + a.height <= b.y + b.height + 1e-9


@each_model
def test_no_two_boxes_overlap_and_each_frame_holds_its_own(build: Callable[[], keras.Model]) -> None:
    model = build()
    drawing = placed(model)
    assert list(drawing.boxes) == [node.name for node in graph(model).nodes]
    sheet = layout.Box(0, 0, drawing.width, drawing.height)
    areas = {**drawing.boxes, **{f"{path}/": box for path, box in drawing.frames.items()}}
    for name, box in areas.items():
        assert within(box, sheet)
        for other, area in areas.items():
            if name != other and name.startswith(other) and other.endswith("/"):
                assert within(box, area)
            elif name != other and not (other.startswith(name) and name.endswith("/")):
                assert apart(box, area), (name, other)


@each_graph
def test_every_edge_is_drawn_and_runs_down_unless_it_closes_a_cycle(build: Callable[[], keras.Model]) -> None:
    model = build()
    found, drawing = graph(model), placed(model)
    assert set(drawing.routes) == set(found.edges)
    back = {("again", "again"), ("tower/dense_1", "tower/input_layer")}
    for edge, route in drawing.routes.items():
        downwards = all(y0 <= y1 for (_, y0), (_, y1) in pairwise(route))
        assert downwards != (edge in back)
        for x, y in route:
            assert -1e-9 <= x <= drawing.width + 1e-9
            assert -1e-9 <= y <= drawing.height + 1e-9


def test_a_long_edge_runs_beside_the_boxes_that_it_passes() -> None:
    drawing = placed(residual())
    route = drawing.routes["input_layer", "add"]
    assert len(route) > 2
    for (x0, y0), (x1, y1) in pairwise(route[1:-1]):
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        assert not [name for name, b in drawing.boxes.items() if b.x < x < b.x + b.width and b.y < y < b.y + b.height]


def test_what_is_crossed_can_be_uncrossed() -> None:
    names = ["a", "b", "c", "A", "B", "C"]
    drawing = layout.layout(dict.fromkeys(names, (1.0, 1.0)), [("a", "C"), ("b", "B"), ("c", "A"), ("a", "B")], {})
    x = {name: box.x for name, box in drawing.boxes.items()}
    assert (x["a"] < x["b"] < x["c"]) == (x["C"] < x["B"] < x["A"])


@each_model
def test_the_picture_names_every_layer_and_its_words_stay_in_their_box(build: Callable[[], keras.Model]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import FancyBboxPatch

    model = build()
    figure = picture.model(model)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    words = [text for text in axes.texts if text.get_text()]
    told = " ".join(text.get_text() for text in words)
    found = graph(model)
    assert all(node.name.rpartition("/")[2] in told and node.kind in told for node in found.nodes)
    assert f"{model.count_params():,} parameters" in told
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    for text in words:
        extent = text.get_window_extent()
        inside = [b for b in boxes if b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1]
        assert inside or text in words[:2], text.get_text()  # the first two are the title
        assert figure.bbox.x0 <= extent.x0
        assert extent.x1 <= figure.bbox.x1


def test_a_large_model_gets_a_picture_that_programs_can_show() -> None:
    x = start = keras.Input((1,))
    for _ in range(200):
        x = layers.ReLU()(x)
    assert max(picture.model(keras.Model(start, x)).get_size_inches()) * 110 < 2**14


@pytest.mark.slow
@pytest.mark.promotes
@each_graph
def test_activations_are_what_the_layers_give_inside_the_model(build: Callable[[], keras.Model]) -> None:
    model = build()
    x = inputs(model)
    trained = state(model)
    trained = trained._replace(trainable=[w + 1 for w in trained.trainable])  # the state's weights, not the model's
    found = activations(model, trained, x)
    research.write_back(trained, model)
    outputs = keras.tree.flatten(model(x))
    assert all(any(np.array_equal(output, value) for value in found.values()) for output in outputs)
    for name, layer in zip(graphs.layer_names(model.layers), model.layers, strict=True):
        if name != "again" and not isinstance(layer, keras.Model | layers.InputLayer):  # those have one output of their own
            wanted = keras.Model(model.input, layer.output)(x)
            np.testing.assert_array_equal(found[name], wanted)
    told = {node.name for node in graph(model).nodes if node.kind != "InputLayer"}
    assert {re.sub(r"/\d$", "", name) for name in found} == told


def test_a_model_without_a_graph_has_no_activations_to_give() -> None:
    with pytest.raises(research.Refused, match="tells no graph"):
        activations(own(), state(own()), np.ones((1, 4)))


LOGS = [
    Entry(step, step // 3, split, {"loss": 1 / step, "accuracy": math.nan if step == 2 else 0.5})
    for step in (1, 2, 3)
    for split in ("train", "val")
]


def test_curves_show_every_metric_of_every_split() -> None:
    figure = picture.curves([*LOGS, Entry(3, 0, "test", {"loss": 0.1})])
    assert {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes} == {
        "loss": ["train", "val", "test"],
        "accuracy": ["train", "val"],
    }
    assert picture.curves([]).axes  # nothing logged yet is no error


def test_runs_are_told_apart_by_colour_and_splits_by_dashes() -> None:
    figure = picture.compared({"one": LOGS, "two": LOGS, "only trained": LOGS[::2]})
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 5
    assert {line.get_linestyle() for line in lines if line.get_label() == "one"} == {"--", "-"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "only trained"]

"""In the layout of a graph no boxes overlap, frames contain their boxes, and every edge is drawn."""

from collections.abc import Callable
from itertools import pairwise

import keras
from graph_models import each_model, each_model_with_graph, residual

from research.reporting.graph import model_graph
from research.reporting.graph_layout import Box, Layout, compute_layout


def layout_of(model: keras.Model) -> Layout:
    graph = model_graph(model)
    sizes = {node.name: (1.0 + 0.1 * len(node.name), 0.4) for node in graph.nodes}
    return compute_layout(sizes, graph.edges, dict.fromkeys(graph.scopes, 1.0))


def are_disjoint(a: Box, b: Box) -> bool:
    disjoint_x = a.x + a.width <= b.x + 1e-9 or b.x + b.width <= a.x + 1e-9
    return disjoint_x or a.y + a.height <= b.y + 1e-9 or b.y + b.height <= a.y + 1e-9


def is_inside(a: Box, b: Box) -> bool:
    inside_x = b.x - 1e-9 <= a.x and a.x + a.width <= b.x + b.width + 1e-9
    return inside_x and b.y - 1e-9 <= a.y and a.y + a.height <= b.y + b.height + 1e-9


@each_model
def test_no_boxes_overlap_and_each_frame_contains_its_boxes(build: Callable[[], keras.Model]) -> None:
    model = build()
    layout = layout_of(model)
    assert list(layout.boxes) == [node.name for node in model_graph(model).nodes]
    drawing = Box(0, 0, layout.width, layout.height)
    areas = {**layout.boxes, **{f"{path}/": box for path, box in layout.frames.items()}}
    for name, box in areas.items():
        assert is_inside(box, drawing)
        for other, area in areas.items():
            if name != other and name.startswith(other) and other.endswith("/"):
                assert is_inside(box, area)
            elif name != other and not (other.startswith(name) and name.endswith("/")):
                assert are_disjoint(box, area), (name, other)


@each_model_with_graph
def test_every_edge_is_drawn_and_runs_down_unless_it_closes_a_cycle(build: Callable[[], keras.Model]) -> None:
    model = build()
    graph, layout = model_graph(model), layout_of(model)
    assert set(layout.routes) == set(graph.edges)
    cycle_edges = {("twice", "twice"), ("tower/dense_1", "tower/input_layer")}
    for edge, route in layout.routes.items():
        downwards = all(y0 <= y1 for (_, y0), (_, y1) in pairwise(route))
        assert downwards != (edge in cycle_edges)
        for x, y in route:
            assert -1e-9 <= x <= layout.width + 1e-9
            assert -1e-9 <= y <= layout.height + 1e-9


def test_a_long_edge_does_not_cross_the_boxes_that_it_passes() -> None:
    layout = layout_of(residual())
    route = layout.routes["input_layer", "add"]
    assert len(route) > 2
    for (x0, y0), (x1, y1) in pairwise(route[1:-1]):
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        assert not [name for name, b in layout.boxes.items() if b.x < x < b.x + b.width and b.y < y < b.y + b.height]


def test_avoidable_crossings_are_removed() -> None:
    names = ["a", "b", "c", "A", "B", "C"]
    layout = compute_layout(dict.fromkeys(names, (1.0, 1.0)), [("a", "C"), ("b", "B"), ("c", "A"), ("a", "B")], {})
    x = {name: box.x for name, box in layout.boxes.items()}
    assert (x["a"] < x["b"] < x["c"]) == (x["C"] < x["B"] < x["A"])

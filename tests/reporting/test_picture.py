"""Figures show every layer of a model and every metric of a run, with readable labels."""

import math
from collections.abc import Callable

import keras
from graph_models import each_model
from keras import layers

from research.reporting import picture
from research.reporting.graph import model_graph
from research.training.logs import LogEntry


@each_model
def test_the_figure_names_every_layer_and_labels_stay_inside_their_box(build: Callable[[], keras.Model]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patches import FancyBboxPatch

    model = build()
    figure = picture.plot_model(model)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text()]
    all_text = " ".join(label.get_text() for label in labels)
    graph = model_graph(model)
    assert all(node.name.rpartition("/")[2] in all_text and node.class_name in all_text for node in graph.nodes)
    assert f"{model.count_params():,} parameters" in all_text
    boxes = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    for label in labels:
        extent = label.get_window_extent()
        inside = [b for b in boxes if b.x0 <= extent.x0 and extent.x1 <= b.x1 and b.y0 <= extent.y0 and extent.y1 <= b.y1]
        assert inside or label in labels[:2], label.get_text()  # the first two are the title
        assert figure.bbox.x0 <= extent.x0
        assert extent.x1 <= figure.bbox.x1


def test_the_figure_of_a_deep_model_stays_below_the_size_that_viewers_accept() -> None:
    x = inputs = keras.Input((1,))
    for _ in range(200):
        x = layers.ReLU()(x)
    assert max(picture.plot_model(keras.Model(inputs, x)).get_size_inches()) * 110 < 2**14


LOGS = [
    LogEntry(step, step // 3, split, {"loss": 1 / step, "accuracy": math.nan if step == 2 else 0.5})
    for step in (1, 2, 3)
    for split in ("train", "val")
]


def test_curves_show_every_metric_of_every_split() -> None:
    figure = picture.plot_curves([*LOGS, LogEntry(3, 0, "test", {"loss": 0.1})])
    assert {axes.get_title(): [line.get_label() for line in axes.lines] for axes in figure.axes} == {
        "loss": ["train", "val", "test"],
        "accuracy": ["train", "val"],
    }
    assert picture.plot_curves([]).axes  # no logs yet is not an error


def test_a_comparison_uses_a_colour_per_run_and_a_line_style_per_split() -> None:
    figure = picture.plot_comparison({"first": LOGS, "second": LOGS, "training only": LOGS[::2]})
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 5
    assert {line.get_linestyle() for line in lines if line.get_label() == "first"} == {"--", "-"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second", "training only"]

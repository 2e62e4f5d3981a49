"""Figures of runs and models: metrics over steps, and the layers of a network. Needs matplotlib only."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from research.reporting.graph import Graph, Node, model_graph
from research.reporting.graph_layout import HEADING, Box, Layout, Point, compute_layout
from research.training.logs import LogEntry

if TYPE_CHECKING:  # matplotlib is slow to import: only functions that draw do it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#555555", "#009988", "#bb5566")
LINE_STYLES: dict[str, Any] = {"val": "-", "train": (0, (4, 2)), "test": ":"}
TITLE_SIZE, NAME_SIZE, DETAIL_SIZE = 11.0, 9.0, 8.0  # points
MEMBER = "member"  # of lines that the legend leaves out
MAX_NAME = 60  # characters
MAX_VALUE = 1e200  # matplotlib's axes overflow near the largest float
MAX_HEIGHT = 90.0  # inches: taller drawings shrink, since few programs show larger images


def plot_curves(logs: Sequence[LogEntry]) -> "Figure":
    """Returns a figure with one panel per metric and one line per split, over steps.

    Of a population the line is the mean, in a band of 1.96 standard errors to each side; thin lines are its members. They leave
    out members whose value is not finite.

    >>> figure = plot_curves([LogEntry(1, 0, "train", {"loss": 2.0}), LogEntry(2, 0, "val", {"loss": 1.0})])
    >>> [axes.get_title() for axes in figure.axes]
    ['loss']
    """
    with _plain_text():
        return _draw_curves(logs)


def _draw_curves(logs: Sequence[LogEntry]) -> "Figure":
    figure, panels = _panels(logs)
    splits = dict.fromkeys(entry.split for entry in logs)
    for name, axes in panels.items():
        for split, colour in zip(splits, COLOURS * 9, strict=False):
            entries = [entry for entry in logs if entry.split == split]
            if any(name in entry.members for entry in entries):
                entries = _plot_members(axes, entries, name, colour)
            _plot_line(axes, entries, name, color=colour, label=split)
        lines = [line for line in axes.lines if line.get_gid() != MEMBER]
        if lines:
            axes.legend(lines, [_shortened(str(line.get_label())) for line in lines], frameon=False)
    return figure


def plot_comparison(runs: Mapping[str, Sequence[LogEntry]]) -> "Figure":
    """Returns a figure with one panel per metric and one colour per run; training is dashed, validation solid.

    >>> logs = [LogEntry(step, 0, split, {"loss": 1 / step}) for step in (1, 2) for split in ("train", "val")]
    >>> [line.get_linestyle() for line in plot_comparison({"a": logs, "b": logs}).axes[0].lines]
    ['--', '-', '--', '-']
    """
    with _plain_text():
        return _draw_comparison(runs)


def _draw_comparison(runs: Mapping[str, Sequence[LogEntry]]) -> "Figure":
    figure, panels = _panels([entry for logs in runs.values() for entry in logs])
    for name, axes in panels.items():
        for (run, logs), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            for split in dict.fromkeys(entry.split for entry in logs):
                style = {"color": colour, "label": run, "linestyle": LINE_STYLES.get(split, "-.")}
                entries = [entry for entry in logs if entry.split == split]
                if any(len(entry.members.get(name, ())) > 1 for entry in entries):
                    entries = _plot_members(axes, entries, name, colour)
                _plot_line(axes, entries, name, markers=False, **style)
    lines = {line.get_label(): line for axes in panels.values() for line in axes.lines}
    lines |= {line.get_label(): line for axes in panels.values() for line in axes.lines if line.get_linestyle() == "-"}
    handles = [lines[run] for run in runs if run in lines]
    labels = [_shortened(str(line.get_label())) for line in handles]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_model(model: keras.Model) -> "Figure":
    """Returns a figure of a model's graph: name, class, output shapes and parameters of each layer, and the edges.

    Nested models are frames around their layers. Inputs are green, layers with trainable weights blue, with frozen weights
    violet, without weights grey. If the graph is unknown (the model has its own `call`), the figure lists the layers.

    >>> figure = plot_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> [text.get_text() for text in figure.axes[0].texts]  # doctest: +ELLIPSIS
    ['sequential...Sequential, 15 parameters', 'input_layer', 'InputLayer', '(None, 4)', 'dense', ...]
    """
    with _plain_text():
        return _draw_model(model)


def _draw_model(model: keras.Model) -> "Figure":
    from matplotlib.figure import Figure

    graph = model_graph(model)
    sizes = {node.name: _box_size(node) for node in graph.nodes}
    headings = {path: _label_width(_last(path), class_name, NAME_SIZE) for path, class_name in graph.scopes.items()}
    title = graph.name, f"{graph.class_name}, {sum(math.prod(w.shape) for w in model.weights):,} parameters"
    layout = compute_layout(sizes, graph.edges, headings)
    margin, top = 0.2, 0.55
    width = max(layout.width, _label_width(*title, TITLE_SIZE)) + 2 * margin
    height = layout.height + top + margin
    scale = min(1.0, MAX_HEIGHT / height)
    figure = Figure(figsize=(width * scale, height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    dx = (width - layout.width) / 2
    axes.set(xlim=(-dx, width - dx), ylim=(height - top, -top))
    axes.axis("off")
    _draw_label(axes, (-dx + margin, -0.28), title, TITLE_SIZE, scale)
    _draw_frames(axes, graph, layout, scale)
    _draw_edges(axes, layout, scale)
    _draw_nodes(axes, graph, layout, scale)
    return figure


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Names are drawn as they are: a `$` in them begins no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def _draw_frames(axes: "Axes", graph: Graph, layout: Layout, scale: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.08", "linestyle": "--", "linewidth": scale}
    colours: dict[str, Any] = {"facecolor": "#f6f8fa", "edgecolor": "#8c959f"}
    background = {"facecolor": "#f6f8fa", "edgecolor": "none", "pad": 1.0}
    for path, box in sorted(layout.frames.items()):  # outer frames first
        corner, width, height = _rectangle(box)
        axes.add_patch(FancyBboxPatch(corner, width, height, **style, **colours))
        position = box.x + 0.1, box.y + HEADING / 2 + 0.05
        _draw_label(axes, position, (_last(path), graph.scopes[path]), NAME_SIZE, scale, bbox=background)


def _draw_edges(axes: "Axes", layout: Layout, scale: float) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9 * scale, "linewidth": 1.1 * scale}
    for points in layout.routes.values():
        vertices, codes = [points[0]], [Path.MOVETO]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            bend = (y1 - y0) / 2
            straight = bend == 0 or x0 == x1
            vertices += [(x1, y1)] if straight else [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
            codes += [Path.LINETO] if straight else [Path.CURVE4] * 3
        axes.add_patch(FancyArrowPatch(path=Path(vertices, codes), color="#57606a", shrinkA=0, shrinkB=0, **style))


def _draw_nodes(axes: "Axes", graph: Graph, layout: Layout, scale: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    for node in graph.nodes:
        box = layout.boxes[node.name]
        face, edge = _colours(node)
        axes.add_patch(FancyBboxPatch(*_rectangle(box), boxstyle=style, facecolor=face, edgecolor=edge, linewidth=scale))
        detail = _detail(node)
        y = box.y + (0.14 if detail else box.height / 2)
        _draw_label(axes, (box.x + 0.1, y), (_last(node.name), node.class_name), NAME_SIZE, scale)
        axes.text(box.x + 0.1, box.y + 0.33, detail, fontsize=DETAIL_SIZE * scale, va="center", color="#1b1f24")


def _rectangle(box: Box) -> tuple[Point, float, float]:
    """Returns a box as the corner, width and height that matplotlib's patches take."""
    return (box.x, box.y), box.width, box.height


def _last(path: str) -> str:
    """Returns the last part of a path."""
    return path.rpartition("/")[2]


def _box_size(node: Node) -> Point:
    """Returns the width and height of a layer's box in inches."""
    label_width = _label_width(_last(node.name), node.class_name, NAME_SIZE)
    return max(label_width, _text_width(_detail(node), DETAIL_SIZE)) + 0.2, 0.46 if _detail(node) else 0.28


def _detail(node: Node) -> str:
    """Returns the second line of a layer's box: its output shapes and parameters, if it has any."""
    parts = [", ".join(map(str, node.shapes[:3])) + ", ..." * (len(node.shapes) > 3)] if node.shapes else []
    parts += [f"{node.parameters:,} parameters{', frozen' * node.frozen}"] if node.parameters else []
    return "   ".join(parts)


def _colours(node: Node) -> tuple[str, str]:
    """Returns the fill and edge colours of a layer's box."""
    if node.class_name == "InputLayer":
        return "#e6f4ea", "#228833"
    if not node.parameters:
        return "#f6f8fa", "#8c959f"
    return ("#efe6f7", "#7a4fa3") if node.frozen else ("#e3eefb", "#4477aa")


def _draw_label(axes: "Axes", position: Point, label: tuple[str, str], size: float, scale: float, **style: Any) -> None:
    """Draws a name in bold, and its class in grey."""
    name, class_name = label
    x, y = position
    style |= {"fontsize": size * scale, "va": "center"}
    axes.text(x, y, name, weight="bold", color="#1b1f24", **style)
    axes.text(x + _text_width(name, size, "bold") + 0.1, y, class_name, color="#57606a", **style)


def _label_width(name: str, class_name: str, size: float) -> float:
    return _text_width(name, size, "bold") + 0.1 + _text_width(class_name, size)


@functools.cache
def _text_width(text: str, size: float, weight: str = "normal") -> float:
    """Returns a slightly generous width of a text in inches; `size` is in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text:
        return 0.0
    return float(TextPath((0, 0), text, prop=FontProperties(weight=weight, size=size)).vertices[:, 0].max()) / 68


def _shortened(name: str) -> str:
    """Returns a name that a panel has room for."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]} ..."


def _panels(logs: Sequence[LogEntry]) -> tuple["Figure", dict[str, "Axes"]]:
    """Returns a figure with an empty panel per metric of the logs, the loss first, without those of single layers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for entry in logs for name in entry.values if "/" not in name)) or ["loss"]
    names.sort(key=lambda name: name != "loss")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    panels = {name: figure.add_subplot(rows, columns, i + 1) for i, name in enumerate(names)}
    for name, axes in panels.items():
        axes.set_title(_shortened(name), fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plot_members(axes: "Axes", logs: Sequence[LogEntry], name: str, colour: str) -> list[LogEntry]:
    """Draws the members of a population as thin lines, and a band around their mean. Returns entries with that mean.

    The band reaches 1.96 standard errors of the mean to each side. Both are those of the members with a finite value.
    """
    steps = [entry.step for entry in logs if name in entry.members]
    lists = [entry.members[name] for entry in logs if name in entry.members]
    # A damaged log may have fewer values.
    values = np.array(list(itertools.zip_longest(*lists, fillvalue=math.nan)), float).reshape(-1, len(lists)).T
    values[~(np.abs(values) <= MAX_VALUE)] = math.nan
    count = np.isfinite(values).sum(1)
    mean = np.nansum(values, 1) / np.where(count, count, math.nan)
    variance = np.nansum((values - mean[:, None]) ** 2, 1) / np.where(count > 1, count - 1, math.nan)
    error = 1.96 * np.sqrt(variance / np.where(count, count, math.nan))
    alpha = max(0.08, min(0.5, 3 / max(1, values.shape[1])))
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=alpha, gid=MEMBER)
    axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
    return [LogEntry(step, 0, "", {name: value}) for step, value in zip(steps, mean.tolist(), strict=True)]


def _plot_line(axes: "Axes", logs: Sequence[LogEntry], name: str, markers: bool = True, **style: Any) -> None:
    """Draws a metric of one split over steps; a single point as a diamond. Values beyond `MAX_VALUE` are gaps, like NaN."""
    values = {entry.step: entry.values[name] for entry in logs if name in entry.values}
    points = [(step, value if abs(value) <= MAX_VALUE else math.nan) for step, value in values.items()]
    if points:
        marker, size = ("D", 7.0) if len(points) == 1 else ("o", 3.5) if markers and len(points) < 40 else ("", 0.0)
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=size, linewidth=1.6, **style)

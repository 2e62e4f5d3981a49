"""Pictures of runs and of models: curves over the steps, and a network's layers. Nothing beside matplotlib is needed."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from research.graph import Graph, Node, graph
from research.layout import HEADING, Box, Point, layout
from research.loop import Entry

if TYPE_CHECKING:  # drawing is slow to import: only where something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#555555", "#009988", "#bb5566")
DASHES: dict[str, Any] = {"val": "-", "train": (0, (4, 2)), "test": ":"}
TITLE, NAME, SMALL = 11.0, 9.0, 8.0  # points
TALLEST = 90.0  # inches: beyond, a drawing shrinks, since few programs show larger pictures


def curves(logs: Sequence[Entry]) -> "Figure":
    """Every metric over the steps, a panel each, training and the other splits beside each other.

    >>> figure = curves([Entry(1, 0, "train", {"loss": 2.0}), Entry(2, 0, "val", {"loss": 1.0})])
    >>> [axes.get_title() for axes in figure.axes]
    ['loss']
    """
    figure, panels = _panels(logs)
    splits = dict.fromkeys(entry.split for entry in logs)
    for name, axes in panels.items():
        for split, colour in zip(splits, COLOURS * 9, strict=False):
            _curve(axes, [entry for entry in logs if entry.split == split], name, color=colour, label=split)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def compared(runs: Mapping[str, Sequence[Entry]]) -> "Figure":
    """Every metric of several runs over the steps, a panel each: a colour for each run, training dashed, validation solid.

    >>> logs = [Entry(step, 0, split, {"loss": 1 / step}) for step in (1, 2) for split in ("train", "val")]
    >>> [line.get_linestyle() for line in compared({"a": logs, "b": logs}).axes[0].lines]
    ['--', '-', '--', '-']
    """
    figure, panels = _panels([entry for logs in runs.values() for entry in logs])
    for name, axes in panels.items():
        for (run, logs), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            for split in dict.fromkeys(entry.split for entry in logs):
                style = {"color": colour, "label": run, "linestyle": DASHES.get(split, "-.")}
                _curve(axes, [entry for entry in logs if entry.split == split], name, dots=False, **style)
    handles = {line.get_label(): line for axes in panels.values() for line in axes.lines if line.get_linestyle() == "-"}
    handles = {line.get_label(): line for axes in panels.values() for line in axes.lines} | handles
    shown = [handles[run] for run in runs if run in handles]
    figure.legend(shown, [str(line.get_label()) for line in shown], loc="outside lower center", ncols=4, frameon=False)
    return figure


def model(model: keras.Model) -> "Figure":
    """The layers of a model: name, class, output shapes and parameters of each, and what goes from where to where.

    Nested models are drawn as frames around their own layers, a layer called several times once. Green is an input, blue has
    weights that are trained, violet weights that are frozen, grey none. A model that tells no graph (its `call` is its own) is a
    list of its layers.

    >>> figure = model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))
    >>> [text.get_text() for text in figure.axes[0].texts]  # doctest: +ELLIPSIS
    ['sequential...Sequential, 15 parameters', 'input_layer', 'InputLayer', '(None, 4)', 'dense', ...]
    """
    from matplotlib.figure import Figure

    found = graph(model)
    sizes = {node.name: _size(node) for node in found.nodes}
    headings = {path: _label_width(path.rpartition("/")[2], kind, NAME) for path, kind in found.scopes.items()}
    title = found.name, f"{found.kind}, {sum(math.prod(w.shape) for w in model.weights):,} parameters"
    placed = layout(sizes, found.edges, headings)
    rim, top = 0.2, 0.55
    width = max(placed.width, _label_width(*title, TITLE)) + 2 * rim
    height = placed.height + top + rim
    scale = min(1.0, TALLEST / height)
    figure = Figure(figsize=(width * scale, height * scale))
    axes = figure.add_axes((0, 0, 1, 1))
    dx = (width - placed.width) / 2
    axes.set(xlim=(-dx, width - dx), ylim=(height - top, -top))
    axes.axis("off")
    _label(axes, (-dx + rim, -0.28), title, TITLE, scale)
    _draw(axes, found, placed.boxes, placed.frames, placed.routes, scale)
    return figure


def _draw(
    axes: "Axes",
    found: Graph,
    boxes: Mapping[str, Box],
    frames: Mapping[str, Box],
    routes: Mapping[tuple[str, str], list[Point]],
    scale: float,
) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path

    for path, box in sorted(frames.items()):  # the outer ones first
        style, clear = "round,pad=0,rounding_size=0.08", {"facecolor": "#f6f8fa", "edgecolor": "none", "pad": 1.0}
        axes.add_patch(
            FancyBboxPatch(
                *_lower(box), boxstyle=style, facecolor="#f6f8fa", edgecolor="#8c959f", linestyle="--", linewidth=scale
            )
        )
        _label(
            axes,
            (box.x + 0.1, box.y + HEADING / 2 + 0.05),
            (path.rpartition("/")[2], found.scopes[path]),
            NAME,
            scale,
            bbox=clear,
        )
    for points in routes.values():
        vertices, codes = [points[0]], [Path.MOVETO]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            bend = (y1 - y0) / 2
            straight = bend == 0 or x0 == x1
            vertices += [(x1, y1)] if straight else [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
            codes += [Path.LINETO] if straight else [Path.CURVE4] * 3
        arrow: dict[str, Any] = {
            "arrowstyle": "-|>",
            "mutation_scale": 9 * scale,
            "linewidth": 1.1 * scale,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.add_patch(FancyArrowPatch(path=Path(vertices, codes), color="#57606a", **arrow))
    for node in found.nodes:
        box = boxes[node.name]
        style = "round,pad=0,rounding_size=0.06"
        face, edge = _colours(node)
        axes.add_patch(FancyBboxPatch(*_lower(box), boxstyle=style, facecolor=face, edgecolor=edge, linewidth=scale))
        second = _second_line(node)
        y = box.y + (0.14 if second else box.height / 2)
        _label(axes, (box.x + 0.1, y), (node.name.rpartition("/")[2], node.kind), NAME, scale)
        axes.text(box.x + 0.1, box.y + 0.33, second, fontsize=SMALL * scale, va="center", color="#1b1f24")


def _lower(box: Box) -> tuple[Point, float, float]:
    """A box as matplotlib's patches take it."""
    return (box.x, box.y), box.width, box.height


def _size(node: Node) -> Point:
    first = _label_width(node.name.rpartition("/")[2], node.kind, NAME)
    return max(first, _width(_second_line(node), SMALL)) + 0.2, 0.46 if _second_line(node) else 0.28


def _second_line(node: Node) -> str:
    """A layer's output shapes and its parameters, where it has any."""
    told = [", ".join(map(str, node.shapes[:3])) + ", ..." * (len(node.shapes) > 3)] if node.shapes else []
    told += [f"{node.parameters:,} parameters{', frozen' * node.frozen}"] if node.parameters else []
    return "   ".join(told)


def _colours(node: Node) -> tuple[str, str]:
    """What a layer's box is filled with, and its rim."""
    if node.kind == "InputLayer":
        return "#e6f4ea", "#228833"
    if not node.parameters:
        return "#f6f8fa", "#8c959f"
    return ("#efe6f7", "#7a4fa3") if node.frozen else ("#e3eefb", "#4477aa")


def _label(axes: "Axes", at: Point, words: tuple[str, str], size: float, scale: float, **box: Any) -> None:
    """A name, and in grey what it is."""
    name, kind = words
    x, y = at
    axes.text(x, y, name, fontsize=size * scale, va="center", weight="bold", color="#1b1f24", **box)
    axes.text(x + _width(name, size, "bold") + 0.1, y, kind, fontsize=size * scale, va="center", color="#57606a", **box)


def _label_width(name: str, kind: str, size: float) -> float:
    return _width(name, size, "bold") + 0.1 + _width(kind, size)


@functools.cache
def _width(text: str, size: float, weight: str = "normal") -> float:
    """The width of a text in inches, its size in points, with a little to spare."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text:
        return 0.0
    return float(TextPath((0, 0), text, prop=FontProperties(weight=weight, size=size)).vertices[:, 0].max()) / 68


def _panels(logs: Sequence[Entry]) -> tuple["Figure", dict[str, "Axes"]]:
    """A figure with an empty panel for each metric of the logs, the loss first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for entry in logs for name in entry.values)) or ["loss"]
    names.sort(key=lambda name: name != "loss")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    panels = {name: figure.add_subplot(rows, columns, i + 1) for i, name in enumerate(names)}
    for name, axes in panels.items():
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _curve(axes: "Axes", logs: Sequence[Entry], name: str, dots: bool = True, **style: Any) -> None:
    points = [(entry.step, entry.values[name]) for entry in logs if name in entry.values]
    if points:
        marker, size = ("D", 7.0) if len(points) == 1 else ("o", 3.5) if dots and len(points) < 40 else ("", 0.0)
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=size, linewidth=1.6, **style)

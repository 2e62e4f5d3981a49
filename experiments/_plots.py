"""Figures that several experiments draw: images in a grid or with titles, confusion matrices, axes without a frame."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # slow to import: only when a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#4477aa", "#ee6677", "#228833"


def image_grid(images: np.ndarray, columns: int = 10, inches: float = 4.0) -> "Figure":
    """Returns a figure of grey images from -1 (white) to 1 (black), [images, height, width], in rows of `columns`.

    >>> figure = image_grid(np.zeros((100, 8, 8)))
    >>> figure.axes[0].images[0].get_array().shape
    (90, 90)
    """
    from matplotlib.figure import Figure

    count, height, width = images.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height + 1, width + 1), -1.0)  # a white line below and beside each image
    tiles[:count, :height, :width] = images
    grid = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2).reshape(rows * (height + 1), -1)
    figure = Figure(figsize=(inches, inches * grid.shape[0] / grid.shape[1]))
    show_image(figure.add_axes((0.02, 0.02, 0.96, 0.96)), grid)
    return figure


def image_panel(axes: Iterable["Axes"], images: Sequence[np.ndarray], titles: Sequence[str], **style: Any) -> None:
    """Draws an image with its title in each of the axes, as far as there are images; axes without one are left blank.

    >>> from matplotlib.figure import Figure
    >>> panel = Figure().subplots(1, 3)
    >>> image_panel(panel, np.zeros((2, 8, 8)), ["a", "b"])
    >>> [(axes.get_title(), len(axes.images)) for axes in panel]
    [('a', 1), ('b', 1), ('', 0)]
    """
    for i, each in enumerate(axes):
        if i < len(images):
            show_image(each, images[i], titles[i], **style)
        else:
            each.axis("off")


def show_image(axes: "Axes", image: np.ndarray, title: str = "", **style: Any) -> None:
    """Draws a grey image, by default from -1 (white) to 1 (black), without ticks; `style` goes to `imshow`.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot()
    >>> show_image(axes, np.zeros((8, 8)), "a digit")
    >>> axes.get_title(), axes.axison
    ('a digit', False)
    """
    axes.imshow(image, **{"cmap": "gray_r", "vmin": -1, "vmax": 1, **style})
    axes.set_title(title, fontsize=8, pad=2)
    axes.axis("off")


def confusion_matrix(axes: "Axes", labels: np.ndarray, predictions: np.ndarray, names: Sequence[Any], fontsize: float) -> None:
    """Draws how often each class (row) was predicted as each class (column), coloured by its share of the row.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot()
    >>> confusion_matrix(axes, np.array([0, 1, 1]), np.array([0, 1, 0]), ["cat", "dog"], fontsize=8)
    >>> [text.get_text() for text in axes.texts]
    ['1', '1', '1']
    """
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "w" if shares[row, column] > 0.5 else "k"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=fontsize, color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)


def hide_frame(axes: "Axes") -> None:
    """Hides the top and the right edge of the axes' frame.

    >>> from matplotlib.figure import Figure
    >>> axes = Figure().add_subplot()
    >>> hide_frame(axes)
    >>> axes.spines["top"].get_visible(), axes.spines["left"].get_visible()
    (False, True)
    """
    axes.spines[["top", "right"]].set_visible(False)

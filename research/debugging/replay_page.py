"""A replayed step as files and tables: replay.json, replay.html, batch.npz."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from research.debugging.instrument import Call
from research.debugging.replay import Replay
from research.reporting import record
from research.reporting.report import Table, write_page

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.figure import Figure

WORST = 16  # rows that are shown
STATISTICS = ("mean", "std", "min", "max", "norm", "zeros", "nonfinite")


def facts(step: Replay) -> dict[str, Any]:
    """Returns what is to be said about a step in single values.

    >>> facts(Replay(3, 0, [1, 2], "3f", "77", None, {"loss": 0.5}, {}, [], None, [], None))["logs compared"]
    '2, all equal'
    """
    return {
        "computed from": f"step {step.start}" if step.start else "the initial state",
        "logs compared": f"{len(step.compared)}, all equal" if step.compared else "none was recorded on the way",
        "state before": step.digest_before[:16],
        "state after": step.digest[:16],
        **({} if step.decision is None else {"the run went on with": f"the state of step {step.decision.restored}"}),
        **({} if step.blame is None else {"numbers": step.blame.describe()}),
        **step.logs,
    }


def worst_rows(step: Replay, count: int = WORST) -> list[int]:
    """Returns the rows with the largest losses, NaN first.

    >>> worst_rows(Replay(3, 0, [], "", "", None, {}, {}, [], None, [0.1, float("nan"), 0.5], None), 2)
    [1, 2]
    """
    return np.argsort(-np.nan_to_num(np.array(step.row_losses), nan=np.inf), kind="stable")[:count].tolist()


def write_replay(directory: Path, step: Replay, title: str) -> Path:
    """Writes the files of a replayed step into a directory; returns the path of the page."""
    directory.mkdir(parents=True, exist_ok=True)
    found = step.blame
    losses = {f"row {row}": step.row_losses[row] for row in worst_rows(step)}
    fields = ("step", "start", "compared", "digest_before", "digest", "logs", "layers", "row_losses")
    decision = None if step.decision is None else step.decision._asdict()
    blamed = None if found is None else {"summary": found.describe(), **found._asdict()}
    contents = {name: getattr(step, name) for name in fields} | {"decision": decision, "blame": blamed}
    record.write_json(directory / "replay.json", contents)
    arrays = {jax.tree_util.keystr(path).lstrip(".") or "batch": leaf for path, leaf in jax.tree.leaves_with_path(step.batch)}
    with (directory / "batch.npz").open("wb") as file:
        np.savez(file, **{name: np.asarray(leaf) for name, leaf in arrays.items()})  # type: ignore[arg-type]
    norms = {} if found is None else found.norms
    figures = {name: record.png_bytes(figure) for name, figure in draw(step).items()}
    page = directory / "replay.html"
    sections: dict[str, Any] = {
        "Step": facts(step),
        "Outputs": _layer_table(step, "output"),
        "Gradients of the loss with respect to outputs": _layer_table(step, "gradient"),
        "Variables": Table(["weights", "gradient", "update"], {name: list(values.values()) for name, values in norms.items()}),
        "Rows with the largest loss": losses | {k: v for k, v in figures.items() if k == "worst rows"},
        "Histograms": {k: v for k, v in figures.items() if k != "worst rows"},
    }
    write_page(page, title, sections)
    return page


def layer_table(step: Replay) -> Any:
    """Returns statistics of the outputs of each layer call, as a table of rich.

    >>> layer_table(Replay(3, 0, [], "", "", None, {}, {}, [], None, [], None)).row_count
    0
    """
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False)
    for column in ("layer", "shape", *STATISTICS, "gradient"):
        table.add_column(column, no_wrap=True, overflow="ignore" if column == "layer" else "fold")
    for name, values in step.layers.items():
        output, gradient = values["output"], values["gradient"]
        cells = ["" if gradient is None else f"{gradient['norm']:.3g}"]
        table.add_row(name, "x".join(map(str, output["shape"])), *(f"{output[each]:.3g}" for each in STATISTICS), *cells)
    return table


def draw(step: Replay) -> dict[str, "Figure"]:
    """Returns figures: histograms of outputs and of gradients, and the worst rows as pictures, if they are such."""
    figures = {}
    for name, field in (("outputs", "outputs"), ("gradients", "output_gradients")):
        calls = [call for call in step.calls if any(array.size for array in getattr(call, field))]
        if calls:
            figures[name] = _histograms(calls, field)
    images = next((leaf for leaf in map(np.asarray, jax.tree.leaves(step.batch)) if _is_images(leaf)), None)
    if images is not None:
        rows = worst_rows(step) or list(range(min(WORST, len(images))))
        titles = [f"row {row}" + (f": {step.row_losses[row]:.3g}" if step.row_losses else "") for row in rows]
        figures["worst rows"] = _pictures(images[rows], titles)
    return figures


def _layer_table(step: Replay, part: str) -> Table:
    rows = {name: values[part] for name, values in step.layers.items() if values[part] is not None}
    return Table(
        ["shape", *STATISTICS],
        {name: ["x".join(map(str, each["shape"])), *(each[key] for key in STATISTICS)] for name, each in rows.items()},
    )


def _histograms(calls: list[Call], field: str, columns: int = 5) -> "Figure":
    from matplotlib.figure import Figure

    rows = -(-len(calls) // columns)
    figure = Figure((3 * columns, 2.2 * rows), layout="constrained")
    for axes, call in zip(figure.subplots(rows, columns, squeeze=False).flat, calls, strict=False):
        values = np.concatenate([np.asarray(array, np.float64).ravel() for array in getattr(call, field)])
        finite = values[np.isfinite(values)]
        axes.hist(finite, bins=40, color="#4477aa")
        lost = len(values) - len(finite)
        axes.set_title(call.name[-36:] + (f"\n{lost} not finite" if lost else ""), fontsize=8, color="#cc3311" if lost else "k")
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    for axes in figure.axes[len(calls) :]:
        axes.axis("off")
    return figure


def _is_images(array: np.ndarray) -> bool:
    return (
        array.dtype.kind in "fu"
        and min(array.shape[1:3], default=0) > 3
        and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3)))
    )


def _pictures(images: np.ndarray, titles: list[str]) -> "Figure":
    from matplotlib.figure import Figure

    columns = 8
    rows = -(-len(images) // columns)
    figure = Figure((1.5 * columns, 1.8 * rows), layout="constrained")
    low, high = float(np.nanmin(images)), float(np.nanmax(images))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, title in zip(figure.axes, images, titles, strict=False):
        axes.imshow((np.squeeze(image) - low) / max(high - low, 1e-12), cmap="gray", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
    return figure

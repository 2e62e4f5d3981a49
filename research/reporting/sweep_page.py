"""The page of a sweep: its trials, the command of the best, what matters, and how each trial went."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from research.reporting import page, record

if TYPE_CHECKING:  # matplotlib is slow to import: only functions that draw do it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREY = "#4477aa", "#ee6677", "#9aa4ad"


class Trial(NamedTuple):
    """A trial: how it ended, its value, the values of the fields that vary, its run, and the metric by epoch, counted from 0.

    >>> Trial(0, "complete", 0.5, {"units": 64}).value
    0.5
    """

    number: int
    state: str
    value: float | None
    values: Mapping[str, Any]
    run: Path | None = None
    why: str = ""
    curve: Sequence[tuple[int, float]] = ()


class Sweep(NamedTuple):
    """What the page of a sweep shows. `log_scaled` are the fields that vary by factors, `importances` shares of fields."""

    title: str
    metric: str
    highest: bool
    trials: Sequence[Trial]
    log_scaled: frozenset[str]
    importances: Mapping[str, float]
    command: str

    def ranked(self) -> list[Trial]:
        """Returns the trials, the best first, then those without a value."""
        sign = -1 if self.highest else 1
        return sorted(self.trials, key=lambda each: (each.value is None, sign * (each.value or 0), each.number))


def write_sweep(path: Path, sweep: Sweep) -> Path:
    """Writes the page of a sweep; returns its path.

    >>> import tempfile
    >>> trials = [Trial(0, "complete", 0.5, {"units": 64}), Trial(1, "failed", None, {"units": 128}, why="no memory")]
    >>> sweep = Sweep("sweep of digits", "val_loss", False, trials, frozenset(), {}, "just run digits --units 64")
    >>> write_sweep(Path(tempfile.mkdtemp()) / "sweep.html", sweep).name
    'sweep.html'
    """
    ranked = sweep.ranked()
    fields = list(dict.fromkeys(name for trial in ranked for name in trial.values))
    columns = [sweep.metric + (" ↑" if sweep.highest else " ↓"), *fields, "state", ""]
    titles = {
        str(trial.number): f"{page.link(trial.run / 'report.html', path.parent, f'trial {trial.number}')}"
        if trial.run
        else f"trial {trial.number}"
        for trial in ranked
    }
    rows = [
        [
            f"<b>{page.text(trial.value)}</b>" if trial is ranked[0] and trial.value is not None else page.text(trial.value),
            *(page.text(trial.values.get(name)) for name in fields),
            page.status("finished" if trial.state == "complete" else trial.state),
            html.escape(trial.why[:200]),
        ]
        for trial in ranked
    ]
    figure = record.png_bytes(plot_sweep(sweep)) if ranked else b""
    parts = [
        page.section("Best", f"<p><code>{html.escape(sweep.command)}</code></p>") if sweep.command else "",
        page.section("Trials", f'<div class="numbers">{page.rows(titles, columns, rows)}</div>'),
        page.section("Figures", page.image(figure, "trials and fields")) if figure else "",
    ]
    record.write_text(path, page.render(sweep.title, parts))
    return path


def plot_sweep(sweep: Sweep) -> "Figure":
    """Returns a figure of a sweep: values by trial, the metric by epoch, what matters, and values by each field.

    >>> trials = [Trial(i, "complete", 1 / (i + 1), {"units": 2**i}) for i in range(4)]
    >>> figure = plot_sweep(Sweep("", "val_loss", False, trials, frozenset({"units"}), {"units": 1.0}, ""))
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['trial', 'share of the differences', 'units']
    """
    from matplotlib.figure import Figure

    fields = list(dict.fromkeys(name for trial in sweep.trials for name in trial.values))
    panels: list[Any] = [_plot_values]
    panels += [_plot_curves] if any(trial.curve for trial in sweep.trials) else []
    panels += [_plot_importances] if sweep.importances else []
    panels += [(name,) for name in fields]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(5.2 * min(3, len(panels)), 3.6 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, min(3, len(panels)), i + 1)
        axes.spines[["top", "right"]].set_visible(False)
        if callable(panel):
            panel(axes, sweep)
        else:
            _plot_field(axes, sweep, panel[0])
    return figure


def _plot_values(axes: "Axes", sweep: Sweep) -> None:
    """Draws the value of each trial in the order of their numbers, and the best so far."""
    from matplotlib.ticker import MaxNLocator

    done = sorted((trial.number, trial.value) for trial in sweep.trials if trial.value is not None)
    others = [trial.number for trial in sweep.trials if trial.value is None and trial.state != "running"]
    if done:
        numbers, values = zip(*done, strict=True)
        axes.plot(numbers, values, "o", color=BLUE, markersize=4)
        best = (np.maximum if sweep.highest else np.minimum).accumulate(values)
        axes.step(numbers, best, where="post", color=RED, linewidth=1.4, label="best so far")
        axes.legend(frameon=False)
    for number in others:
        axes.axvline(number, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="trial", ylabel=sweep.metric)
    axes.set_title("values; dotted: trials without one", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plot_curves(axes: "Axes", sweep: Sweep) -> None:
    """Draws the metric of each trial by epoch: the best in red, trials that were stopped early in grey."""
    from matplotlib.ticker import MaxNLocator

    best = sweep.ranked()[0]
    for trial in sorted(sweep.trials, key=lambda each: each is best):
        colour = RED if trial is best else BLUE if trial.state == "complete" else GREY
        if trial.curve:
            width = 2.0 if trial is best else 0.9
            marker = "o" if len(trial.curve) == 1 else ""
            epochs, values = zip(*trial.curve, strict=True)
            axes.plot(np.array(epochs) + 1, values, color=colour, linewidth=width, marker=marker, markersize=3)
    shown = [value for trial in sweep.trials for _, value in trial.curve]
    if min(shown) > 0 and max(shown) > 20 * min(shown):
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel=sweep.metric)
    axes.set_title("red: the best; grey: stopped early", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _plot_importances(axes: "Axes", sweep: Sweep) -> None:
    """Draws the share of each field in the differences between trials."""
    names = sorted(sweep.importances, key=lambda name: sweep.importances[name])
    axes.barh(names, [sweep.importances[name] for name in names], color=BLUE)
    axes.set(xlabel="share of the differences", xlim=(0, 1))
    axes.set_title("importance of the fields", fontsize=11)


def _plot_field(axes: "Axes", sweep: Sweep, name: str) -> None:
    """Draws the value of each trial by its value of a field; later trials are darker, the best has a ring."""
    from matplotlib.ticker import NullFormatter

    done = [trial for trial in sweep.trials if trial.value is not None and name in trial.values]
    axes.set(xlabel=name, ylabel=sweep.metric)
    if not done:
        return
    given = [trial.values[name] for trial in done]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)
    choices = sorted({str(value) for value in given})
    x = given if numeric else [choices.index(str(value)) for value in given]
    y = [trial.value if trial.value is not None else math.nan for trial in done]
    axes.scatter(x, y, c=[trial.number for trial in done], cmap="Blues", vmin=-len(done), s=24, edgecolors="none")
    best = done.index(min(done, key=sweep.ranked().index))
    axes.plot(x[best], y[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=RED, markeredgewidth=1.6)
    if not numeric:
        axes.set_xticks(range(len(choices)), choices)
    elif name in sweep.log_scaled:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{name}; later trials are darker", fontsize=11)

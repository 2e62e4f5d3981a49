"""What the benchmark reports: ratios with their intervals, Markdown tables and the figure."""

import math
from typing import TYPE_CHECKING, Any

from systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A ratio's name in bench.json, and the two systems whose times are divided.
RATIOS = {
    "ours_over_floor": ("research", "jax-scan"),
    "keras_over_ours": ("keras-jax", "research"),
    "keras32_over_ours": ("keras-jax-32", "research"),
    "keras_over_fit": ("keras-jax", "research-fit"),
    "reordered_over_ours": ("research-reordered", "research"),
}
# The times of the fastest peer over those of these systems.
PEER_RATIOS = {"fastest_peer_over_ours": "research", "fastest_peer_over_reordered": "research-reordered"}
RATIO_HEADINGS = (
    "research / floor",
    "Keras fit / research",
    "Keras fit, 32 / research",
    "Keras fit / research.fit",
    "fast sums / research",
    "fastest peer / research",
    "fastest peer / fast sums",
)


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the ratios of one workload's rows, each as [low, median, high] of the ratios within each round."""
    times = {row["system"]: row["us_per_step"]["rounds"] for row in rows}
    results: dict[str, Any] = {}
    for name, (numerator, denominator) in RATIOS.items():
        if numerator in times and denominator in times:
            results[name] = interval(_divided(times[numerator], times[denominator]))
    peers = [system for system in times if SYSTEMS[system].peer]
    if peers and "research" in times:
        fastest = results["fastest_peer"] = min(peers, key=lambda peer: median(times[peer]))
        for name, denominator in PEER_RATIOS.items():
            if denominator in times:
                results[name] = interval(_divided(times[fastest], times[denominator]))
    return results


def _divided(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def interval(values: list[float]) -> list[float]:
    """Returns [low, median, high]: an interval that contains the true median with at least 95% confidence, by the sign test.

    >>> interval([float(i) for i in range(1, 11)])
    [2.0, 5.5, 9.0]
    """
    n, ordered = len(values), sorted(values)
    tails = [sum(math.comb(n, j) for j in range(k + 1)) / 2**n for k in range(n)]
    cut = sum(tail <= 0.025 for tail in tails[: n // 2])
    return [ordered[max(cut - 1, 0)], median(values), ordered[-max(cut, 1)]]


def median(values: list[float]) -> float:
    """Returns the median; of an even number of values, the mean of the middle two.

    >>> median([3.0, 1.0, 2.0, 10.0])
    2.5
    """
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def tables(results: dict[str, Any]) -> str:
    """Returns bench.json's content in Markdown: ratios, then each system's times, starts and memory."""
    rows = {(row["workload"], row["system"]): row for row in results["rows"]}
    names, systems = list(results["ratios"]), results["config"]["systems"]

    def grid(cell: Any) -> str:
        lines = [[SYSTEMS[s].title, *(cell(rows[name, s]) if (name, s) in rows else "" for name in names)] for s in systems]
        return _table(["", *names], lines)

    parts = [
        _table(["time per step", *RATIO_HEADINGS], [_ratio_row(name, results["ratios"][name]) for name in names]),
        "Microseconds per step, median:\n\n" + grid(lambda row: _microseconds(row["us_per_step"]["median"])),
        "Seconds from the start of the process to the end of its first step, programs already compiled:\n\n"
        + grid(lambda row: f"{row['seconds_to_first_step']:.1f}"),
        "The same with an empty compilation cache:\n\n" + grid(lambda row: f"{row['seconds_to_first_step_cold']:.1f}"),
        "Peak memory minus memory after imports, MB:\n\n" + grid(lambda row: f"{row['peak_mb_over_imports']:.0f}"),
    ]
    waiting = [row for row in results["rows"] if "waiting_share" in row]
    parts += [f"{row['system']} on {row['workload']} waited for data {row['waiting_share']:.1%} of the time." for row in waiting]
    machine = results["machine"]
    parts.append(
        f"{machine['processor']}, {machine['cpus']} cores, {machine['memory_gib']} GiB; {machine['platform']}; "
        f"Python {machine['python']}; "
        + ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        + f"; {machine['date']}."
    )
    return "\n\n".join(parts) + "\n"


def _ratio_row(name: str, values: dict[str, Any]) -> list[str]:
    cells = [_ratio(values.get(ratio)) for ratio in (*RATIOS, *PEER_RATIOS)]
    at = len(RATIOS)  # of the fastest peer over research: the cell names the peer
    return [name, *cells[:at], f"{values.get('fastest_peer', '')} {cells[at]}", *cells[at + 1 :]]


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(values: list[float] | None) -> str:
    return "" if values is None else f"{values[1]:.2f} [{values[0]:.2f}, {values[2]:.2f}]"


def _microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def figure(results: dict[str, Any]) -> "Figure":
    """Draws each system's time per step over the floor's, a panel for each workload; bars are intervals.

    Without `jax-scan` among the systems, the first of them is the denominator.
    """
    from matplotlib.figure import Figure

    names, systems = list(results["ratios"]), list(reversed(results["config"]["systems"]))
    times = {(row["workload"], row["system"]): row["us_per_step"]["rounds"] for row in results["rows"]}
    floor = "jax-scan" if "jax-scan" in systems else systems[-1]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.2 + 2.6 * columns, (0.6 + 0.24 * len(systems)) * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, {system: _divided(times[name, system], times[name, floor]) for system in systems})
        axes.set_title(name, fontsize=10)
    figure.supxlabel(f"time per step over {SYSTEMS[floor].title} (logarithmic; further left is faster)", fontsize=9)
    return figure


def _panel(axes: "Axes", ratios: dict[str, list[float]]) -> None:
    """Draws one workload: a point and an interval for each system, from bottom to top."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    for y, (system, values) in enumerate(ratios.items()):
        color = "#cc3311" if system.startswith("research") else "#333333" if system.startswith("jax") else "#4477aa"
        low, middle, high = interval(values)
        axes.plot([low, high], [y, y], color=color, linewidth=3, alpha=0.4, solid_capstyle="round")
        axes.plot(middle, y, "o", color=color, markersize=4)
        axes.annotate(f"{middle:.2f}", (middle, y), (0, 4), textcoords="offset points", ha="center", fontsize=6, color=color)
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(ratios)), [SYSTEMS[system].title for system in ratios], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eeeeee")

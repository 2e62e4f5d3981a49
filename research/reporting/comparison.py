"""A page about several runs side by side; runs of one config with other seeds are a group, with a mean and an interval."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.reporting import page, picture, record
from research.reporting.groups import Difference, Group, difference, group_runs, interval, merge_entries, names_of
from research.reporting.report import BAND, best_names, metric_direction, split_prefixes

FACTS = ("status", "steps", "epochs", "parameters", "steps_per_second", "seconds_to_first_step")
NOTE = "Training: dashed; validation: solid; test: dotted, or a single point."
INTERVAL = "Mean over the seeds, with half of its 95% interval by Student's t."


def write_comparison(runs: Sequence[record.Run], path: Path) -> Path:
    """Writes a page that compares runs: their results, their curves in common panels, and the options that differ.

    Runs that differ in their seed only are shown as one, by their mean with a 95% interval; of two such groups the page says by
    how much they differ, with the p-value of Welch's t-test.

    >>> import tempfile
    >>> runs = [record.Run(Path(tempfile.mkdtemp()), "digits", {"epochs": epochs}) for epochs in (1, 2)]
    >>> for run in runs:
    ...     record.start(run, {})
    >>> write_comparison(runs, runs[0].directory / "comparison.html").name
    'comparison.html'
    """
    by_label = dict(zip(_labels([run.directory for run in runs]), runs, strict=True))
    summaries = {label: record.read_run(run.directory)[1] for label, run in by_label.items()}
    entries = {label: record.read_entries(run) for label, run in by_label.items()}
    by_split = split_prefixes(each for of_run in entries.values() for each in of_run)
    groups = group_runs(by_label, summaries)
    grouped = any(len(group.metrics) > 1 for group in groups)
    colours = dict(zip(by_label, picture.COLOURS * len(by_label), strict=False))
    parts, curves, note = [], entries, NOTE
    if grouped:
        colours = {
            label: colour for group, colour in zip(groups, picture.COLOURS * len(groups), strict=False) for label in group.runs
        }
        curves = {
            name: merge_entries([entries[label] for label in group.runs])
            for name, group in zip(names_of(groups), groups, strict=True)
        }
        parts, note = _group_sections(groups, colours, by_split), f"{NOTE} {BAND}"
    swatches = {
        label: f'<i style="background:{colours[label]}"></i>{page.link(run.directory / "report.html", path.parent, label)}'
        for label, run in by_label.items()
    }
    metrics = {label: summary.get("metrics", {}) for label, summary in summaries.items()}
    results = page.section("Results of each run" if grouped else "Results", _comparison_table(swatches, metrics, by_split))
    figure = page.image(record.png_bytes(picture.plot_comparison(curves)), "curves")
    parts = [*parts, *([] if grouped else [results]), page.section("Curves", figure, f"<p>{note}</p>")]
    parts += [results] if grouped else []
    parts += _facts_sections(by_label, summaries, swatches)
    experiments = " and ".join(dict.fromkeys(run.experiment for run in runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(path, page.render(f"{len(runs)} runs of {experiments}", parts))
    return path


def _facts_sections(
    runs: Mapping[str, record.Run], summaries: Mapping[str, Mapping[str, Any]], swatches: Mapping[str, str]
) -> list[str]:
    """Returns the sections on the options that differ between runs, and on how they went."""
    options = {label: {"experiment": run.experiment, **run.config} for label, run in runs.items()}
    names = dict.fromkeys(name for values in options.values() for name in values)
    differing = [name for name in names if len({json.dumps(values.get(name)) for values in options.values()}) > 1]
    tables = []
    for columns, values in ((differing, options), (FACTS, summaries)):
        rows = [[page.text(each.get(name, "")) for name in columns] for each in values.values()]
        tables.append(page.rows(swatches, columns, rows) if columns else "<p>None.</p>")
    return [page.section("Options that differ", tables[0]), page.section("Runs", tables[1])]


def _group_sections(groups: Sequence[Group], colours: Mapping[str, str], by_split: Mapping[str, str]) -> list[str]:
    """Returns the sections on the means of groups, and on the difference of two."""
    names = _sorted_names([each for group in groups for each in group.metrics], by_split)
    swatches, rows = {}, []
    values = {name: [group.values(name) for group in groups] for name in names}
    for i, (title, group) in enumerate(zip(names_of(groups), groups, strict=True)):
        seeds = f"{len(group.metrics)} seed{'s' * (len(group.metrics) > 1)}"
        swatches[str(i)] = f'<i style="background:{colours[next(iter(group.runs))]}"></i>{html.escape(title)}, {seeds}'
        rows.append([_mean(values[name][i]) for name in names])
    for column, name in enumerate(names):
        means = {str(i): interval(each)[0] for i, each in enumerate(values[name]) if each}
        for best in best_names(means, metric_direction(name)):
            rows[int(best)][column] = f"<b>{rows[int(best)][column]}</b>"
    table = page.rows(swatches, [_titled(name) for name in names], rows)
    sections = [page.section("Means", f'<div class="numbers">{table}</div>', f"<p>{INTERVAL}</p>")]
    if len(groups) != 2:
        return sections
    found = {name: difference(*values[name]) for name in names}
    rows = [_difference(each) for each in found.values() if each is not None]
    titles = {name: html.escape(_titled(name)) for name, each in found.items() if each is not None}
    first, second = (html.escape(name) for name in names_of(groups))
    text = f"<p>{second} minus {first}; p by Welch's t-test, of each metric by itself.</p>"
    table = page.rows(titles, ["difference", "95% interval", "p"], rows) if rows else ""
    return [*sections, page.section("Difference", table, text) if rows else ""]


def _mean(values: Sequence[float]) -> str:
    """Returns the mean of values with half of its interval, as HTML."""
    if not values:
        return ""
    mean, half_width = interval(values)
    return page.text(mean) if math.isnan(half_width) else f"{page.text(mean)} ± {half_width:.2g}"


def _difference(found: Difference) -> list[str]:
    low, high = found.mean - found.half_width, found.mean + found.half_width
    p = "&lt; 0.0001" if found.p < 1e-4 else f"{found.p:.2g}"
    return [f"{found.mean:+.3g}", f"[{low:+.3g}, {high:+.3g}]", f"<b>{p}</b>" if found.p < 0.05 else p]


def _titled(name: str) -> str:
    return name + {1: " ↑", -1: " ↓", 0: ""}[metric_direction(name)]


def _sorted_names(metrics: Sequence[Mapping[str, Any]], by_split: Mapping[str, str]) -> list[str]:
    """Returns the names of metrics in the order of the splits' prefixes, the loss of each first, without those of layers."""
    order = list(by_split.values())
    longest_first = sorted(order, key=len, reverse=True)  # the last is "", which every name begins with
    names = dict.fromkeys(name for values in metrics for name in values if "/" not in name)
    prefixes = {name: next(prefix for prefix in longest_first if name.startswith(prefix)) for name in names}
    return sorted(prefixes, key=lambda name: (order.index(prefixes[name]), name != f"{prefixes[name]}loss", name))


def _comparison_table(swatches: Mapping[str, str], metrics: Mapping[str, Mapping[str, Any]], by_split: Mapping[str, str]) -> str:
    """Returns a table of runs by metrics, with the best values in bold."""
    names = _sorted_names(list(metrics.values()), by_split)
    best_labels = {}
    for name in names:
        numbers = {label: float(values[name]) for label, values in metrics.items() if isinstance(values.get(name), int | float)}
        best_labels[name] = best_names(numbers, metric_direction(name))
    rows = []
    for label, values in metrics.items():
        cells = {name: page.text(values.get(name, "")) for name in names}
        rows.append([f"<b>{cell}</b>" if label in best_labels[name] else cell for name, cell in cells.items()])
    return page.rows(swatches, [_titled(name) for name in names], rows)


def _labels(directories: Sequence[Path]) -> list[str]:
    """Returns the shortest trailing parts of the paths that are distinct."""
    paths = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels

"""HTML reports: of a run, and of anything else in tables and pictures. They open offline, without other files."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from research.reporting import page, performance, picture, record, run_files
from research.reporting.checkpoint_table import checkpoint_table
from research.reporting.run_files import Report, ignore
from research.training.logs import LogEntry

SPLITS = {"train": "", "val": "val_", "test": "test_"}
MAX_EPOCH_FIGURES = 8
MAX_NUMBER = 2**1023  # an integer that a float can hold
BAND = (
    "Lines: the mean of the members, or seeds. Bands: 1.96 standard errors of it to each side. Thin lines: each of them. Those "
    "whose value is not finite are left out."
)
# Patterns in the names of metrics to maximise, and to minimise.
MAXIMISE = r"acc|auc|precision|recall|f1|fbeta|iou|dice|r2|bleu|reward|return|score|similarity|sensitivity|specificity|correct"
MINIMISE = r"loss|error|mae|mse|mape|msle|rmse|perplexity|entropy|divergence|nll|fid|kid|bits|wrong|distance"


def write_report(run: record.Run, report: Report = ignore) -> Path:
    """Writes `report.html` from the files in a run's directory; returns its path.

    `report` is called with a line about each picture, and about the versions, that can't be read and are left out.

    >>> import tempfile
    >>> run = record.Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> record.start(run, {})
    >>> write_report(run).name
    'report.html'
    """
    _, summary = record.read_run(run.directory)
    versions = run_files.read_versions(run.directory, report)
    plots = _pictures(run.directory / "plots", report)
    models = [name for name in plots if (run.directory / f"{name}.keras").exists()]
    figures = [name for name in plots if name not in ("curves", *models)]
    facts = {name: value for name, value in summary.items() if name not in ("metrics", "experiment", "status", "members")}
    members = _members_section(summary)
    band = f"<p>{BAND}</p>" if members else ""
    directory, speed = run.directory.as_posix(), performance.curves(run.directory)
    commands = [] if summary.get("status") == "finished" else [("resume", f"just resume {directory}")]
    commands += [
        ("open in TensorBoard", f"tensorboard --logdir {directory}/tensorboard"),
        ("compare with another run", f"just report {directory} ANOTHER-RUN"),
    ]
    parts = [
        page.section("Results", _metrics_table(run, summary.get("metrics", {}))),
        members,
        page.section("Curves", *(page.image(plots[name], name) + band for name in plots if name == "curves")),
        page.section("Speed", page.image(record.png_bytes(picture.plot_curves(speed)), "speed") if speed else ""),
        page.section("Figures", *(page.figure(plots[name], name) for name in figures)),
        page.section("Epochs", *_strips(_pictures(run.directory / "plots" / "epochs", report))),
        page.section("Models", page.columns(*(page.figure(plots[name], name, "tall") for name in models))),
        page.section("Checkpoints", _checkpoints_table(run)),
        page.section(
            "Commands", page.pairs([(purpose, f"<code>{html.escape(command)}</code>") for purpose, command in commands])
        ),
        page.columns(page.section("Run", page.facts(facts)), page.section("Config", page.facts(run.config))),
        page.section("Environment", page.facts(versions) if versions else ""),
    ]
    path = run.directory / "report.html"
    record.write_text(
        path, page.render(f"{run.experiment} · {run.directory.resolve().name}", [page.status(summary.get("status")), *parts])
    )
    return path


def _checkpoints_table(run: record.Run) -> str:
    columns, rows = checkpoint_table(run.checkpoints, record.read_entries(run))
    return (
        page.rows({step: step for step in rows}, columns, [[page.text(value) for value in row] for row in rows.values()])
        if rows
        else ""
    )


def _members_section(summary: Mapping[str, Any]) -> str:
    """Returns a table of a population's members, the best first, with the best values in bold; nothing for other runs."""
    members = summary.get("members")
    rows = [each for each in members if _is_member(each)] if isinstance(members, list) else []
    if not rows:
        return ""
    rows.sort(key=lambda each: each["rank"])
    fields = list(dict.fromkeys(name for each in rows for name in each["values"]))
    known = dict.fromkeys(name for each in rows for name in each["metrics"] if "/" not in name)
    ranked_by = str(summary.get("ranked_by")).partition(":")
    names = [name for name in known if metric_direction(name) or name == ranked_by[0]] or list(known)  # without norms
    names.sort(key=lambda name: (name != ranked_by[0], not name.startswith("val_")))
    best = {}
    for name in names:
        numbers = {i: float(each["metrics"][name]) for i, each in enumerate(rows) if _is_number(each["metrics"].get(name))}
        best[name] = best_names({str(i): value for i, value in numbers.items()}, metric_direction(name))
    cells = [
        [page.text(each["values"].get(name)) for name in fields]
        + [
            f"<b>{text}</b>" if str(i) in best[name] else text
            for name in names
            for text in [page.text(each["metrics"].get(name))]
        ]
        for i, each in enumerate(rows)
    ]
    titles = {str(i): f"{each['rank']}. member {each['member']}" for i, each in enumerate(rows)}
    text = (
        f"<p>Ranked by {html.escape(ranked_by[0])}{' ↑' if ranked_by[2] == 'max' else ' ↓'}. The results above are means of the "
        "members; figures and models below are the best member's.</p>"
    )
    return page.section("Members", text, f'<div class="numbers">{page.rows(titles, [*fields, *names], cells)}</div>')


def _is_member(value: Any) -> bool:
    """Returns whether a value is a member as summary.json holds it: the file may be a stranger's."""
    parts = {"member": int, "rank": int, "values": dict, "metrics": dict}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in parts.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER


class Table(NamedTuple):
    """A table of a page: the titles of its columns, and the values of each row by its title.

    >>> Table(["mean"], {"dense": [0.5]}).columns
    ['mean']
    """

    columns: Sequence[str]
    rows: Mapping[str, Sequence[Any]]


def write_page(path: Path, title: str, sections: Mapping[str, Table | Mapping[str, Any]]) -> None:
    """Writes a page of sections by their titles: each is a table, or figures (PNG images) and other values by their names.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "page.html"
    >>> write_page(path, "step 3", {"State": {"digest": "3f2a"}, "Layers": Table(["mean"], {"dense": [0.5]})})
    >>> "<td>3f2a</td>" in path.read_text(), "<td>0.5</td>" in path.read_text()
    (True, True)
    """
    parts = []
    for name, section in sections.items():
        if isinstance(section, Table):
            titles = {row: html.escape(row) for row in section.rows}
            rows = [[page.text(value) for value in values] for values in section.rows.values()]
            parts.append(page.section(html.escape(name), page.rows(titles, section.columns, rows) if rows else ""))
            continue
        facts = {key: value for key, value in section.items() if not isinstance(value, bytes)}
        figures = [page.figure(value, key) for key, value in section.items() if isinstance(value, bytes)]
        parts.append(page.section(html.escape(name), page.facts(facts) if facts else "", *figures))
    record.write_text(path, page.render(title, parts))


def metric_direction(name: str) -> int:
    """Returns 1 for a metric to maximise, -1 for one to minimise, 0 if its name does not show which.

    >>> metric_direction("val_accuracy"), metric_direction("loss"), metric_direction("learning_rate")
    (1, -1, 0)
    """
    if re.search(MINIMISE, name, re.IGNORECASE):
        return -1
    return 1 if re.search(MAXIMISE, name, re.IGNORECASE) else 0


def best_names(values: Mapping[str, float], direction: int) -> set[str]:
    """Returns the names of the best finite value; an empty set if `direction` is 0 or fewer than two values are finite.

    >>> best_names({"a": 0.5, "b": 0.25, "c": math.nan, "d": 0.25}, -1) == {"b", "d"}
    True
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not direction or len(finite) < 2:
        return set()
    best = max(direction * value for value in finite.values())
    return {name for name, value in finite.items() if direction * value == best}


def _metrics_table(run: record.Run, metrics: Mapping[str, Any]) -> str:
    """Returns a table of metrics by split, and a second one of results measured once at the end."""
    entries = record.read_entries(run)
    splits = split_prefixes(entries)
    logged = {splits[entry.split] + name: name for entry in entries for name in entry.values}
    names = list(dict.fromkeys(logged[name] for name in metrics if name in logged and "/" not in name))  # not those of layers
    names.sort(key=lambda name: name != "loss")
    rows = [[page.text(metrics.get(prefix + name, "")) for prefix in splits.values()] for name in names]
    final = {name: value for name, value in metrics.items() if name not in logged}
    table = page.rows({name: html.escape(name) for name in names}, list(splits), rows) if names else ""
    return page.columns(table, page.facts(final) if final else "") or "<p>No metrics yet.</p>"


def split_prefixes(entries: Iterable[LogEntry]) -> dict[str, str]:
    """Returns what the names of metrics begin with, by split: the usual splits, and those that were logged."""
    return {**SPLITS, **{entry.split: f"{entry.split}_" for entry in entries if entry.split not in SPLITS}}


def _pictures(directory: Path, report: Report) -> dict[str, bytes]:
    """Returns the PNG files of a directory by name. Reports files that are none."""
    pictures = {path.stem: run_files.read_png(path, report) for path in sorted(directory.glob("*.png"))}
    return {name: png for name, png in pictures.items() if png is not None}


def _strips(pictures: Mapping[str, bytes]) -> list[str]:
    """Returns a row for each figure of epochs, with its last epochs. `pictures` are by name, such as `samples-0012`."""
    captions: dict[str, dict[str, str]] = {}
    for stem in pictures:
        name, _, epoch = stem.rpartition("-")
        numbered = bool(name) and epoch.isascii() and epoch.isdigit()
        captions.setdefault(name if numbered else stem, {})[stem] = f"{name}, epoch {epoch.lstrip('0')}" if numbered else stem
    strips = []
    for name in sorted(captions):
        figures = (page.figure(pictures[stem], caption) for stem, caption in list(captions[name].items())[-MAX_EPOCH_FIGURES:])
        strips.append(f'<div class="strip">{"".join(figures)}</div>')
    return strips

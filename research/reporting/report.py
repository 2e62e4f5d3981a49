"""Pages about runs: one about each, and one that shows several side by side. They need neither a network nor other files."""

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research import picture, record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPLITS = {"train": "", "val": "val_", "test": "test_"}
EPOCHS_SHOWN = 8
# What is better the larger it is, and what the smaller, by a part of the name.
LARGER = r"acc|auc|precision|recall|f1|fbeta|iou|dice|r2|bleu|reward|return|score|similarity|sensitivity|specificity|correct"
SMALLER = r"loss|error|mae|mse|mape|msle|rmse|perplexity|entropy|divergence|nll|fid|kid|bits|wrong|distance"


def page(run: record.Run) -> Path:
    """Writes `report.html` from what the run's directory holds."""
    _, summary = record.read(run.directory)
    versions = run.directory / "versions.json"
    plots = {path.stem: path for path in sorted((run.directory / "plots").glob("*.png"))}
    models = [name for name in plots if (run.directory / f"{name}.keras").exists()]
    others = [name for name in plots if name not in ("curves", *models)]
    strips: dict[str, list[Path]] = {}
    for path in sorted((run.directory / "plots" / "epochs").glob("*.png")):
        strips.setdefault(path.stem.rpartition("-")[0], []).append(path)
    facts = {name: value for name, value in summary.items() if name not in ("metrics", "experiment", "status")}
    where = run.directory.as_posix()
    commands = [] if summary.get("status") == "finished" else [("go on with it", f"just resume {where}")]
    commands += [
        ("look closer", f"tensorboard --logdir {where}/tensorboard"),
        ("compare it", f"just report {where} ANOTHER-RUN"),
    ]
    parts = [
        _section("Results", _results(run, summary.get("metrics", {}))),
        _section("Curves", *(_image(plots[name].read_bytes(), name) for name in plots if name == "curves")),
        _section("Pictures", *(_figure(plots[name].read_bytes(), name) for name in others)),
        _section("Epochs", *(_strip(name, strips[name][-EPOCHS_SHOWN:]) for name in sorted(strips))),
        _section("Networks", _columns(*(_figure(plots[name].read_bytes(), name, "tall") for name in models))),
        _section("Commands", _table([(told, f"<code>{html.escape(command)}</code>") for told, command in commands])),
        _columns(_section("Run", _facts(facts)), _section("Config", _facts(run.config))),
        _section("Made with", _facts(json.loads(versions.read_text())) if versions.exists() else ""),
    ]
    path = run.directory / "report.html"
    record.write(path, _page(f"{run.experiment} · {run.directory.resolve().name}", [_chip(summary.get("status")), *parts]))
    return path


def comparison(runs: Sequence[record.Run], path: Path) -> Path:
    """Writes a page with the curves of several runs in common panels, the options that differ, and what came of each."""
    read = dict(zip(_labels([run.directory for run in runs]), runs, strict=True))
    summaries = {label: record.read(run.directory)[1] for label, run in read.items()}
    figure = picture.compared({label: record.entries(run) for label, run in read.items()})
    swatches = {
        label: f'<i style="background:{colour}"></i>{_link(run.directory / "report.html", path.parent, label)}'
        for (label, run), colour in zip(read.items(), picture.COLOURS * len(read), strict=False)
    }
    options = {label: {"experiment": run.experiment, **run.config} for label, run in read.items()}
    columns = dict.fromkeys(name for each in options.values() for name in each)
    differing = [name for name in columns if len({json.dumps(each.get(name)) for each in options.values()}) > 1]
    facts = ("status", "steps", "epochs", "parameters", "steps_per_second", "seconds_to_first_step")
    metrics = {label: summary.get("metrics", {}) for label, summary in summaries.items()}
    parts = [
        _section("Results", _marked(swatches, metrics)),
        _section(
            "Curves", _image(_png(figure), "curves"), "<p>Training is dashed, validation solid, test a point or dotted.</p>"
        ),
        _section(
            "Options that differ",
            _rows(swatches, differing, [[_shown(each.get(name, "")) for name in differing] for each in options.values()])
            if differing
            else "<p>None: all have the same options.</p>",
        ),
        _section("Runs", _rows(swatches, facts, [[_shown(each.get(name, "")) for name in facts] for each in summaries.values()])),
    ]
    experiments = " and ".join(dict.fromkeys(run.experiment for run in runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    record.write(path, _page(f"{len(runs)} runs of {experiments}", parts))
    return path


def better(name: str) -> int:
    """Whether a metric is better the larger it is (1), the smaller (-1), or can't be told by its name (0).

    >>> better("val_accuracy"), better("loss"), better("learning_rate")
    (1, -1, 0)
    """
    if re.search(SMALLER, name, re.IGNORECASE):
        return -1
    return 1 if re.search(LARGER, name, re.IGNORECASE) else 0


def best(values: Mapping[str, float], direction: int) -> set[str]:
    """The names whose value is the best of those that are finite; none where there is no direction or nothing to choose from.

    >>> best({"a": 0.5, "b": 0.25, "c": math.nan, "d": 0.25}, -1) == {"b", "d"}
    True
    """
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not direction or len(finite) < 2:
        return set()
    top = max(direction * value for value in finite.values())
    return {name for name, value in finite.items() if direction * value == top}


def _results(run: record.Run, metrics: Mapping[str, Any]) -> str:
    """A row for each metric with a column for each split; what was measured once at the end in a table of its own."""
    logged = {SPLITS.get(e.split, f"{e.split}_") + name for e in record.entries(run) for name in e.values}
    names = list(dict.fromkeys(re.sub("^(val|test)_", "", name) for name in metrics if name in logged))
    names.sort(key=lambda name: name != "loss")
    rows = [[_shown(metrics.get(prefix + name, "")) for prefix in SPLITS.values()] for name in names]
    once = {name: value for name, value in metrics.items() if name not in logged}
    table = _rows({name: html.escape(name) for name in names}, list(SPLITS), rows) if names else ""
    return _columns(table, _facts(once) if once else "") or "<p>Nothing yet.</p>"


def _marked(swatches: Mapping[str, str], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each run with a column for each metric, the best in bold."""
    splits = {name: next((p for p in ("val_", "test_") if name.startswith(p)), "") for each in metrics.values() for name in each}
    order = list(SPLITS.values())
    names = sorted(splits, key=lambda name: (order.index(splits[name]), name != f"{splits[name]}loss", name))
    winners = {}
    for name in names:
        values = {label: each[name] for label, each in metrics.items() if isinstance(each.get(name), int | float)}
        winners[name] = best(values, better(name))
    rows = []
    for label, each in metrics.items():
        shown = {name: _shown(each.get(name, "")) for name in names}
        rows.append([f"<b>{text}</b>" if label in winners[name] else text for name, text in shown.items()])
    arrows = [name + {1: " ↑", -1: " ↓", 0: ""}[better(name)] for name in names]
    return _rows(swatches, arrows, rows)


def _labels(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            break
    return labels


def _png(figure: "Figure") -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _image(png: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(png: bytes, name: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{_image(png, name)}<figcaption>{html.escape(name)}</figcaption></figure>'


def _strip(name: str, paths: Iterable[Path]) -> str:
    pictures = "".join(_figure(path.read_bytes(), f"{name}, epoch {int(path.stem.rpartition('-')[2])}") for path in paths)
    return f'<div class="strip">{pictures}</div>'


def _link(to: Path, start: Path, text: str) -> str:
    if not to.exists():
        return html.escape(text)
    return f'<a href="{html.escape(os.path.relpath(to, start))}">{html.escape(text)}</a>'


def _chip(status: Any) -> str:
    kind = "good" if status == "finished" else "bad" if status == "failed" else "open"
    return f'<span class="status {kind}">{html.escape(str(status))}</span>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _columns(*parts: str) -> str:
    return f'<div class="columns">{"".join(parts)}</div>' if any(parts) else ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "" if value is None else html.escape(value if isinstance(value, str) else json.dumps(value))


def _facts(values: Mapping[str, Any]) -> str:
    return _table([(name, _shown(value)) for name, value in values.items()])


def _table(pairs: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in pairs) + "</table>"


def _rows(heads: Mapping[str, str], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head for each row, which is HTML already, and one for each column."""
    top = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{head}</th>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for head, row in zip(heads.values(), rows, strict=True)
    )
    return f'<div class="wide"><table><tr><th></th>{top}</tr>{body}</table></div>'


def _page(title: str, parts: Iterable[str]) -> str:
    return _PAGE.format(title=html.escape(title), parts="".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2.5rem auto; max-width: 76rem; padding: 0 1.5rem; color: #1b1f24; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1rem; margin: 2.2rem 0 .6rem; color: #57606a; }}
.status {{ display: inline-block; padding: .05rem .6rem; border-radius: 1rem; }}
.good {{ background: #eaf3ea; color: #1a6b2d; }} .bad {{ background: #fbeaea; color: #a3221a; }}
.open {{ background: #fdf4dc; color: #7a5200; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: .2rem 1.4rem .2rem 0; vertical-align: top; }}
th {{ font-weight: 500; color: #57606a; white-space: nowrap; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 4rem; }}
tr + tr {{ border-top: 1px solid #eaeef2; }} b {{ font-weight: 700; }} code {{ font-size: .9em; }} a {{ color: inherit; }}
i {{ display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .5rem; vertical-align: -1px; }}
img {{ max-width: 100%; }} figure {{ margin: 1rem 0; }} figcaption, p {{ color: #57606a; font-size: .85rem; }}
.wide, .strip {{ overflow-x: auto; }} .strip {{ display: flex; gap: 1rem; }} .strip figure {{ flex: none; margin: 0 0 .5rem; }}
.strip img {{ max-width: none; height: 15rem; }} .tall img {{ max-height: 60rem; }}
.columns {{ display: flex; flex-wrap: wrap; gap: 0 5rem; }}
</style></head><body>
<h1>{title}</h1>
{parts}
</body></html>
"""

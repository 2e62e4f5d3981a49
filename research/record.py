"""The run directory: what was run, with what, what came of it, and pages and pictures to look at."""

import base64
import fcntl
import html
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from research.loop import Entry
from research.state import Refused

if TYPE_CHECKING:  # drawing is slow to import: only where something is drawn
    from matplotlib.figure import Figure

PACKAGES = ("jax", "jaxlib", "keras", "optax", "numpy", "orbax-checkpoint", "research")


class Run(NamedTuple):
    """A run's directory, and what identifies the run."""

    directory: Path
    experiment: str
    config: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.directory / "checkpoints"


def open_run(directory: Path, experiment: str, config: Mapping[str, Any]) -> tuple[Run, dict[str, Any] | None]:
    """Takes a directory for a run, new or begun before by the same experiment and config. Writes nothing.

    Returns the run and, where it had finished, its summary. Raises `Refused` for a directory of another experiment or config, for
    one that holds something else, and for one that can't be written.

    >>> import tempfile
    >>> run, summary = open_run(Path(tempfile.mkdtemp()) / "new", "digits", {"epochs": 3})
    >>> run.experiment, summary
    ('digits', None)
    """
    run = Run(directory, experiment, json.loads(_json(config)))
    writable = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    if not writable.is_dir() or not os.access(writable, os.W_OK | os.X_OK):
        raise Refused(f"--run-dir {directory}: {writable} can't be written to; choose a directory of yours.")
    if not directory.exists() or not any(directory.iterdir()):
        return run, None
    try:
        before = json.loads((directory / "config.json").read_text())
        owner, settings = before["experiment"], before["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"--run-dir {directory}: it is not empty and holds no run; choose a new directory.") from error
    if owner != experiment:
        raise Refused(f"--run-dir {directory}: it holds a run of {owner!r}, not of {experiment!r}; choose another directory.")
    differing = [k for k in {**settings, **run.config} if settings.get(k) != run.config.get(k)]
    if differing:
        told = ", ".join(f"{k} was {settings.get(k)!r}, now {run.config.get(k)!r}" for k in sorted(differing))
        raise Refused(f"--run-dir {directory}: its run had another config ({told}); give the same options or a new directory.")
    try:
        summary = json.loads((directory / "summary.json").read_text())
    except (OSError, ValueError):
        return run, None
    return run, summary if summary.get("status") == "finished" else None


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Holds a run's directory for one process; makes it where there is none.

    Raises `Refused` where it can't be written or another process is at it.
    """
    where = f"--run-dir {run.directory}"
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        lock = (run.directory / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
    except BlockingIOError as error:
        raise Refused(f"{where}: another process is running in it; wait for it, or choose another.") from error
    except OSError as error:
        raise Refused(f"{where}: it can't be written ({error.strerror}); choose a directory of yours.") from error
    with lock:
        yield


def begin(run: Run, options: Mapping[str, Any], step: int = 0) -> None:
    """Writes what is known before training goes on from `step`.

    That is `config.json` (with `options`, what does not change the numbers), `versions.json` and the source's own changes;
    `metrics.jsonl` is cut back to what was known before that step's logs.
    """
    _write(run.directory / "config.json", _json({"experiment": run.experiment, "config": run.config, "options": options}))
    _write(run.directory / "versions.json", _json(versions()))
    difference = _git("diff", "HEAD")
    if difference:
        _write(run.directory / "source.diff", difference)
    kept = [entry for entry in entries(run) if entry.step < step]
    _write(run.directory / "metrics.jsonl", "".join(_line(entry) for entry in kept))


def find(run: str, root: Path) -> Path:
    """The directory of a run: itself, or the latest of an experiment's name under `root`. Raises `Refused` where there is none.

    >>> find("nothing", Path("there/is/none"))
    Traceback (most recent call last):
    research.state.Refused: no run 'nothing': expected a run directory, or an experiment that has runs in there/is/none.
    """
    if (Path(run) / "config.json").is_file():
        return Path(run)
    found = sorted(path.parent for path in (root / run).glob("*/config.json"))
    if not found:
        raise Refused(f"no run {run!r}: expected a run directory, or an experiment that has runs in {root}.")
    return found[-1]


def append(run: Run, entry: Entry) -> None:
    """Adds a log to `metrics.jsonl`: one line of strict JSON, what is not finite as null."""
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write(_line(entry))


def entries(run: Run) -> list[Entry]:
    """What `metrics.jsonl` holds; null is read as NaN. A last line that was cut off in writing does not count."""
    path = run.directory / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [Entry(**json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [e._replace(values={k: math.nan if v is None else v for k, v in e.values.items()}) for e in found]


def summarise(run: Run, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json`, whole or not at all."""
    _write(run.directory / "summary.json", _json({"experiment": run.experiment, **summary}))


def versions() -> dict[str, Any]:
    """What a run was made with: packages, devices, flags, the source's revision.

    >>> versions()["keras"] == metadata.version("keras")
    True
    """
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found.update({name: _version(name) for name in PACKAGES})
    devices = jax.devices()
    found["devices"] = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
    found["cpus"] = os.cpu_count()
    found["flags"] = {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS") if name in os.environ}
    found["revision"] = _git("rev-parse", "HEAD").strip() or None
    found["command"] = sys.argv
    return found


def curves(logs: Sequence[Entry]) -> "Figure":
    """Every metric over the steps, a panel each, training and the other splits beside each other.

    >>> figure = curves([Entry(1, 0, "train", {"loss": 2.0}), Entry(2, 0, "val", {"loss": 1.0})])
    >>> [axes.get_title() for axes in figure.axes]
    ['loss']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for entry in logs for name in entry.values)) or ["loss"]
    names.sort(key=lambda name: name != "loss")
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    splits = list(dict.fromkeys(entry.split for entry in logs))
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        for split, colour in zip(splits, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377") * 9, strict=False):
            points = [(e.step, e.values[name]) for e in logs if e.split == split and name in e.values]
            if points:
                marker = ("D", 7) if len(points) == 1 else ("o", 3.5) if len(points) < 40 else ("", 0)
                style: dict[str, Any] = {"marker": marker[0], "markersize": marker[1], "linewidth": 1.6}
                axes.plot(*zip(*points, strict=True), color=colour, label=split, **style)
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def draw(run: Run, pictures: Mapping[str, "Figure"]) -> None:
    """Writes figures to `plots/NAME.png`."""
    (run.directory / "plots").mkdir(exist_ok=True)
    for name, figure in pictures.items():
        figure.savefig(run.directory / "plots" / f"{name}.png", dpi=110)


def report(run: Run) -> Path:
    """Writes `report.html` from what the directory holds: one file that needs neither a network nor its neighbours."""
    summary = json.loads((run.directory / "summary.json").read_text())
    made_with = json.loads((run.directory / "versions.json").read_text())
    metrics = summary.get("metrics", {})
    splits = {"train": "", "val": "val_", "test": "test_"}
    names = [n for n in metrics if not n.startswith(("val_", "test_"))]
    table = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{_shown(metrics.get(prefix + name, ''))}</td>" for prefix in splits.values())
        + "</tr>"
        for name in sorted(names, key=lambda n: n != "loss")
    )
    plots = sorted((run.directory / "plots").glob("*.png"), key=lambda p: p.stem != "curves")
    figures = "".join(
        f'<figure><img alt="{html.escape(p.stem)}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(p.stem)}</figcaption></figure>"
        for p in plots
    )
    facts = {k: v for k, v in summary.items() if k not in ("metrics", "experiment")}
    page = _PAGE.format(
        title=html.escape(f"{run.experiment} · {run.directory.name}"),
        status=html.escape(str(summary.get("status"))),
        splits="".join(f"<th>{split}</th>" for split in splits),
        metrics=table,
        figures=figures,
        facts=_table(facts),
        config=_table(run.config),
        versions=_table(made_with),
    )
    path = run.directory / "report.html"
    _write(path, page)
    return path


def new_directory(experiment: str, root: Path) -> Path:
    """A directory name for a new run: the time, and a number where that is taken.

    >>> new_directory("digits", Path("runs")).parent.as_posix()
    'runs/digits'
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = [root / experiment / (stamp if i == 0 else f"{stamp}-{i}") for i in range(100)]
    return next(path for path in candidates if not path.exists())


def _line(entry: Entry) -> str:
    return json.dumps(_strict(entry._asdict())) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return value


def _json(value: Any) -> str:
    return json.dumps(_strict(value), indent=2, allow_nan=False, default=str) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a reader, or a crash, never meets half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of the code's own repository; nothing where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{_shown(v)}</td></tr>" for k, v in values.items())
    return f"<table>{rows}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2.5rem auto; max-width: 72rem; padding: 0 1.5rem; color: #1b1f24; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; color: #57606a; }}
.status {{ display: inline-block; padding: .05rem .6rem; border-radius: 1rem; background: #eaf3ea; color: #1a6b2d; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }}
th {{ font-weight: 500; color: #57606a; }} td {{ font-variant-numeric: tabular-nums; word-break: break-word; }}
tr + tr {{ border-top: 1px solid #eaeef2; }} figure {{ margin: 1rem 0; }} img {{ max-width: 100%; }}
figcaption {{ color: #57606a; font-size: .85rem; }} .columns {{ display: flex; flex-wrap: wrap; gap: 0 4rem; }}
</style></head><body>
<h1>{title}</h1><span class="status">{status}</span>
<h2>Results</h2><table><tr><th></th>{splits}</tr>{metrics}</table>
{figures}
<div class="columns"><div><h2>Run</h2>{facts}</div><div><h2>Config</h2>{config}</div></div>
<h2>Made with</h2>{versions}
</body></html>
"""

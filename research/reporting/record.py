"""The run directory: the configuration of a run, the versions it used, its logs and its summary."""

import errno
import fcntl
import io
import itertools
import json
import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from research.core.state import InvalidArgument
from research.reporting import environment, run_files
from research.reporting.run_files import Report, ignore
from research.training.logs import LogEntry
from research.transforms.population import MEMBERS_SUFFIX

if TYPE_CHECKING:  # matplotlib is slow to import: only functions that draw do it
    from matplotlib.figure import Figure

# What a process leaves that ended before its run started: a new run may have the directory.
LEFTOVERS = re.compile(r"\.lock|error(-\d+)?\.txt|\..*\.partial")


class Run(NamedTuple):
    """A run directory, and what identifies the run.

    With several processes, only the first writes to the run directory. Another process gets a `directory` of its own, and the
    run directory as `shared_directory`. `id` tells the checkpoints of this run from those of others; a new run gets one.

    >>> Run(Path("runs/digits/1"), "digits", {}).checkpoints.as_posix()
    'runs/digits/1/checkpoints'
    """

    directory: Path
    experiment: str
    config: dict[str, Any]
    shared_directory: Path | None = None
    id: str | None = None

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints, to which each process writes its part."""
        return (self.shared_directory or self.directory) / "checkpoints"


def open_run(
    directory: Path, experiment: str, config: Mapping[str, Any], report: Report = ignore, allow_changed: bool = False
) -> tuple[Run, dict[str, Any] | None]:
    """Checks that a directory is free for a run, or holds one of the same experiment and config. Writes nothing.

    Returns the run, and its summary if it is finished. `report` is called with a line about a damaged summary. Raises
    `InvalidArgument` if the directory holds a run of another experiment or config, or other files, or links, or can't be written
    to. With `allow_changed`, a run of another config is one that is not finished, and `report` is called with what changed.

    >>> import tempfile
    >>> run, summary = open_run(Path(tempfile.mkdtemp()) / "new", "digits", {"epochs": 3})
    >>> run.experiment, summary
    ('digits', None)
    """
    run = Run(directory, experiment, json.loads(_json(config)), id=uuid.uuid4().hex)
    run_files.check_entries(directory)
    if all(LEFTOVERS.fullmatch(name) for name in _names_in(directory)):
        return run, None
    if not (directory / "config.json").exists():
        raise InvalidArgument(f"--run-dir {directory}: it is not empty and holds no run; choose a new directory.")
    recorded = run_files.read_config(directory)
    if recorded.experiment != experiment:
        raise InvalidArgument(
            f"--run-dir {directory}: it holds a run of {recorded.experiment!r}, not of {experiment!r}; choose another directory."
        )
    changes = [
        f"{name[:80]} was {run_files.shown(recorded.config.get(name))}, now {run_files.shown(run.config.get(name))}"
        for name in sorted({**recorded.config, **run.config})
        if recorded.config.get(name) != run.config.get(name)
    ]
    run = run._replace(id=recorded.id or run.id)
    if changes:
        difference = f"its run had another config ({', '.join(changes)})"
        if not allow_changed:
            raise InvalidArgument(
                f"--run-dir {directory}: {difference}; give the same options, a new directory, or --allow-changed to go on."
            )
        report(f"{directory}: {difference}; it goes on with the new one")
        return run, None
    summary = run_files.read_summary(directory, report)
    return run, summary if summary is not None and summary["status"] == "finished" else None


def _names_in(directory: Path) -> list[str]:
    """Returns the names in a directory that a run may have; none if it does not exist. Raises `InvalidArgument` if it can't."""
    try:
        nearest = _nearest(directory)
        if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
            return os.listdir(directory) if nearest == directory else []
        reason = f"{nearest} can't be written to"
    except OSError as error:
        reason = f"it can't be used ({error.strerror})"
    except ValueError:  # a character that no name may have
        reason = "it can't be used (invalid characters)"
    text = str(directory) if len(str(directory)) <= 200 else f"{str(directory)[:200]} ..."
    raise InvalidArgument(f"--run-dir {text}: {reason}; choose a directory of yours.")


def _nearest(path: Path) -> Path:
    """Returns the path, or the nearest of its parents that exists."""
    for candidate in (path, *path.absolute().parents):
        try:
            os.stat(candidate)
            return candidate
        except (FileNotFoundError, NotADirectoryError):
            if candidate.is_symlink():
                raise OSError(errno.ENOENT, "it is a link to nothing") from None
    return path


class Locked(InvalidArgument):
    """Another process has locked a run's directory."""


@contextmanager
def lock(run: Run, option: str = "--run-dir") -> Iterator[None]:
    """Locks a run's directory for this process; creates it if needed. Messages call it by the option that says where it is.

    Raises `InvalidArgument` if it can't be written to, and `Locked`, which is one, if another process has locked it.

    >>> import tempfile
    >>> with lock(Run(Path(tempfile.mkdtemp()) / "new", "digits", {})):
    ...     pass
    """
    prefix = f"{option} {run.directory}"
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        file = (run.directory / ".lock").open("w")
    except OSError as error:
        raise InvalidArgument(f"{prefix}: it can't be written to ({error.strerror}); choose a directory of yours.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however the process ends
        except BlockingIOError as error:
            raise Locked(f"{prefix}: another process is running in it; wait for it, or choose another.") from error
        except OSError as error:
            raise InvalidArgument(
                f"{prefix}: it can't be locked ({error.strerror}); choose a directory on another disk."
            ) from error
        yield


def start(run: Run, options: Mapping[str, Any], step: int = 0, file: str | None = None, report: Report = ignore) -> None:
    """Writes `config.json`, `versions.json` and `source.diff` before training starts, or resumes at `step`.

    `options` are those that do not change the numbers, `file` is the experiment's; `config.json` holds both. `source.diff` holds
    uncommitted changes. Logs of `step` and later are removed from `metrics.jsonl`: training writes them again. Also removes what
    a killed process left half written. If there is something damaged, it is kept under another name, and `report` is called.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()), "digits", {"epochs": 3})
    >>> start(run, {"log_every": 50})
    >>> json.loads((run.directory / "config.json").read_text())["config"]
    {'epochs': 3}
    """
    run_files.tidy(run.directory, report)
    contents = {"experiment": run.experiment, "id": run.id, "file": file, "config": run.config, "options": options}
    write_json(run.directory / "config.json", contents, sync=True)
    write_json(run.directory / "versions.json", environment.versions())
    diff = environment.git("diff", "HEAD")
    if diff:
        write_text(run.directory / "source.diff", diff)
    damage: list[str] = []
    path = run.directory / "metrics.jsonl"
    earlier = [entry for entry in run_files.read_metrics(run.directory, damage.append) if entry.step < step]
    if damage:
        report(f"{damage[0]}; the file is kept as {run_files.set_aside(path, copy=path.is_file()).name}")
    write_text(path, "".join(_line(entry) for entry in earlier), sync=bool(earlier))


def find_run(run: str, root: Path) -> Path:
    """Returns the directory of a run: `run` is a directory, or an experiment's name, for its latest run under `root`.

    Raises `InvalidArgument` if there is none, or if it holds links, pipes or devices.

    >>> find_run("nothing", Path("no/runs"))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: no run 'nothing': expected a run directory, or an experiment that has runs in no/runs.
    """
    directory = None
    try:
        latest = max(
            (path.parent for path in (root / run).glob("*/config.json")),
            key=lambda path: [
                (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split("([0-9]+)", path.name)
            ],
            default=None,
        )
        directory = Path(run) if os.path.lexists(Path(run) / "config.json") else latest
    except (OSError, ValueError):  # a name that no file can have
        pass
    if directory is None:
        shown = repr(run if len(run) <= 200 else f"{run[:200]} ...")
        raise InvalidArgument(f"no run {shown}: expected a run directory, or an experiment that has runs in {root}.")
    run_files.check_entries(directory)
    return directory


def read_run(directory: Path, report: Report = ignore) -> tuple[Run, dict[str, Any]]:
    """Returns the run in a directory and its summary, or one made from its logs if it has no summary that can be read.

    Raises `InvalidArgument` if its config can't be read. `report` is called with a line about other damage.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> start(run, {})
    >>> append_entry(run, LogEntry(10, 0, "val", {"loss": 0.5}))
    >>> read_run(run.directory)[1]
    {'status': 'not finished', 'steps': 10, 'metrics': {'val_loss': 0.5}}
    """
    config = run_files.read_config(directory)
    run = Run(directory, config.experiment, config.config, id=config.id)
    entries, summary = run_files.read_metrics(directory, report), run_files.read_summary(directory, report)
    if summary is not None:
        return run, summary
    steps = max((entry.step for entry in entries), default=0)
    return run, {"status": "not finished", "steps": steps, "metrics": latest_metrics(entries)}


def latest_metrics(entries: Iterable[LogEntry]) -> dict[str, float]:
    """Returns the last value of each metric, by its name, which begins with that of its split: `val_loss`.

    >>> latest_metrics([LogEntry(1, 0, "train", {"loss": 0.5}), LogEntry(1, 0, "val", {"loss": 0.6})])
    {'loss': 0.5, 'val_loss': 0.6}
    """
    return {
        ("" if entry.split == "train" else f"{entry.split}_") + name: value
        for entry in entries
        for name, value in entry.values.items()
    }


def append_entry(run: Run, entry: LogEntry) -> None:
    """Appends an entry to `metrics.jsonl`: one line of strict JSON, with non-finite values as null.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> append_entry(run, LogEntry(1, 0, "train", {"loss": math.inf}))
    >>> print((run.directory / "metrics.jsonl").read_text())
    {"step": 1, "epoch": 0, "split": "train", "values": {"loss": null}}
    """
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write(_line(entry))


def read_entries(run: Run) -> list[LogEntry]:
    """Returns the entries of `metrics.jsonl`, null as NaN, without lines that can't be read. See `run_files.read_metrics`.

    >>> read_entries(Run(Path("no/runs"), "digits", {}))
    []
    """
    return run_files.read_metrics(run.directory, ignore)


def write_summary(run: Run, summary: Mapping[str, Any]) -> None:
    """Writes `summary.json` atomically.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> write_summary(run, {"status": "finished"})
    >>> json.loads((run.directory / "summary.json").read_text())
    {'experiment': 'digits', 'status': 'finished'}
    """
    write_json(run.directory / "summary.json", {"experiment": run.experiment, **summary}, sync=True)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Writes a file atomically: a reader never sees a part of it, nor does a crash leave one.

    With `sync` a crash of the machine does not either; it takes some milliseconds.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "file.txt"
    >>> write_text(path, "text")
    >>> path.read_text()
    'text'
    """
    write_bytes(path, text.encode("utf-8", "replace"), sync)


def write_bytes(path: Path, data: bytes, sync: bool = False) -> None:
    """Writes a file atomically, as `write_text` does.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "file.txt"
    >>> write_bytes(path, b"text")
    >>> [file.name for file in path.parent.iterdir()]
    ['file.txt']
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write a report at once
    try:
        with partial.open("wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, sync: bool = False) -> None:
    """Writes a value atomically as strict JSON, with non-finite numbers as null.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "file.json"
    >>> write_json(path, {"loss": math.nan})
    >>> json.loads(path.read_text())
    {'loss': None}
    """
    write_text(path, _json(value), sync)


def save_figures(run: Run, figures: Mapping[str, "Figure"], epoch: int | None = None) -> dict[str, Path]:
    """Writes figures to `plots/NAME.png`, or to `plots/epochs/NAME-0001.png` for an epoch, counted from 1. Returns the paths.

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> run = Run(Path(tempfile.mkdtemp()), "digits", {})
    >>> save_figures(run, {"samples": Figure((1, 1))}, epoch=3)["samples"].name
    'samples-0003.png'
    """
    directory = run.directory / "plots" if epoch is None else run.directory / "plots" / "epochs"
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / (f"{name}.png" if epoch is None else f"{name}-{epoch:04d}.png") for name in figures}
    for name, figure in figures.items():
        write_bytes(paths[name], png_bytes(figure))
    return paths


def png_bytes(figure: "Figure") -> bytes:
    """Returns a figure as a PNG image. A character that the font lacks is a box, without a warning.

    >>> from matplotlib.figure import Figure
    >>> png_bytes(Figure((1, 1))).startswith(run_files.PNG_SIGNATURE)
    True
    """
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def new_directory(experiment: str, root: Path) -> Path:
    """Creates the directory of a new run and returns its path: the time, with a number if another run has that already.

    Raises `InvalidArgument` if it can't be created.

    >>> import tempfile
    >>> first, second = (new_directory("digits", Path(tempfile.gettempdir()) / "runs") for _ in range(2))
    >>> first != second
    True
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for i in itertools.count():
        path = root / experiment / (f"{stamp}-{i}" if i else stamp)
        try:
            path.mkdir(parents=True)  # of two processes in the same second only one succeeds
            return path
        except FileExistsError:
            continue
        except OSError as error:
            reason = f"it can't be created ({error.strerror})"
            raise InvalidArgument(f"{path}: {reason}; choose another place: --run-dir DIRECTORY.") from error
    raise AssertionError


def _line(entry: LogEntry) -> str:
    """Returns an entry as a line of `metrics.jsonl`: the values of a population's members follow their means."""
    values = {**entry.values, **{f"{name}{MEMBERS_SUFFIX}": each for name, each in entry.members.items()}}
    return json.dumps(_strict({"step": entry.step, "epoch": entry.epoch, "split": entry.split, "values": values})) + "\n"


def _strict(value: Any) -> Any:
    """Replaces non-finite numbers, which JSON lacks, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, list | tuple) else value


def _json(value: Any) -> str:
    return json.dumps(_strict(value), indent=2, allow_nan=False, default=str) + "\n"

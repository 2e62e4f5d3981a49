"""The run directory: what was run, with what, and what came of it."""

import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
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
    """A run's directory, and what identifies the run.

    Of several processes only the first writes there; the `directory` of another is one of its own, `home` the run's.
    """

    directory: Path
    experiment: str
    config: dict[str, Any]
    home: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are, of which each process writes its part."""
        return (self.home or self.directory) / "checkpoints"


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
    write_json(run.directory / "config.json", {"experiment": run.experiment, "config": run.config, "options": options})
    write_json(run.directory / "versions.json", versions())
    difference = _git("diff", "HEAD")
    if difference:
        write(run.directory / "source.diff", difference)
    kept = [entry for entry in entries(run) if entry.step < step]
    write(run.directory / "metrics.jsonl", "".join(_line(entry) for entry in kept))


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


def read(directory: Path) -> tuple[Run, dict[str, Any]]:
    """The run that a directory holds, and its summary, or what its logs tell where it has none (yet).

    Raises `Refused` where its files can't be read.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
        run = Run(directory, config["experiment"], config["config"])
        logs, path = entries(run), directory / "summary.json"
        if path.exists():
            return run, json.loads(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{directory}: its files are damaged ({type(error).__name__}: {error}); choose another run.") from error
    last = {("" if e.split == "train" else f"{e.split}_") + name: value for e in logs for name, value in e.values.items()}
    return run, {"status": "not finished", "steps": max((e.step for e in logs), default=0), "metrics": last}


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
    write_json(run.directory / "summary.json", {"experiment": run.experiment, **summary})


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a reader, or a crash, never meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as strict JSON, what is not finite as null; whole or not at all."""
    write(path, _json(value))


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


def code() -> dict[str, Any]:
    """What tells whether two processes run the same code: versions, the source's revision, a sum over the sources themselves.

    >>> code() == code()
    True
    """
    root = Path(__file__).parent.parent
    files = [*sorted((root / "research").glob("*.py")), *sorted((root / "experiments").glob("*.py"))]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    packages = {name: _version(name) for name in PACKAGES}
    return {"revision": _git("rev-parse", "HEAD").strip() or None, "source": content, **packages}


def draw(run: Run, pictures: Mapping[str, "Figure"], epoch: int | None = None) -> dict[str, Path]:
    """Writes figures to `plots/NAME.png`, those of an epoch, counted from 1, to `plots/epochs/NAME-0001.png`. Returns where."""
    directory = run.directory / "plots" if epoch is None else run.directory / "plots" / "epochs"
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / (f"{name}.png" if epoch is None else f"{name}-{epoch:04d}.png") for name in pictures}
    for name, figure in pictures.items():
        figure.savefig(paths[name], dpi=110)
    return paths


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

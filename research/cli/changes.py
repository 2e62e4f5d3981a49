"""What must not change between a run's stop and its next start: its code, the versions of packages, its config.

code.json in the run directory records the first two. Where something differs, the run does not go on without `--allow-changed`.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from research.cli import lazy_keras
from research.cli.arguments import print_error
from research.cli.experiment import Experiment
from research.cli.runs import checkpoint_origin
from research.core.state import InvalidArgument
from research.reporting import environment, record, run_files
from research.training import checkpoint, manifest
from research.training.manifest import Origin

PACKAGE = Path(__file__).resolve().parents[1]
COMPUTING = ("core", "transforms", "data", "cpu", "distributed", "training")  # the folders whose code computes the numbers
OTHERS_CODE = ("site-packages", "dist-packages")
MOST_NAMED = 5


def record_code(run: record.Run, experiment: Experiment) -> None:
    """Writes code.json: the versions of packages, and a digest of each file of this package and of the experiment's folder.

    Of the package these are the files that compute numbers; of the experiment's folder those that were imported.
    """
    contents = {
        "packages": environment.package_versions(),
        "research": _digests(PACKAGE, (path for folder in COMPUTING for path in (PACKAGE / folder).rglob("*.py"))),
        "experiment": _digests(experiment.file.parent, _imported(experiment.file)),
    }
    record.write_json(run.directory / "code.json", contents, sync=True)


def changed_code(directory: Path, experiment: Experiment) -> list[str]:
    """Returns what differs from the code that a run had at its last start, one line each; nothing if that is not recorded.

    >>> changed_code(Path("no/run"), Experiment("mine", None, Path("mine.py")))
    []
    """
    recorded = run_files.read_code(directory, print_error)
    now = environment.package_versions()
    versions = {name: version for name, version in _texts(recorded.get("packages")).items() if name in now}
    changes = [f"{name} was {was}, now {now[name]}" for name, was in versions.items() if now[name] != was]
    for key, folder in (("research", PACKAGE), ("experiment", experiment.file.parent)):
        digests = _texts(recorded.get(key))
        paths = [folder / name for name in digests if _is_inside(name)]
        current = _digests(folder, (path for path in paths if path.is_file()))
        names = [path.relative_to(folder).as_posix() for path in paths]
        changes += [f"{folder.name}/{name}" for name in names if current.get(name) != digests[name]]
    return changes


def changed_config(run: record.Run) -> int | None:
    """Returns the step of the newest checkpoint of a run, if all are of another config than its own. Otherwise None.

    >>> changed_config(record.Run(Path("no/run"), "digits", {"epochs": 3}))
    """
    checkpoints, origin = run.checkpoints, checkpoint_origin(run)
    saved = [checkpoints / f"{step:09d}" for step in reversed(checkpoint.steps(checkpoints))]
    own = [path for path in saved if _is_of(path, Origin(origin.run))]
    return int(own[0].name) if own and not any(_is_of(path, origin) for path in own) else None


def check_unchanged(run: record.Run, experiment: Experiment, allow: bool) -> list[str]:
    """Returns a line for each thing that changed since the checkpoints of a run were written, if that is allowed.

    Raises `InvalidArgument` otherwise. Where the config is another than that of config.json, `record.open_run` has said so.
    """
    directory = run.directory
    if not checkpoint.steps(run.checkpoints):
        return []
    changes = changed_code(directory, experiment)
    shown = "; ".join(changes[:MOST_NAMED]) + (f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else "")
    lines = [f"{directory}: the code changed since the run stopped ({shown})"] if changes else []
    step = changed_config(run)
    if step is not None and run_files.read_config(directory).config == run.config:
        lines.append(f"{directory}: its config is not the one of its checkpoint of step {step}")
    if lines and not allow:
        raise InvalidArgument(f"{'; '.join(lines)}; put back what it was, or go on with it as it is: --allow-changed.")
    return [f"{line}; it goes on with what there is now" for line in lines]


def _is_of(path: Path, origin: Origin) -> bool:
    try:
        manifest.read(path, origin)
    except manifest.InvalidCheckpoint:
        return False
    return True


def _imported(file: Path) -> Iterable[Path]:
    """Returns an experiment's file, and the files of its folder that were imported."""
    files = {file}
    for name, module in list(sys.modules.items()):
        if name in lazy_keras.MODULES:  # to look at one is to load it
            continue
        path = Path(getattr(module, "__file__", None) or "")
        if path.suffix == ".py" and path.is_relative_to(file.parent) and not path.is_relative_to(PACKAGE):
            parts = path.relative_to(file.parent).parts
            if not any(part.startswith(".") or part in OTHERS_CODE for part in parts):
                files.add(path)
    return files


def _digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(paths)}


def _texts(value: Any) -> dict[str, str]:
    """Returns the texts in an object of a file that may be damaged, by name."""
    return {name: text for name, text in value.items() if isinstance(text, str)} if isinstance(value, Mapping) else {}


def _is_inside(name: str) -> bool:
    """Returns whether a recorded path is one below its folder: the file may be a stranger's.

    >>> _is_inside("core/step.py"), _is_inside("../step.py"), _is_inside("/dev/zero")
    (True, False, False)
    """
    path = Path(name)
    return path.suffix == ".py" and not path.is_absolute() and ".." not in path.parts and "\0" not in name

"""Which experiments' files are the user's own: those that they have named on a command line, on this machine.

config.json names the file of a run's experiment, and loading it runs its code. The run may be a stranger's.
"""

import contextlib
import json
import os
from pathlib import Path

from research.cli.experiment import CHECKOUT, Experiment


def is_own(file: Path) -> bool:
    """Returns whether a file was named on a command line before.

    >>> is_own(Path("/tmp/mine.py"))
    False
    """
    return json.dumps(str(file)) in _lines()


def remember(experiment: Experiment) -> None:
    """Records that an experiment's file was named on a command line. One that can't be recorded has to be named each time.

    >>> remember(Experiment("digits", None, CHECKOUT / "experiments" / "digits.py"))  # it is known anyway
    """
    line = json.dumps(str(experiment.file))
    if experiment.file.parent != CHECKOUT / "experiments" and line not in _lines():
        path = _path()
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{line}\n")


def _path() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "research" / "experiments"


def _lines() -> list[str]:
    try:
        return _path().read_text().splitlines()
    except (OSError, ValueError):
        return []

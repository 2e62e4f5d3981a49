"""The `research` command as a user calls it, and readers of what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `research run` in a directory, on one device."""
    return research("run", *arguments, cwd=cwd, **environment)


def research(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the `research` command in a directory, on one device."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_HOME")}
    line = [sys.executable, "-m", "research", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env={**inherited, **environment}, check=False)


def strict(text: str) -> Any:
    """Parses strict JSON: NaN and infinities are errors."""

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=reject)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Returns the time of change and the content of every file."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}

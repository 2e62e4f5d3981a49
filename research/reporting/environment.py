"""What a run depends on besides its config: versions of packages, devices, flags, the revision of the source."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "keras", "optax", "numpy", "orbax-checkpoint", "research")


def versions() -> dict[str, Any]:
    """Returns what a run depends on: versions of packages, devices, flags, the revision of the source.

    >>> versions()["keras"] == metadata.version("keras")
    True
    """
    devices = jax.devices()
    flags = ("XLA_FLAGS", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **package_versions(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "cpus": os.cpu_count(),
        "flags": {name: os.environ[name] for name in flags if name in os.environ},
        "revision": git("rev-parse", "HEAD").strip() or None,
        "command": sys.argv,
    }


def code_identity(paths: Iterable[Path] = ()) -> dict[str, Any]:
    """Returns what is equal in two processes only if they run the same code: versions, revision, a hash of the sources.

    The sources are those of `research` and of the `experiments` beside it, and `paths`: files of an experiment elsewhere.

    >>> code_identity() == code_identity()
    True
    >>> code_identity([Path(__file__)])["source"] == code_identity()["source"]
    False
    """
    root = Path(__file__).parents[2]
    files = [*sorted((root / "research").rglob("*.py")), *sorted((root / "experiments").rglob("*.py")), *paths]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return {"revision": git("rev-parse", "HEAD").strip() or None, "source": source, **package_versions()}


def package_versions() -> dict[str, str | None]:
    """Returns the versions of the packages that compute numbers, by name; None for one that is not installed.

    >>> package_versions()["keras"] == metadata.version("keras")
    True
    """
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str:
    """Returns git's output for the repository of this code; an empty string if there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""

"""Fixtures: a simulated cluster."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import GCLOUD, PODS, PYTHON, RECORDED, SCONTROL, SCRIPTS, SRUN, UV, World, executable, git


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    fake, checkout = tmp_path / "fake", tmp_path / "a checkout"
    for name, text in {"gcloud": GCLOUD, "uv": UV, "srun": SRUN, "scontrol": SCONTROL}.items():
        executable(fake / "bin" / name, text)
    for name in ("sudo", "mount.nfs", "gcsfuse"):
        executable(fake / "bin" / name, RECORDED)
    executable(fake / "bin" / "mountpoint", "#!/bin/sh\nexit 1\n")
    executable(fake / "python", PYTHON)
    executable(checkout / ".venv" / "bin" / "python", PYTHON)
    for name in SCRIPTS:
        executable(checkout / "scripts" / "pods" / name, (PODS / name).read_text())
    (checkout / "research").mkdir()
    (checkout / "research" / "__main__.py").write_text("print('first')\n")
    (checkout / ".gitignore").write_text(".venv/\nruns/\n")
    git(checkout, "init", "--quiet")
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "first")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_", "GIT_"))}
    made = World(fake, checkout, {**kept, "PATH": f"{fake / 'bin'}:{os.environ['PATH']}", "FAKE": str(fake), "HOME": str(fake)})
    for worker in made.workers:
        worker.mkdir()
    made.states("READY")
    made.codes((0, 0))
    yield made
    for pid in fake.glob("worker-*/run/pid"):
        subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], check=False, capture_output=True)


@pytest.fixture
def ready(world: World) -> World:
    """A cluster whose workers were set up."""
    done = world.tpu("setup")
    assert done.returncode == 0, done.stderr
    return world

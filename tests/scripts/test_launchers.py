"""The launchers of scripts/pods/ as scripts, and the page about them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import PODS, ROOT, SCRIPTS, World, run_line


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_parses_each_script(name: str) -> None:
    subprocess.run(["bash", "-n", PODS / name], check=True)
    assert os.access(PODS / name, os.X_OK)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, PODS / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_page_names_existing_files_and_recipes() -> None:
    page = (ROOT / "PODS.md").read_text()
    files = re.findall(r"(?:scripts|tests)/[\w/]+\.\w+", page)
    assert len(set(files)) >= 5
    assert not [name for name in files if not (ROOT / name).exists()]
    recipes = set(re.findall(r"^(\w+) \*args:", (ROOT / "Justfile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ +|`|=8 )just (\w+)", page, re.MULTILINE))
    assert len(named) >= 4
    assert named <= recipes


def test_the_launchers_accept_the_commands_of_the_page(world: World) -> None:
    page = (ROOT / "PODS.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(scripts/pods/tpu_vm\.sh .*?)(?: # .*)?$", page, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command, dashes, experiment = line.partition(" -- ")
        done = run_line(["bash", "-c", f"{command} --dry-run{dashes}{experiment}"], world.environment, world.checkout)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("gcloud compute tpus ") >= 2
    (sbatch,) = re.findall(r"^ {4}sbatch (.*)$", page, re.MULTILINE)
    options, _, rest = sbatch.partition(" scripts/pods/slurm.sh ")
    assert all(option.startswith("--") for option in options.split())
    assert (ROOT / "experiments" / f"{rest.split()[0]}.py").exists()
    assert world.slurm(*rest.split()).returncode == 0

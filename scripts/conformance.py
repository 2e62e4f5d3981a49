"""Runs Keras' own tests with our functions in the place of `fit` and its kin, and compares with those that pass without us.

just conformance             # bound; fails where a recorded test does not pass
just conformance --record    # unbound; writes down what passes with this version of Keras
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "conformance"
RECORDED = HERE / "passing.txt"
TESTS = ("trainers/trainer_test.py", "backend/jax/trainer_test.py", "callbacks")


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="just conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="run without us and write down what passes")
    record = parser.parse_args().record
    version = metadata.version("keras")
    header, *recorded = RECORDED.read_text().splitlines()
    if header != f"keras {version}" and not record:
        print(f"error: recorded with {header}, this is keras {version}: run `just conformance --record`.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        outcome, log = run(Path(folder), bound=not record)
    passing = sorted(name for name, how in outcome.items() if how == "passed")
    if not passing:
        print(log, file=sys.stderr)
        return 1
    if record:
        RECORDED.write_text("\n".join([f"keras {version}", *passing]) + "\n")
        print(f"{len(passing)} of Keras' tests pass without us; written to {RECORDED.relative_to(ROOT)}")
        return 0
    missing = [name for name in recorded if name not in passing]
    print(f"keras {version}: {len(recorded) - len(missing)} of {len(recorded)} tests that pass without us pass with us")
    for name in missing:
        print(f"  {outcome.get(name, 'not run')}: {name}")
    if missing:
        print(log, file=sys.stderr)
    return int(bool(missing))


def run(folder: Path, bound: bool) -> tuple[dict[str, str], str]:
    """Each test's outcome by its name, and pytest's own words."""
    import keras

    source = Path(keras.__file__).parent / "src"  # where the wheel keeps the tests
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "KERAS_HOME": str(folder / "keras"),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "RESEARCH_BOUND": "1" if bound else "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "bound", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={source}"]
    command += ["-n", "2", "-q", "--tb=short", f"--junit-xml={folder / 'outcome.xml'}", *(str(source / test) for test in TESTS)]
    finished = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not (folder / "outcome.xml").exists():
        return {}, finished.stdout
    cases = ElementTree.parse(folder / "outcome.xml").iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}": next((e.tag for e in case), "passed") for case in cases
    }, finished.stdout


if __name__ == "__main__":
    import keras as _  # noqa: F401  (what it says where it is missing is clearer than what pytest says)

    sys.exit(main())

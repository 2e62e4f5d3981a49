"""Runs Keras' own tests with the functions of `research` as the methods `fit`, `evaluate`, `predict` and so on of its models.

just conformance             # patched: fails if a recorded test does not pass
just conformance --record    # unpatched: records which tests pass with this version of Keras
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
PASSING = HERE / "passing.txt"
TESTS = ("trainers/trainer_test.py", "backend/jax/trainer_test.py", "callbacks")


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="just conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("--record", action="store_true", help="run unpatched Keras and record which tests pass")
    record = parser.parse_args().record
    version = metadata.version("keras")
    header, *recorded = PASSING.read_text().splitlines()
    if header != f"keras {version}" and not record:
        print(
            f"error: the tests were recorded with {header}, installed is keras {version}: run `just conformance --record`.",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        outcomes, log = run(Path(folder), patched=not record)
    passing = sorted(name for name, outcome in outcomes.items() if outcome == "passed")
    if not passing:
        print(log, file=sys.stderr)
        return 1
    if record:
        PASSING.write_text("\n".join([f"keras {version}", *passing]) + "\n")
        print(f"{len(passing)} of Keras' tests pass unpatched; recorded in {PASSING.relative_to(ROOT)}")
        return 0
    missing = [name for name in recorded if name not in passing]
    passed = len(recorded) - len(missing)
    print(f"keras {version}: {passed} of {len(recorded)} tests that pass in unpatched Keras pass with research")
    for name in missing:
        print(f"  {outcomes.get(name, 'not run')}: {name}")
    if missing:
        print(log, file=sys.stderr)
    return int(bool(missing))


def run(folder: Path, patched: bool) -> tuple[dict[str, str], str]:
    """Runs the tests; returns the outcome of each by its name, and the output of pytest."""
    import keras

    source = Path(keras.__file__).parent / "src"  # the wheel contains the tests
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "KERAS_HOME": str(folder / "keras"),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "PATCH_KERAS": "1" if patched else "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "patch_keras",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={source}",
    ]
    command += ["-n", "2", "-q", "--tb=short", f"--junit-xml={folder / 'outcome.xml'}", *(str(source / test) for test in TESTS)]
    finished = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not (folder / "outcome.xml").exists():
        return {}, finished.stdout
    cases = ElementTree.parse(folder / "outcome.xml").iter("testcase")
    return {
        f"{case.get('classname')}::{case.get('name')}": next((child.tag for child in case), "passed") for case in cases
    }, finished.stdout


if __name__ == "__main__":
    import keras as _  # noqa: F401  (its error message, if it is missing, is clearer than that of pytest)

    sys.exit(main())

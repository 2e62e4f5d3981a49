"""Runs Keras' own tests with the functions of `research` as the methods `fit`, `evaluate`, `predict` and so on of its models.

just conformance             # patched: the tests of Keras' trainer, and every tenth of all others that train, evaluate or predict
just conformance --all       # patched: all of them
just conformance --record    # unpatched: records which tests pass with this version of Keras, and call one of the methods

It fails if a recorded test does not pass.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "conformance"
TRAINER = HERE / "trainer.txt"
OTHERS = HERE / "others.txt"
TRAINER_FILES = ("trainers/trainer_test.py", "backend/jax/trainer_test.py", "callbacks/")
# `run_layer_test` of Keras' tests fits a model of the layer.
TRAINS = re.compile(r"\.(fit|evaluate|predict|(train|test|predict)_on_batch)\(|run_layer_test\(")
DOWNLOADS = ("applications/applications_test.py",)  # predicts with downloaded weights alone; without them it still takes 18 GB
# Parametrized by objects, with their addresses in the names: the workers of xdist would not agree on them.
WITHOUT_WORKERS = ("wrappers/sklearn_test.py",)
ADDRESS = re.compile("0x[0-9a-f]+")
FILES_AT_ONCE = 20  # a worker keeps the programs of all its tests in memory
SAMPLE = 10

Outcomes = dict[str, str]  # test -> "passed", "failure", "error" or "skipped"


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="just conformance", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="run all recorded tests, not a tenth of those outside the trainer")
    parser.add_argument("--record", action="store_true", help="run unpatched Keras and record which tests pass")
    options = parser.parse_args()
    version = f"keras {metadata.version('keras')}"
    with tempfile.TemporaryDirectory() as folder:
        return record(version, Path(folder)) if options.record else check(version, Path(folder), options.all)


def record(version: str, folder: Path) -> int:
    """Writes the names of the tests that pass in unpatched Keras; returns the exit code."""
    trainer, log = run(trainer_files(), folder)
    others, more = run(other_files(), folder)
    calling = {line for path in folder.glob("calls-*.txt") for line in path.read_text().splitlines()}
    for path, outcomes in (
        (TRAINER, trainer),
        (OTHERS, {name: outcome for name, outcome in others.items() if name in calling}),
    ):
        passing = sorted(name for name, outcome in outcomes.items() if outcome == "passed")
        if not passing:
            print(log + more, file=sys.stderr)
            return 1
        path.write_text("\n".join([version, *passing]) + "\n")
        print(f"{len(passing)} of Keras' tests pass unpatched; recorded in {path.relative_to(ROOT)}")
    return 0


def check(version: str, folder: Path, complete: bool) -> int:
    """Runs the recorded tests with patched methods; returns the exit code."""
    recorded = {}
    for path in (TRAINER, OTHERS):
        header, *recorded[path] = path.read_text().splitlines()
        if header != version:
            print(
                f"error: {path.name} was recorded with {header}, installed is {version}: run `just conformance --record`.",
                file=sys.stderr,
            )
            return 1
    others = recorded[OTHERS] if complete else recorded[OTHERS][::SAMPLE]
    wanted = recorded[TRAINER] + others
    outcomes, log = run([*trainer_files(), *files_of(others)], folder, wanted)
    missing = [name for name in wanted if outcomes.get(name) != "passed"]
    passed = len(wanted) - len(missing)
    print(f"{version}: {passed} of {len(wanted)} tests that pass in unpatched Keras pass with research")
    for name in missing:
        print(f"  {outcomes.get(name, 'not run')}: {name}")
    if missing:
        print(log, file=sys.stderr)
    return int(bool(missing))


def source() -> Path:
    """Returns the folder with Keras' tests, which its wheel contains."""
    import keras

    return Path(keras.__file__).parent / "src"


def trainer_files() -> list[str]:
    """Returns the files with the tests of `keras.Model.fit` and its callbacks."""
    paths = source().rglob("*_test.py")
    return sorted(name for path in paths if (name := str(path.relative_to(source()))).startswith(TRAINER_FILES))


def other_files() -> list[str]:
    """Returns the other files in which a model is trained, evaluated or predicts."""
    paths = (path for path in source().rglob("*_test.py") if TRAINS.search(path.read_text()))
    return sorted({str(path.relative_to(source())) for path in paths} - {*trainer_files(), *DOWNLOADS})


def files_of(names: Iterable[str]) -> list[str]:
    """Returns the files of tests, by their names.

    >>> files_of(["layers.core.dense_test.DenseTest::test_dense", "layers.core.dense_test.DenseTest::test_lora"])
    ['layers/core/dense_test.py']
    """
    modules = {name.partition("::")[0].partition("_test.")[0].removesuffix("_test") for name in names}
    return sorted(f"{module.replace('.', '/')}_test.py" for module in modules)


def run(files: Sequence[str], folder: Path, wanted: Sequence[str] | None = None) -> tuple[Outcomes, str]:
    """Runs the tests of these files, a few files at a time: patched, and `wanted` alone, if that is given.

    Returns the outcomes by name, and the output of pytest.
    """
    together = [name for name in files if name not in WITHOUT_WORKERS]
    groups = [together[i : i + FILES_AT_ONCE] for i in range(0, len(together), FILES_AT_ONCE)]
    groups += [[name] for name in files if name in WITHOUT_WORKERS]
    outcomes: Outcomes = {}
    logs = []
    for group in groups:
        found, log = run_group(group, folder, wanted, workers=0 if group[0] in WITHOUT_WORKERS else 2)
        outcomes |= found
        logs.append(log)
        print(f"{len(outcomes)} of Keras' tests were run", flush=True)
    return outcomes, "\n".join(logs)


def run_group(files: Sequence[str], folder: Path, wanted: Sequence[str] | None, workers: int) -> tuple[Outcomes, str]:
    """Runs the tests of these files in one pytest; see `run`."""
    selection, results = folder / "selected.txt", folder / "outcome.xml"
    selection.write_text("\n".join(wanted or []))
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "KERAS_HOME": str(folder / "keras"),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "PYTHONHASHSEED": "0",  # some tests are parametrized by sets: all workers must collect them in the same order
        "PATCH_KERAS": "" if wanted is None else "1",
        "SELECTED_TESTS": "" if wanted is None else str(selection),
        "RECORD_CALLS": str(folder) if wanted is None else "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "patch_keras", "-p", "no:cacheprovider", "-c", os.devnull]
    command += [f"--rootdir={source()}", "-n", str(workers), "-q", "--tb=short", f"--junit-xml={results}"]
    command += [str(source() / name) for name in files]
    finished = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not results.exists():
        return {}, finished.stdout
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = ADDRESS.sub("0x", f"{case.get('classname')}::{case.get('name')}")
        outcomes[name] = next((child.tag for child in case), "passed")
    return outcomes, finished.stdout


if __name__ == "__main__":
    import keras as _  # noqa: F401  (its error message, if it is missing, is clearer than that of pytest)

    sys.exit(main())

"""`just run --from`: a run starts from weights that exist already, and from then on does not need their source."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import research, strict
from experiment_file import write_experiment

from research.cli import resume, run
from research.cli.experiment import load_experiment
from research.training import checkpoint

DEEP = ("units: tuple[int, ...] = (1,)", "units: tuple[int, ...] = (4, 1)")
MAPPING = """

def weights_mapping(config):
    return {"sequential/dense/kernel": ("theirs", (1, 0))}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment, mine.py, and a finished run of it in `source`, with another seed."""
    folder = tmp_path_factory.mktemp("from")
    file = write_experiment(folder, DEEP)
    assert run.main([str(file), "--seed", "5", "--run-dir", str(folder / "source")]) == 0
    return folder


def state_in(directory: Path, file: Path) -> Any:
    experiment = load_experiment(str(file)).module
    learner = experiment.build(experiment.Config())
    path = checkpoint.latest(directory, print)
    assert path is not None
    return checkpoint.restore(path, learner.init(), learner.names).state


def assert_same(first: Any, second: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_a_run_starts_from_another_and_resumes_without_it(folder: Path, tmp_path: Path, capfd: Any) -> None:
    file, source = folder / "mine.py", tmp_path / "source"
    shutil.copytree(folder / "source", source)
    arguments = [str(file), "--from", str(source), "--checkpoint-every", "5"]
    assert run.main([*arguments, "--run-dir", str(tmp_path / "complete")]) == 0
    out = capfd.readouterr().out
    assert "started from" in out
    assert "taken  4" in out
    start, trained = (state_in(each, file) for each in (tmp_path / "complete" / "start", source / "checkpoints"))
    assert_same(start.trainable, trained.trainable)
    report = strict((tmp_path / "complete" / "warm_start.json").read_text())
    assert (len(report["taken"]), report["missing"], report["source"]) == (4, [], str(source / "checkpoints" / "000000008"))
    assert strict((tmp_path / "complete" / "config.json").read_text())["options"]["from_"] == str(source)

    # As a kill leaves it after a checkpoint, and before the first one.
    shutil.rmtree(source)
    for name in ("late", "early"):
        killed = tmp_path / name
        shutil.copytree(tmp_path / "complete", killed)
        (killed / "summary.json").unlink()
        shutil.rmtree(killed / "checkpoints" / "000000008" if name == "late" else killed / "checkpoints")
        assert resume.main([str(killed)]) == 0
        assert_same(state_in(killed / "checkpoints", file), state_in(tmp_path / "complete" / "checkpoints", file))


@pytest.mark.slow
def test_a_step_of_such_a_run_is_replayed_from_the_same_weights(folder: Path, tmp_path: Path) -> None:
    arguments = [
        str(folder / "mine.py"),
        "--from",
        str(folder / "source"),
        "--log-every",
        "1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert run.main(arguments) == 0
    done = research("replay", str(tmp_path / "run"), "--step", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_started_run_does_not_read_another_source(folder: Path, tmp_path: Path, capfd: Any) -> None:
    arguments = [str(folder / "mine.py"), "--run-dir", str(tmp_path / "run")]
    assert run.main([*arguments, "--from", str(folder / "source")]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    before = (tmp_path / "run" / "config.json").read_text()
    assert run.main([*arguments, "--from", str(folder / "source" / "line.keras")]) == 0
    assert "line.keras: not read again, since the run has started already" in capfd.readouterr().err
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.slow
def test_two_processes_start_from_a_file_on_a_mesh(folder: Path, tmp_path: Path) -> None:
    arguments = ["run", str(folder / "mine.py"), "--mesh", "fsdp=8", "--from", str(folder / "source" / "line.keras")]
    done = research("processes", "2", *arguments, "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start = state_in(tmp_path / "run" / "start", folder / "mine.py")
    assert_same(start.trainable, state_in(folder / "source" / "checkpoints", folder / "mine.py").trainable)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--from", "nothing"], 1, "error: no run 'nothing': expected a run directory"),
        (["--from", "nothing.keras"], 1, "nothing.keras: it is missing; expected a run, a checkpoint, a .safetensors file"),
        (["--from", "mine.py"], 1, "mine.py: its name ends in '.py'"),
        (["--only", "dense"], 2, "error: --only without --from; expected both"),
        (["--from", "source", "--only", "("], 2, "error: --only (: expected a regular expression"),
        (["--from", "source", "--only", "dence"], 1, "error: only 'dence' matches none of the 4 names; near it: "),
        (
            ["--from", "source", "--units", "3", "1"],
            1,
            "'sequential/dense/kernel' is float32[4, 4] in it, expected float32[4, 3]",
        ),
    ],
    ids=["run", "file", "format", "alone", "regex", "names", "shape"],
)
def test_what_can_not_be_started_from_is_one_line_and_leaves_no_run(
    arguments: list[str], code: int, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(folder)
    assert run.main(["mine.py", *arguments]) == code
    assert message in capfd.readouterr().err
    assert not (folder / "runs").exists()


def test_an_experiment_maps_names_to_those_of_a_file(folder: Path, tmp_path: Path) -> None:
    import safetensors.numpy

    kernel = np.arange(4, dtype=np.float32)[None]
    safetensors.numpy.save_file({"theirs": kernel}, tmp_path / "theirs.safetensors")
    file = write_experiment(tmp_path / "mapped", append=MAPPING)
    assert run.main([str(file), "--from", str(tmp_path / "theirs.safetensors"), "--run-dir", str(tmp_path / "run")]) == 0
    np.testing.assert_array_equal(state_in(tmp_path / "run" / "start", file).trainable[0], kernel.T)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("def weights_mapping(): pass", "weights_mapping takes 0 arguments, expected 1"),
        ("def weights_mapping(config): return 3", "weights_mapping(config) returned int; expected a dict or a function"),
    ],
    ids=["arguments", "result"],
)
def test_a_wrong_mapping_is_one_line(mapping: str, message: str, folder: Path, tmp_path: Path, capfd: Any) -> None:
    file = write_experiment(tmp_path / "wrong", append=f"\n\n{mapping}\n")
    assert run.main([str(file), "--from", str(folder / "source"), "--run-dir", str(tmp_path / "run")]) == 1
    assert message in capfd.readouterr().err

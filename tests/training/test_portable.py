"""The exported step trains on without this package and without Keras, with the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import X, Y, data, learner

import research
from research.training.portable import export_step

from experiments import gan  # isort: skip


def without_packages(folder: Path, *names: str) -> dict[str, str]:
    """Returns an environment in which these packages can't be imported."""
    for name in names:
        (folder / "blocked" / name).mkdir(parents=True, exist_ok=True)
        (folder / "blocked" / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked')\n")
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_BACKEND")}
    return {**inherited, "PYTHONPATH": str(folder / "blocked")}


def run_script(folder: Path, blocked: Path) -> list[Any]:
    """Runs train.py, and returns the arrays that it ends with."""
    environment = without_packages(blocked, "keras", "research", "optax")
    done = subprocess.run([sys.executable, "train.py"], capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    leaves = json.loads((folder / "step.json").read_text())["state"]
    with np.load(folder / "trained.npz") as stored:
        return [stored[f"arr_{i}"].view(jnp.dtype(leaf["dtype"])) for i, leaf in enumerate(leaves)]


def assert_continues(subject: research.Learner, batches: research.Batches, tmp_path: Path, first: int, count: int) -> None:
    """Trains some steps, exports, and compares `count` more steps of `research.train` with those of the script."""
    state, _ = research.train(subject, batches, steps=first)
    examples = [jax.device_get(batches.batch(step)) for step in range(first, first + count)]
    folder = export_step(subject, state, examples, tmp_path / "step", step=first, steps_per_epoch=batches.steps_per_epoch)
    trained = run_script(folder, tmp_path)
    expected, _ = research.train(subject, batches, steps=first + count, start=first, state=state)
    names = jax.tree.leaves(subject.names)
    for name, a, b in zip(names, trained, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, jax.random.key_data(b) if jnp.issubdtype(b.dtype, jax.dtypes.prng_key) else b, name)


@pytest.mark.slow
def test_a_hundred_steps_with_dropout_adam_and_shorter_last_batches_are_equal(tmp_path: Path) -> None:
    assert_continues(learner(), research.from_arrays(X, Y, batch_size=16, seed=1), tmp_path, 3, 100)


@pytest.mark.slow
def test_steps_of_two_models_and_optimizers_are_equal(tmp_path: Path) -> None:
    config = gan.Config(batch_size=16)
    assert_continues(gan.build(config), gan.data(config)["train"], tmp_path, 2, 5)


@pytest.mark.slow
def test_half_precision_typed_keys_and_numbers_are_equal(tmp_path: Path) -> None:
    def train(state: Any, batch: Any) -> Any:
        key, noise = jax.random.split(state["key"])
        weight = state["weight"] + jax.random.normal(noise, (3,), jnp.bfloat16) * jnp.bfloat16(batch.x.mean())
        return {"key": key, "weight": weight, "count": state["count"] + 1}, {"sum": weight.astype(jnp.float32).sum()}

    def init() -> Any:
        return {"key": jax.random.key(3), "weight": jnp.ones(3, jnp.bfloat16), "count": jnp.zeros((), jnp.int8)}

    names = {"key": "key", "weight": "weight", "count": "count"}
    subject = research.Learner(init, lambda state: state, train, train, lambda state, batch: batch.x, names)
    assert_continues(subject, data(), tmp_path, 1, 6)


def test_programs_run_on_every_platform_and_the_files_say_what_they_hold(tmp_path: Path) -> None:
    subject = learner()
    state = subject.init()
    batch = research.Batch(X[:8], Y[:8])
    folder = export_step(subject, state, [batch], tmp_path / "step", step=7)
    contents = json.loads((folder / "step.json").read_text())
    assert (contents["step"], contents["logs"]) == (
        7,
        [{"name": name, "shape": [], "dtype": "float32"} for name in ("accuracy", "loss")],
    )
    assert contents["batch"] == [
        {"name": "x", "shape": [8, 4], "dtype": "float32"},
        {"name": "y", "shape": [8], "dtype": "int32"},
    ]
    assert [leaf["name"] for leaf in contents["state"]] == jax.tree.leaves(subject.names)
    for platform in ("cpu", "cuda", "tpu"):
        for name in ("train", "evaluate", "predict", "reset"):
            exported = jax.export.deserialize(bytearray((folder / platform / f"{name}.jax").read_bytes()))
            assert exported.platforms == (platform,)
            assert "stablehlo" in (folder / platform / f"{name}.mlir").read_text()
    predict = jax.export.deserialize(bytearray((folder / "cpu" / "predict.jax").read_bytes()))
    (outputs,) = predict.call(jax.tree.leaves(state), [X[:8], Y[:8]])
    np.testing.assert_array_equal(outputs, subject.predict(state, batch))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "export_step: there are no batches; expected at least one, for the shapes."),
        (
            [research.Batch(X[:8], Y[:8]), research.Batch(X[:8])],
            "export_step: the batches have 2 different structures, expected one.",
        ),
    ],
)
def test_batches_that_do_not_do_are_one_line_and_leave_nothing(batches: list[Any], message: str, tmp_path: Path) -> None:
    subject = learner()
    with pytest.raises(research.InvalidArgument) as error:
        export_step(subject, subject.init(), batches, tmp_path / "step")
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_stays_as_it_is_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    subject = learner()
    (tmp_path / "there").mkdir()
    with pytest.raises(research.InvalidArgument, match="it exists already"):
        export_step(subject, subject.init(), [research.Batch(X[:8], Y[:8])], tmp_path / "there")
    with pytest.raises(ValueError, match="incompatible with the layer"):
        export_step(subject, subject.init(), [research.Batch(X[:8, :3], Y[:8])], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

"""Low-rank adapters on a base from a file: what is read, what is trained, and what is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import keras
import language_models
import numpy as np
import pytest

import research
from experiments import _text, gemma, gpt, lora
from experiments.lora import Config
from research.cli import resume, run
from research.training import checkpoint

pytestmark = [pytest.mark.promotes, pytest.mark.slow]
TINY = Config(batch_size=8, windows=64, context=16, rank=2, seed=1)
BASE = gemma.Config(batch_size=8, windows=64, context=16)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    small = {**gemma.PRESETS["tiny"], "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 128, "head_dim": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gemma.PRESETS, "tiny", small)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A run of the base in a directory, with its exported files, and its weights by name."""
    directory = tmp_path_factory.mktemp("base")
    learner = gemma.build(BASE)
    state = learner.init()
    checkpoint.save(directory / "checkpoints", 1, state, learner.names)
    model = gemma.models(BASE, state)["model"]
    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    return directory, dict(zip(learner.names.trainable, map(np.asarray, state.trainable), strict=True))


def started(source: Path) -> tuple[research.Learner, research.State, Any]:
    learner = lora.build(TINY)
    return learner, *research.restore(learner, source, partial=True)


def perturbed(state: research.State) -> research.State:
    """A state whose adapters all make a difference."""
    rng = np.random.default_rng(0)
    return state._replace(trainable=[rng.normal(0, 0.1, leaf.shape).astype(np.float32) for leaf in state.trainable])


@pytest.mark.parametrize("name", ["", "model.keras", "model.weights.h5"], ids=["run", "keras", "h5"])
def test_all_of_the_base_comes_from_the_file_and_training_leaves_its_bits_alone(name: str, base: Any) -> None:
    directory, weights = base
    learner, state, report = started(directory / name)
    assert set(report.taken) == set(weights) == set(learner.names.non_trainable)
    assert report.missing == learner.names.trainable
    batches = lora.data(TINY)["train"]
    before, train = [np.array(leaf) for leaf in state.trainable], jax.jit(learner.train)
    for step in range(3):
        state, _ = train(state, batches.batch(step))
    for weight, leaf in zip(learner.names.non_trainable, state.non_trainable, strict=True):
        np.testing.assert_array_equal(leaf, weights[weight])
    assert all((old != new).any() for old, new in zip(before, state.trainable, strict=True))


def test_only_adapters_of_every_dense_layer_are_trained_and_have_moments() -> None:
    names = lora.build(TINY).names
    adapters = [f"decoder_block_{i}/{layer}/lora_kernel_{part}" for i in range(2) for layer in dense_layers() for part in "ab"]
    assert sorted(names.trainable) == sorted(adapters)
    slots = [f"{slot}/{name}" for name in names.trainable for slot in ("momentum", "velocity")]
    assert sorted(names.optimizer) == sorted(["iteration", *slots])


def dense_layers() -> list[str]:
    attention = [f"attention/{name}" for name in ("query", "key", "value", "attention_output")]
    return [*attention, "ffw_gating", "ffw_gating_2", "ffw_linear"]


def test_merged_weights_are_a_plain_file_that_predicts_what_the_adapted_network_does(base: Any, tmp_path: Path) -> None:
    learner, state, _ = started(base[0])
    adapted = perturbed(state)
    lora.models(TINY, adapted)["model"].save(tmp_path / "merged.keras")
    plain = gemma.build(BASE)
    merged, report = research.restore(plain, tmp_path / "merged.keras")
    assert (report.missing, report.left) == ([], [])
    batch = lora.data(TINY)["val"].batch(0)
    predict = jax.jit(learner.predict)
    expected = predict(adapted, batch)
    np.testing.assert_allclose(jax.jit(plain.predict)(merged, batch), expected, atol=1e-5)
    assert np.abs(expected - predict(state, batch)).max() > 0.1
    for name, value in zip(plain.names.trainable, lora.merge(TINY, lora.without_adapters(adapted)).trainable, strict=True):
        np.testing.assert_array_equal(value, base[1][name])


@pytest.mark.complete
def test_training_on_a_mesh_equals_training_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "optimizer", lambda config: keras.optimizers.SGD(0.1))  # Adam would amplify rounding errors
    state, losses = language_models.train(lora, TINY, 5)
    mesh_state, mesh_losses = language_models.train(lora, TINY, 5, {"data": 4, "fsdp": 2})
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, mesh_state.non_trainable, state.non_trainable)
    assert any("fsdp" in leaf.sharding.spec for leaf in mesh_state.non_trainable)


@pytest.mark.complete
def test_a_run_from_a_file_resumes_bit_for_bit_and_writes_the_merged_weights(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_text, "HELD_OUT_BYTES", {"source": 1 << 10, "encodings": 1 << 10})
    arguments = ["lora", "--context", "64", "--windows", "16", "--rank", "2", "--checkpoint-every", "1"]
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert run.main([*arguments, "--from", str(base[0] / "model.keras"), "--run-dir", str(complete)]) == 0
    shutil.copytree(complete, killed)
    shutil.rmtree(killed / "checkpoints" / "000000004")
    (killed / "summary.json").unlink()
    assert resume.main([str(killed)]) == 0
    learner = lora.build(Config(context=64, windows=16, rank=2))
    states = [
        checkpoint.restore(each / "checkpoints" / "000000004", learner.init(), learner.names).state for each in (killed, complete)
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)
    written, _ = research.restore(gemma.build(BASE), complete / "model.weights.h5")
    merged = lora.merge(Config(context=64, rank=2), states[0])
    for value, expected in zip(written.trainable, merged.trainable, strict=True):
        np.testing.assert_array_equal(value, expected)
    metrics = json.loads((complete / "summary.json").read_text())["metrics"]
    assert metrics["base_val_bits_per_byte"] != metrics["val_bits_per_byte"]
    assert metrics["trained_parameters"] == research.count_parameters(states[0])
    assert (complete / "plots" / "text.png").exists()

"""KerasHub's Gemma: a network that others wrote is trained, cached, computed anew and split over devices like one of ours."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import research
from experiments import gemma, gpt
from experiments.gemma import Config
from research import parallel
from research.transforms import equations

pytestmark = [pytest.mark.promotes, pytest.mark.slow]
TINY = Config(batch_size=8, windows=64, context=16)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained by SGD: Adam would make much of a rounding."""
    small = {**gemma.PRESETS["tiny"], "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 128, "head_dim": 8}
    monkeypatch.setitem(gemma.PRESETS, "tiny", small)
    monkeypatch.setattr(gpt, "optimizer", lambda config: keras.optimizers.SGD(0.1))


def trained(config: Config, steps: int, axes: dict[str, int] | None = None) -> tuple[Any, list[float]]:
    if axes is None:
        learner = gemma.build(config)
        state = learner.init()
    else:
        learner, state = parallel.born(lambda: gemma.build(config), parallel.mesh(**axes))
    data, train, losses = gemma.data(config)["train"], jax.jit(learner.train), []
    for step in range(steps):
        state, logs = train(learner.reset(state), data.batch(step))
        losses.append(float(logs["loss"]))
    return state, losses


@pytest.mark.parametrize(("preset", "parameters"), [("2b", 2_506_172_416), ("7b", 8_537_680_896)])
def test_presets_are_the_published_networks(preset: Any, parameters: int) -> None:
    """KerasHub's own counts of gemma_2b_en and gemma_7b_en."""
    _, shapes = research.abstract(lambda: gemma.build(Config(preset=preset)))
    assert research.parameters(shapes) == parameters


def test_blocks_are_computed_again_and_give_the_same() -> None:
    state, losses = trained(TINY, 3)
    again, found = trained(replace(TINY, remat=True), 3)
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    np.testing.assert_allclose(again.trainable[2], state.trainable[2], atol=1e-6)
    counts = []
    for remat in (False, True):
        learner = gemma.build(replace(TINY, remat=remat))
        jaxpr = jax.make_jaxpr(learner.train)(learner.init(), gemma.data(TINY)["train"].batch(0)).jaxpr
        counts.append([e.primitive.name for e in equations(jaxpr)].count("remat2"))
    assert counts[0] == 0
    assert counts[1] == 2  # a block each, and nothing inside them once more


def test_what_is_cached_changes_nothing() -> None:
    learner = gemma.build(TINY)
    state, prompt = learner.init(), jnp.asarray(np.arange(12).reshape(2, 6), jnp.int32)
    found = gemma.generate(TINY, state, prompt, jax.random.key(0), 10, 0.0)
    tokens = np.asarray(prompt)
    for _ in range(10):
        padded = np.zeros((2, 16), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        logits = learner.predict(state, research.Batch(padded))[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(found, tokens[:, 6:])


@pytest.mark.slow
def test_it_trains_on_a_mesh_split_by_heads_as_on_one_device() -> None:
    _, losses = trained(TINY, 20)
    state, found = trained(replace(TINY, remat=True), 20, {"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    names = gemma.build(TINY).names.trainable
    specs = {name: leaf.sharding.spec for name, leaf in zip(names, state.trainable, strict=True)}
    assert specs["decoder_block_0/attention/query/kernel"][0] == "tensor"
    assert specs["decoder_block_0/ffw_gating/kernel"] == P("fsdp", "tensor")
    assert specs["decoder_block_0/ffw_linear/kernel"] == P("tensor", "fsdp")

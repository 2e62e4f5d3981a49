"""KerasHub's Gemma: a third-party network is trained, cached, rematerialized and sharded like any other."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import language_models
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import research
from experiments import gemma, gpt
from experiments.gemma import Config
from research.transforms.jaxpr import equations

pytestmark = [pytest.mark.promotes, pytest.mark.slow]
train = functools.partial(language_models.train, gemma)
TINY = Config(batch_size=8, windows=64, context=16)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made smaller and trained by SGD: Adam would amplify rounding errors."""
    small = {**gemma.PRESETS["tiny"], "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 128, "head_dim": 8}
    monkeypatch.setitem(gemma.PRESETS, "tiny", small)
    monkeypatch.setattr(gpt, "optimizer", lambda config: keras.optimizers.SGD(0.1))


@pytest.mark.parametrize(("preset", "parameters"), [("2b", 2_506_172_416), ("7b", 8_537_680_896)])
def test_presets_have_the_published_number_of_parameters(preset: Any, parameters: int) -> None:
    """KerasHub's own counts of gemma_2b_en and gemma_7b_en."""
    _, shapes = research.init_abstract(lambda: gemma.build(Config(preset=preset)))
    assert research.count_parameters(shapes) == parameters


@pytest.mark.complete
def test_remat_of_each_block_changes_no_number() -> None:
    state, losses = train(TINY, 3)
    remat_state, remat_losses = train(replace(TINY, remat=True), 3)
    np.testing.assert_allclose(remat_losses, losses, rtol=1e-6)
    np.testing.assert_allclose(remat_state.trainable[2], state.trainable[2], atol=1e-6)
    counts = []
    for remat in (False, True):
        learner = gemma.build(replace(TINY, remat=remat))
        jaxpr = jax.make_jaxpr(learner.train)(learner.init(), gemma.data(TINY)["train"].batch(0)).jaxpr
        counts.append([e.primitive.name for e in equations(jaxpr)].count("remat2"))
    assert counts[0] == 0
    assert counts[1] == 2  # one for each block, none nested


def test_greedy_generation_equals_that_of_a_network_without_a_cache() -> None:
    learner = gemma.build(TINY)
    state, prompt = learner.init(), jnp.asarray(np.arange(12).reshape(2, 6), jnp.int32)
    generated = gemma.generate(TINY, state, prompt, jax.random.key(0), 10, 0.0)
    tokens = np.asarray(prompt)
    for _ in range(10):
        padded = np.zeros((2, 16), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        logits = learner.predict(state, research.Batch(padded))[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, np.argmax(logits, -1)[:, None].astype(np.int32)], 1)
    np.testing.assert_array_equal(generated, tokens[:, 6:])


@pytest.mark.complete
def test_training_on_a_mesh_that_splits_heads_equals_training_on_one_device() -> None:
    _, losses = train(TINY, 20)
    state, mesh_losses = train(replace(TINY, remat=True), 20, {"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-6)
    names = gemma.build(TINY).names.trainable
    specs = {name: leaf.sharding.spec for name, leaf in zip(names, state.trainable, strict=True)}
    assert specs["decoder_block_0/attention/query/kernel"][0] == "tensor"
    assert specs["decoder_block_0/ffw_gating/kernel"] == P("fsdp", "tensor")
    assert specs["decoder_block_0/ffw_linear/kernel"] == P("tensor", "fsdp")

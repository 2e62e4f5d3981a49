"""The GPT: caching, rematerialization, micro-batches and sharding do not change the numbers."""

import functools
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import language_models
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import research
from experiments import _text, gpt
from experiments.gpt import Config, Preset
from research import InvalidArgument, distributed
from research.core.objective import forward
from research.transforms.jaxpr import equations

pytestmark = pytest.mark.slow
train = functools.partial(language_models.train, gpt)
TINY = Config(batch_size=8, windows=64, seed=3)
CONTEXT = 16


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest preset made smaller, trained by SGD: Adam would amplify rounding errors."""
    monkeypatch.setitem(gpt.PRESETS, "1m", Preset(2, 32, 4, CONTEXT, 256, "float32", False, 3e-3))
    monkeypatch.setattr(gpt, "optimizer", lambda config: keras.optimizers.SGD(0.1))


def add_noise(state: research.State) -> research.State:
    """Makes every weight matter: biases that are not 0, scales of norms that are not 1."""
    keys = jax.random.split(jax.random.key(7), len(state.trainable))
    noise = [0.1 * jax.random.normal(key, w.shape) for key, w in zip(keys, state.trainable, strict=True)]
    return state._replace(trainable=[w + n for w, n in zip(state.trainable, noise, strict=True)])


def assert_close(state: research.State, expected: research.State) -> None:
    for name, a, b in zip(gpt.build(TINY).names.trainable, state.trainable, expected.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=name)


def primitives(function: Any, *args: Any) -> list[str]:
    return [equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)]


# --- the network


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [
        ("124m", 50257, 124_439_808),  # GPT-2
        ("350m", 50257, 354_823_168),  # GPT-2 medium
        ("1m", None, 1_040_768),
        ("10m", None, 10_844_160),
        ("1b", None, 1_315_819_520),
        ("7b", None, 6_658_596_864),
    ],
)
def test_presets_have_the_number_of_parameters_in_their_name(
    preset: Any, vocabulary: int | None, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 as published; otherwise 12 width^2 + 13 width per layer, and embeddings of tokens and positions."""
    monkeypatch.undo()
    _, shapes = research.init_abstract(lambda: gpt.build(Config(preset=preset, vocabulary=vocabulary)))
    size = gpt.PRESETS[preset]
    width, embeddings = size.width, (vocabulary or size.vocabulary) + size.context
    assert research.count_parameters(shapes) == parameters
    assert parameters == size.layers * (12 * width**2 + 13 * width) + (embeddings + 2) * width


def test_each_output_depends_on_all_earlier_tokens_and_on_no_later_one() -> None:
    learner = gpt.build(TINY)
    state, tokens = add_noise(learner.init()), np.arange(2 * CONTEXT, dtype=np.int32).reshape(2, CONTEXT)
    before = learner.predict(state, research.Batch(tokens))
    for position in (0, 5, CONTEXT - 1):
        changed_tokens = tokens.copy()
        changed_tokens[:, position] += 100
        change = np.abs(np.asarray(learner.predict(state, research.Batch(changed_tokens)) - before)).max((0, 2))
        assert (change[:position] == 0).all()
        assert (change[position:] > 1e-5).all()


def test_mixed_precision_keeps_weights_and_logits_in_float32_and_stays_inside_the_model() -> None:
    config = replace(TINY, dtype_policy="mixed_bfloat16", remat=True)
    learner = gpt.build(config)
    state, batch = add_noise(learner.init()), gpt.data(config)["train"].batch(0)
    after, logs = jax.jit(learner.train)(state, batch)
    assert {leaf.dtype for leaf in after.trainable} == {jnp.dtype("float32")}
    assert np.isfinite(float(logs["loss"]))
    logits = learner.predict(state, batch)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (np.asarray(rounded) != np.asarray(logits)).mean() > 0.9  # they were never bfloat16
    program = jax.make_jaxpr(learner.train)(state, batch).jaxpr
    products = [e.invars[0].aval.dtype for e in equations(program) if e.primitive.name == "dot_general"]
    assert products.count(jnp.dtype("bfloat16")) > len(products) / 2
    assert keras.config.dtype_policy().name == "float32"
    float32_logits = gpt.build(TINY).predict(state, batch)
    np.testing.assert_allclose(logits, float32_logits, atol=0.1)


@pytest.mark.sample(2)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_remat_changes_no_number(dropout: float) -> None:
    stored, recomputed = (replace(TINY, remat=remat, dropout=dropout) for remat in (False, True))
    state, losses = train(stored, 3)
    remat_state, remat_losses = train(recomputed, 3)
    np.testing.assert_allclose(remat_losses, losses, rtol=1e-6)
    assert_close(remat_state, state)
    batch = gpt.data(TINY)["train"].batch(0)
    counts = []
    for config in (stored, recomputed):
        learner = gpt.build(config)
        counts.append(primitives(learner.train, learner.init(), batch).count("remat2"))
    assert counts[0] == 0
    assert counts[1] >= 2  # one for each block


def test_dropout_differs_between_steps_and_is_off_in_evaluation() -> None:
    config = replace(TINY, dropout=0.3, remat=True)
    learner = gpt.build(config)
    batch, state = gpt.data(config)["train"].batch(0), learner.init()
    after, first = jax.jit(learner.train)(state, batch)
    _, second = jax.jit(learner.train)(state._replace(non_trainable=after.non_trainable), batch)
    _, evaluated = jax.jit(learner.evaluate)(state, batch)
    without_dropout = gpt.build(TINY)
    same_weights = without_dropout.init()._replace(trainable=state.trainable)
    _, expected = jax.jit(without_dropout.evaluate)(same_weights, batch)
    assert len({float(logs["loss"]) for logs in (first, second, evaluated)}) == 3
    changed = [bool((a != b).any()) for a, b in zip(after.non_trainable, state.non_trainable, strict=True)]
    assert changed == [True] * 3  # the seeds of the embeddings' dropout and of each block
    assert float(evaluated["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)


def test_dropout_keeps_the_mean_and_depends_on_the_key() -> None:
    ones, keys = jnp.ones((100, 100)), jax.random.split(jax.random.key(0))
    output = np.asarray(gpt.dropout(ones, 0.25, keys, 0))
    assert set(np.unique(output)) == {np.float32(0), np.float32(1 / 0.75)}
    assert output.mean() == pytest.approx(1, abs=0.02)
    assert (output != gpt.dropout(ones, 0.25, keys, 1)).any()
    assert gpt.dropout(ones, 0.25, None, 0) is ones


@pytest.mark.sample(2)
@pytest.mark.parametrize("remat", [False, True])
def test_micro_batches_give_the_result_of_the_full_batch(remat: bool) -> None:
    state, losses = train(replace(TINY, sums="exact"), 3)
    accumulated_state, accumulated_losses = train(replace(TINY, accumulate=2, remat=remat), 3)
    np.testing.assert_allclose(accumulated_losses, losses, rtol=1e-6)
    assert_close(accumulated_state, state)
    learner = gpt.build(replace(TINY, accumulate=2, remat=remat))
    program = jax.make_jaxpr(learner.train)(learner.init(), gpt.data(TINY)["train"].batch(0)).jaxpr
    assert [e.params["length"] for e in equations(program) if e.primitive.name == "scan"] == [2]


def test_a_loaded_network_equals_the_saved_one(tmp_path: Path) -> None:
    config = replace(TINY, dropout=0.1, remat=True, dtype_policy="mixed_bfloat16")
    learner = gpt.build(config)
    state, batch = add_noise(learner.init()), gpt.data(config)["val"].batch(0)
    model = gpt.models(config, state)["model"]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(batch.x), model(batch.x))
    np.testing.assert_allclose(loaded(batch.x), learner.predict(state, batch), atol=1e-6)


# --- training


def test_the_learning_rate_warms_up_and_decays_and_biases_and_norms_have_no_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(gpt.PRESETS, "1m", Preset(2, 32, 4, CONTEXT, 256, "float32", False, 3e-3))
    config = replace(TINY, steps=40, warmup=100)
    optimizer = gpt.optimizer(config)
    optimizer.build([])
    rates = []
    for step in (0, 3, 4, 22, 40):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([0.75e-3, 2.4375e-3, 3e-3, 1.65e-3, 0.3e-3], rel=1e-4)
    decayed, _ = train(replace(config, weight_decay=10.0))
    plain, _ = train(replace(config, weight_decay=0.0))
    for name, a, b in zip(gpt.build(config).names.trainable, decayed.trainable, plain.trainable, strict=True):
        excluded = name.endswith(("bias", "gamma", "beta"))
        assert bool((np.asarray(a) == np.asarray(b)).all()) == excluded, name


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.2, "remat": True, "accumulate": 2, "context": 8}],
    ids=["plain", "dropout, remat, micro-batches of eight tokens per device"],
)
def test_training_on_a_mesh_equals_training_on_one_device(options: dict[str, Any]) -> None:
    config = replace(TINY, **options)
    _, losses = train(config, 20)
    _, mesh_losses = train(config, 20, {"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.1


def test_the_tensor_layout_splits_heads_vocabulary_and_wide_layers() -> None:
    mesh = distributed.mesh(data=2, fsdp=2, tensor=2)
    learner, shapes = research.init_abstract(lambda: gpt.build(replace(TINY, remat=True)))
    shardings = distributed.state_shardings(learner.names, shapes, mesh, distributed.tensor)
    specs = {
        name.partition("/")[2] if name.startswith("block/") else name: named.spec
        for name, named in zip(learner.names.trainable, shardings.trainable, strict=True)
    }
    for name in ("query", "key", "value"):
        assert specs[f"{name}/kernel"] == P("fsdp", "tensor", None)
    assert specs["attention_output/kernel"] == P("tensor", None, "fsdp")
    assert (specs["widen/kernel"], specs["narrow/kernel"]) == (P("fsdp", "tensor"), P("tensor", "fsdp"))
    assert specs["vocabulary/embeddings"] == P("tensor", "fsdp")


# --- generation


@pytest.mark.parametrize("lengths", [[1] * CONTEXT, [5, 1, 1, 9], [CONTEXT]])
def test_cached_keys_and_values_give_the_logits_of_a_full_forward_pass(lengths: list[int]) -> None:
    learner, model = gpt.build(TINY), gpt.abstract_network(TINY)
    state = add_noise(learner.init())
    tokens = jax.random.randint(jax.random.key(1), (3, CONTEXT), 0, 256, jnp.int32)
    expected = forward(gpt.network(TINY), state, tokens)
    assert float(jnp.std(expected)) > 0.3
    cache, start = gpt.empty_cache(TINY, 3), 0
    for length in lengths:
        logits, cache = gpt.call_with_cache(model, state, cache, tokens[:, start : start + length], jnp.int32(start))
        np.testing.assert_allclose(logits, expected[:, start : start + length], rtol=0, atol=1e-5)
        start += length


def test_greedy_generation_equals_that_of_a_network_without_a_cache() -> None:
    learner = gpt.build(TINY)
    state, prompt_length, length = add_noise(learner.init()), 3, CONTEXT - 3
    prompt = jax.random.randint(jax.random.key(2), (4, prompt_length), 0, 256, jnp.int32)
    text = np.zeros((4, CONTEXT), np.int32)
    text[:, :prompt_length] = prompt
    logits = jax.jit(lambda tokens: learner.predict(state, research.Batch(tokens)))
    for position in range(prompt_length, CONTEXT):
        text[:, position] = np.asarray(logits(text))[:, position - 1].argmax(-1)
    generated = gpt.generate(TINY, state, prompt, jax.random.key(0), length, 0.0)
    np.testing.assert_array_equal(generated, text[:, prompt_length:])
    assert len(np.unique(generated)) > 4


def test_the_cost_of_a_token_is_that_of_one_position() -> None:
    learner = gpt.build(TINY)
    prompt = jnp.zeros((2, 4), jnp.int32)
    program = jax.make_jaxpr(lambda state: gpt.generate(TINY, state, prompt, jax.random.key(0), 12))(learner.init())
    (loop,) = [
        e for e in equations(program.jaxpr) if e.primitive.name == "scan" and len(list(equations(e.params["jaxpr"].jaxpr))) > 50
    ]
    products = [e.outvars[0].aval for e in equations(loop.params["jaxpr"].jaxpr) if e.primitive.name == "dot_general"]
    assert max(product.size for product in products) == 2 * 256  # the logits of one position of each text


def test_tokens_are_sampled_with_the_probabilities_of_the_network() -> None:
    learner = gpt.build(TINY)
    state, count, temperature = add_noise(learner.init()), 4000, 0.7
    prompt = jnp.full((count, 2), 9, jnp.int32)
    samples = np.asarray(gpt.generate(TINY, state, prompt, jax.random.key(0), 2, temperature))
    tokens = jnp.zeros((1, CONTEXT), jnp.int32).at[:, :2].set(9)
    log_probabilities = np.asarray(jax.nn.log_softmax(forward(gpt.network(TINY), state, tokens)[0, 1] / temperature))
    sampled = log_probabilities[samples[:, 0]]
    negative_entropy = float((np.exp(log_probabilities) * log_probabilities).sum())
    assert abs(sampled.mean() - negative_entropy) < 4 * sampled.std() / count**0.5
    same_key, other_key = (gpt.generate(TINY, state, prompt, jax.random.key(seed), 2, temperature) for seed in (0, 1))
    np.testing.assert_array_equal(same_key, samples)
    assert (np.asarray(other_key) != samples).any()


def test_generation_continues_after_a_full_context_and_figures_have_all_glyphs() -> None:
    learner, splits = gpt.build(TINY), gpt.data(TINY)
    state = learner.init()  # generates every byte value
    prompt = _text.held_out_passage(CONTEXT // 2)[None]
    text = _text.continue_texts(gpt.continuation(TINY, state), prompt, CONTEXT, 30)
    assert text.shape == (1, CONTEXT // 2 + 30)
    np.testing.assert_array_equal(text[:, : CONTEXT // 2], prompt)
    key = jax.random.split(jax.random.key(0), 4)[2]
    np.testing.assert_array_equal(text[:, 24:32], gpt.generate(TINY, state, text[:, 16:24], key, 8, _text.TEMPERATURE))
    for figures in (gpt.each_epoch(TINY, learner, state, splits), gpt.pictures(TINY, learner, state, splits)):
        figures["text"].savefig(io.BytesIO())  # a missing glyph would warn


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 100}, "--vocabulary 100: expected at least 256, one per byte"),
        ({"context": 1}, "--context 1: expected at least 2 tokens"),
        ({"dropout": 1.0}, "--dropout 1.0: expected a rate from 0 to less than 1"),
        ({"accumulate": 3}, "--accumulate 3: a batch of 8 windows can't be split into so many equal parts"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"windows": 0}, "--windows 0 --batch-size 8: expected at least 1 each"),
    ],
)
def test_an_invalid_config_is_an_error_of_one_line(options: dict[str, Any], message: str) -> None:
    for function in (gpt.build, gpt.data):
        with pytest.raises(InvalidArgument) as raised:
            function(replace(TINY, **options))
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_text_longer_than_the_context_is_an_error() -> None:
    state = gpt.build(TINY).init()
    with pytest.raises(InvalidArgument, match=r"14 tokens after a prompt of 3; expected .* the context of 16 in all"):
        gpt.generate(TINY, state, jnp.zeros((1, 3), jnp.int32), jax.random.key(0), 14)

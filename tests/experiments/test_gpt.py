"""The GPT: caching, computing anew, cutting into parts and many devices change nothing."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import research
from experiments import _text, gpt
from experiments.gpt import Config, Preset
from research import Refused, parallel
from research.objective import forward
from research.transforms import equations

pytestmark = pytest.mark.slow
TINY = Config(batch_size=8, windows=64, seed=3)
CONTEXT = 16


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest preset smaller still, trained by SGD: Adam would make much of a rounding."""
    monkeypatch.setitem(gpt.PRESETS, "1m", Preset(2, 32, 4, CONTEXT, 256, "float32", False, 3e-3))
    monkeypatch.setattr(gpt, "optimizer", lambda config: keras.optimizers.SGD(0.1))


def stirred(state: research.State) -> research.State:
    """Weights that all matter: biases that are not 0, norms that are not 1."""
    keys = jax.random.split(jax.random.key(7), len(state.trainable))
    noise = [0.1 * jax.random.normal(key, w.shape) for key, w in zip(keys, state.trainable, strict=True)]
    return state._replace(trainable=[w + n for w, n in zip(state.trainable, noise, strict=True)])


def trained(config: Config, steps: int = 1, axes: dict[str, int] | None = None) -> tuple[research.State, list[float]]:
    """The state after so many steps, and the loss of each."""
    if axes is None:
        learner = gpt.build(config)
        state = learner.init()
    else:
        learner, state = parallel.born(lambda: gpt.build(config), parallel.mesh(**axes))
    data, train, losses = gpt.data(config)["train"], jax.jit(learner.train), []
    for step in range(steps):
        state, logs = train(learner.reset(state), data.batch(step))
        losses.append(float(logs["loss"]))
    return state, losses


def assert_alike(found: research.State, wanted: research.State) -> None:
    for name, a, b in zip(gpt.build(TINY).names.trainable, found.trainable, wanted.trainable, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=name)


def primitives(function: Any, *args: Any) -> list[str]:
    return [equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)]


# --- the network


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
def test_presets_have_as_many_parameters_as_they_say(
    preset: Any, vocabulary: int | None, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As counted by those who trained GPT-2; otherwise 12 width^2 + 13 width a layer, and vectors of tokens and positions."""
    monkeypatch.undo()
    _, shapes = research.abstract(lambda: gpt.build(Config(preset=preset, vocabulary=vocabulary)))
    found = gpt.PRESETS[preset]
    width, vectors = found.width, (vocabulary or found.vocabulary) + found.context
    assert research.parameters(shapes) == parameters == found.layers * (12 * width**2 + 13 * width) + (vectors + 2) * width


def test_no_token_sees_a_later_one_and_all_see_each_earlier_one() -> None:
    learner = gpt.build(TINY)
    state, tokens = stirred(learner.init()), np.arange(2 * CONTEXT, dtype=np.int32).reshape(2, CONTEXT)
    before = learner.predict(state, research.Batch(tokens))
    for place in (0, 5, CONTEXT - 1):
        other = tokens.copy()
        other[:, place] += 100
        changed = np.abs(np.asarray(learner.predict(state, research.Batch(other)) - before)).max((0, 2))
        assert (changed[:place] == 0).all()
        assert (changed[place:] > 1e-5).all()


def test_half_precision_keeps_weights_and_logits_whole_and_leaks_into_nothing() -> None:
    config = replace(TINY, dtype_policy="mixed_bfloat16", remat=True)
    learner = gpt.build(config)
    state, batch = stirred(learner.init()), gpt.data(config)["train"].batch(0)
    after, logs = jax.jit(learner.train)(state, batch)
    assert {leaf.dtype for leaf in after.trainable} == {jnp.dtype("float32")}
    assert np.isfinite(float(logs["loss"]))
    logits = learner.predict(state, batch)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (np.asarray(rounded) != np.asarray(logits)).mean() > 0.9  # they were never in half precision
    program = jax.make_jaxpr(learner.train)(state, batch).jaxpr
    products = [e.invars[0].aval.dtype for e in equations(program) if e.primitive.name == "dot_general"]
    assert products.count(jnp.dtype("bfloat16")) > len(products) / 2
    assert keras.config.dtype_policy().name == "float32"
    whole = gpt.build(TINY).predict(state, batch)
    np.testing.assert_allclose(logits, whole, atol=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_computed_again_on_the_way_back_is_the_same(dropout: float) -> None:
    kept, anew = (replace(TINY, remat=remat, dropout=dropout) for remat in (False, True))
    state, losses = trained(kept, 3)
    found, again = trained(anew, 3)
    np.testing.assert_allclose(again, losses, rtol=1e-6)
    assert_alike(found, state)
    batch = gpt.data(TINY)["train"].batch(0)
    counts = []
    for config in (kept, anew):
        learner = gpt.build(config)
        counts.append(primitives(learner.train, learner.init(), batch).count("remat2"))
    assert counts[0] == 0
    assert counts[1] >= 2  # one for each block


def test_dropout_draws_anew_at_each_step_and_not_in_evaluation() -> None:
    config = replace(TINY, dropout=0.3, remat=True)
    learner = gpt.build(config)
    batch, state = gpt.data(config)["train"].batch(0), learner.init()
    after, first = jax.jit(learner.train)(state, batch)
    _, second = jax.jit(learner.train)(state._replace(non_trainable=after.non_trainable), batch)
    _, evaluated = jax.jit(learner.evaluate)(state, batch)
    plain = gpt.build(TINY)
    _, whole = jax.jit(plain.evaluate)(plain.init()._replace(trainable=state.trainable), batch)
    assert len({float(logs["loss"]) for logs in (first, second, evaluated)}) == 3
    moved = [bool((a != b).any()) for a, b in zip(after.non_trainable, state.non_trainable, strict=True)]
    assert moved == [True] * 3  # the seeds of what goes into the first block, and of each block
    assert float(evaluated["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)


def test_what_is_left_out_is_made_up_for_by_the_rest() -> None:
    ones, keys = jnp.ones((100, 100)), jax.random.split(jax.random.key(0))
    found = np.asarray(gpt.dropped(ones, 0.25, keys, 0))
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    assert found.mean() == pytest.approx(1, abs=0.02)
    assert (found != gpt.dropped(ones, 0.25, keys, 1)).any()
    assert gpt.dropped(ones, 0.25, None, 0) is ones


@pytest.mark.parametrize("remat", [False, True])
def test_a_batch_in_parts_gives_what_the_whole_one_gives(remat: bool) -> None:
    state, losses = trained(replace(TINY, sums="keras"), 3)
    found, in_parts = trained(replace(TINY, accumulate=2, remat=remat), 3)
    np.testing.assert_allclose(in_parts, losses, rtol=1e-6)
    assert_alike(found, state)
    learner = gpt.build(replace(TINY, accumulate=2, remat=remat))
    program = jax.make_jaxpr(learner.train)(learner.init(), gpt.data(TINY)["train"].batch(0)).jaxpr
    assert [e.params["length"] for e in equations(program) if e.primitive.name == "scan"] == [2]


def test_a_saved_network_computes_the_same(tmp_path: Path) -> None:
    config = replace(TINY, dropout=0.1, remat=True, dtype_policy="mixed_bfloat16")
    learner = gpt.build(config)
    state, batch = stirred(learner.init()), gpt.data(config)["val"].batch(0)
    model = gpt.models(config, state)["model"]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(batch.x), model(batch.x))
    np.testing.assert_allclose(loaded(batch.x), learner.predict(state, batch), atol=1e-6)


# --- training


def test_the_rate_rises_and_falls_and_biases_and_norms_do_not_decay(monkeypatch: pytest.MonkeyPatch) -> None:
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
    decayed, _ = trained(replace(config, weight_decay=10.0))
    plain, _ = trained(replace(config, weight_decay=0.0))
    for name, a, b in zip(gpt.build(config).names.trainable, decayed.trainable, plain.trainable, strict=True):
        stays = name.endswith(("bias", "gamma", "beta"))
        assert bool((np.asarray(a) == np.asarray(b)).all()) == stays, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{}, {"dropout": 0.2, "remat": True, "accumulate": 2, "context": 8}],
    ids=["plain", "dropout, remat, eight tokens a device at once"],
)
def test_on_a_mesh_it_trains_like_on_one_device(changed: dict[str, Any]) -> None:
    config = replace(TINY, **changed)
    _, losses = trained(config, 20)
    _, found = trained(config, 20, {"data": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    assert losses[-1] < losses[0] - 0.1


def test_on_a_mesh_heads_words_and_wide_layers_are_split() -> None:
    mesh = parallel.mesh(data=2, fsdp=2, tensor=2)
    learner, shapes = research.abstract(lambda: gpt.build(replace(TINY, remat=True)))
    placed = parallel.shardings(learner.names, shapes, mesh, parallel.tensor)
    specs = {
        name.partition("/")[2] if name.startswith("block/") else name: each.spec
        for name, each in zip(learner.names.trainable, placed.trainable, strict=True)
    }
    for name in ("query", "key", "value"):
        assert specs[f"{name}/kernel"] == P("fsdp", "tensor", None)
    assert specs["attention_output/kernel"] == P("tensor", None, "fsdp")
    assert (specs["widen/kernel"], specs["narrow/kernel"]) == (P("fsdp", "tensor"), P("tensor", "fsdp"))
    assert specs["vocabulary/embeddings"] == P("tensor", "fsdp")


# --- the text it writes


@pytest.mark.parametrize("lengths", [[1] * CONTEXT, [5, 1, 1, 9], [CONTEXT]])
def test_what_is_kept_of_earlier_tokens_gives_the_logits_of_the_whole(lengths: list[int]) -> None:
    learner, model = gpt.build(TINY), gpt.hollow(TINY)
    state = stirred(learner.init())
    tokens = jax.random.randint(jax.random.key(1), (3, CONTEXT), 0, 256, jnp.int32)
    whole = forward(gpt.network(TINY), state, tokens)
    assert float(jnp.std(whole)) > 0.3
    cache, start = gpt.empty(TINY, 3), 0
    for length in lengths:
        logits, cache = gpt.extended(model, state, cache, tokens[:, start : start + length], jnp.int32(start))
        np.testing.assert_allclose(logits, whole[:, start : start + length], rtol=0, atol=1e-5)
        start += length


def test_the_likeliest_text_is_that_of_a_network_without_a_cache() -> None:
    learner = gpt.build(TINY)
    state, given, length = stirred(learner.init()), 3, CONTEXT - 3
    prompt = jax.random.randint(jax.random.key(2), (4, given), 0, 256, jnp.int32)
    text = np.zeros((4, CONTEXT), np.int32)
    text[:, :given] = prompt
    whole = jax.jit(lambda tokens: learner.predict(state, research.Batch(tokens)))
    for place in range(given, CONTEXT):
        text[:, place] = np.asarray(whole(text))[:, place - 1].argmax(-1)
    found = gpt.generate(TINY, state, prompt, jax.random.key(0), length, 0.0)
    np.testing.assert_array_equal(found, text[:, given:])
    assert len(np.unique(found)) > 4


def test_a_token_costs_one_position_not_the_text_so_far() -> None:
    learner = gpt.build(TINY)
    prompt = jnp.zeros((2, 4), jnp.int32)
    program = jax.make_jaxpr(lambda state: gpt.generate(TINY, state, prompt, jax.random.key(0), 12))(learner.init())
    (loop,) = [
        e for e in equations(program.jaxpr) if e.primitive.name == "scan" and len(list(equations(e.params["jaxpr"].jaxpr))) > 50
    ]
    products = [e.outvars[0].aval for e in equations(loop.params["jaxpr"].jaxpr) if e.primitive.name == "dot_general"]
    assert max(product.size for product in products) == 2 * 256  # the logits of one token of each text


def test_tokens_are_drawn_as_likely_as_the_network_says() -> None:
    learner = gpt.build(TINY)
    state, many, temperature = stirred(learner.init()), 4000, 0.7
    prompt = jnp.full((many, 2), 9, jnp.int32)
    drawn = np.asarray(gpt.generate(TINY, state, prompt, jax.random.key(0), 2, temperature))
    tokens = jnp.zeros((1, CONTEXT), jnp.int32).at[:, :2].set(9)
    told = np.asarray(jax.nn.log_softmax(forward(gpt.network(TINY), state, tokens)[0, 1] / temperature))
    of_drawn = told[drawn[:, 0]]
    expected = float((np.exp(told) * told).sum())
    assert abs(of_drawn.mean() - expected) < 4 * of_drawn.std() / many**0.5
    again, other = (gpt.generate(TINY, state, prompt, jax.random.key(seed), 2, temperature) for seed in (0, 1))
    np.testing.assert_array_equal(again, drawn)
    assert (np.asarray(other) != drawn).any()


def test_it_goes_on_when_a_context_is_full_and_draws_what_can_be_read() -> None:
    learner, splits = gpt.build(TINY), gpt.data(TINY)
    state = learner.init()  # writes any byte there is
    prompt = _text.passage(CONTEXT // 2, 0)[None]
    text = _text.written(gpt.writer(TINY, state), prompt, CONTEXT, 30)
    assert text.shape == (1, CONTEXT // 2 + 30)
    np.testing.assert_array_equal(text[:, : CONTEXT // 2], prompt)
    last = gpt.generate(TINY, state, text[:, 16:24], jax.random.split(jax.random.key(0), 4)[2], 8, _text.TEMPERATURE)
    np.testing.assert_array_equal(text[:, 24:32], last)
    for drawn in (gpt.each_epoch(TINY, learner, state, splits), gpt.pictures(TINY, learner, state, splits)):
        drawn["text"].savefig(io.BytesIO())  # a glyph that is missing would warn


# --- what does not fit


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"vocabulary": 100}, "--vocabulary 100: the text is bytes, expected 256 at least"),
        ({"context": 1}, "--context 1: expected 2 tokens at least"),
        ({"dropout": 1.0}, "--dropout 1.0: expected a share from 0 to less than 1"),
        ({"accumulate": 3}, "--accumulate 3: a batch of 8 windows can't be cut into so many equal parts"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"windows": 0}, "--windows 0 --batch-size 8: expected 1 at least of both"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_one_line(wrong: dict[str, Any], said: str) -> None:
    for function in (gpt.build, gpt.data):
        with pytest.raises(Refused) as refusal:
            function(replace(TINY, **wrong))
        assert said in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_text_longer_than_the_context_is_refused() -> None:
    state = gpt.build(TINY).init()
    with pytest.raises(Refused, match=r"14 tokens after 3; expected .* no more than the context of 16 in all"):
        gpt.generate(TINY, state, jnp.zeros((1, 3), jnp.int32), jax.random.key(0), 14)

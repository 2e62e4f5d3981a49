"""Three inputs, two outputs by name, weights by name, and a head put on what was trained: Keras' numbers and nothing leaked."""

import ast
import json
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

import research
from experiments import tickets
from experiments.tickets import DEPARTMENTS, LENGTHS, TAGS, VOCABULARY, Config, Ticket

pytestmark = pytest.mark.slow

SIZE = 8


def batch(config: Config, seed: int = 0) -> research.Batch:
    """Random tickets of random lengths, as `config` wants them."""
    rng = np.random.default_rng(seed)
    x: dict[str, Any] = {"tags": rng.integers(0, 2, (SIZE, len(TAGS))).astype("float32")}
    for part, length in LENGTHS.items():
        ids = rng.integers(1, VOCABULARY, (SIZE, length)).astype("int32")
        x[part] = np.where(np.arange(length) < rng.integers(0, length + 1, (SIZE, 1)), ids, 0).astype("int32")
    y = {
        "priority": rng.integers(0, 2, (SIZE, 1)).astype("int32"),
        "department": rng.integers(0, len(DEPARTMENTS), SIZE).astype("int32"),
        "difficulty": rng.integers(0, 3, SIZE).astype("int32"),
    }
    y = {head: y[head] for head in tickets.HEADS[config.head]}
    weights = {head: rng.uniform(0.2, 2, SIZE).astype("float32") for head in y}
    return research.Batch(x, y, weights if config.balanced else None)


def after(config: Config, steps: int = 3) -> research.State:
    learner = tickets.build(config)
    state, step = learner.init(), jax.jit(learner.train)
    for i in range(steps):
        state, _ = step(state, batch(config, i))
    return state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a finished run of the two outputs."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"experiment": "tickets", "config": {"head": "tickets"}}))
    config = Config(units=8)
    keras.utils.set_random_seed(5)
    tickets.network(config).save(directory / "model.keras")
    return directory


@pytest.mark.parametrize("balanced", [True, pytest.param(False)])
def test_three_steps_equal_keras_train_on_batch_bit_for_bit(balanced: bool) -> None:
    config = Config(units=8, balanced=balanced, batch_size=SIZE)
    keras.utils.set_random_seed(config.seed)
    model = tickets.network(config)
    model.compile(
        optimizer=keras.optimizers.Adam(config.learning_rate),
        loss={
            "priority": keras.losses.BinaryCrossentropy(from_logits=True),
            "department": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        loss_weights={"priority": 0.5, "department": 1.0},
    )
    for i in range(3):
        each = batch(config, i)
        model.train_on_batch(each.x, each.y, sample_weight=each.sample_weight)
    state = after(config)
    for got, wanted in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(got, wanted.value, err_msg=wanted.path)
    for got, wanted in zip(state.optimizer, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(got, wanted.value, err_msg=wanted.path)


def test_a_logit_above_zero_is_a_yes() -> None:
    config = Config(units=8)
    learner, each = tickets.build(config), batch(config)
    each.x["tags"] *= np.random.default_rng(1).normal(size=each.x["tags"].shape).astype("float32")
    state = learner.init()
    _, logs = jax.jit(learner.evaluate)(state, each)
    outputs = jax.jit(learner.predict)(state, each)
    assert ((outputs["priority"] > 0) & (outputs["priority"] < 0.5)).any()  # no, were it a probability
    for head, right in (
        ("priority", (np.asarray(outputs["priority"]) > 0) == each.y["priority"]),
        ("department", np.asarray(outputs["department"]).argmax(-1) == each.y["department"]),
    ):
        assert float(logs[f"{head}_accuracy"]) == np.mean(right)


def test_padding_says_nothing_wherever_it_stands() -> None:
    config = Config(units=8)
    learner, each = tickets.build(config), batch(config)
    shifted = dict(each.x)
    for part, length in LENGTHS.items():
        # The words of a row, kept in order, behind the padding that stood behind them.
        rows = each.x[part]
        shifted[part] = np.take_along_axis(rows, np.argsort(rows > 0, axis=1, kind="stable"), axis=1)
        assert (shifted[part][:, 0] == 0).any()
        assert shifted[part].shape == (SIZE, length)
    state = learner.init()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        learner.predict(state, each),
        learner.predict(state, each._replace(x=shifted)),
    )


@pytest.mark.parametrize("frozen", [True, pytest.param(False)])
def test_a_frozen_network_keeps_every_bit_and_its_answers_while_a_new_head_learns(run: Path, frozen: bool) -> None:
    config = Config(head="difficulty", trained=run, frozen=frozen, batch_size=SIZE)
    old = keras.saving.load_model(run / "model.keras")
    new = tickets.models(config, after(config))["model"]
    born = tickets.models(config, tickets.build(config).init())["model"]
    assert set(new.output) == {*old.output, "difficulty"}
    for layer in old.layers:
        for before, now in zip(layer.get_weights(), new.get_layer(layer.name).get_weights(), strict=True):
            assert np.array_equal(before, now) == frozen, layer.name
    for before, now in zip(born.get_layer("difficulty").weights, new.get_layer("difficulty").weights, strict=True):
        assert not np.array_equal(before.value, now.value), now.path
    x = batch(config).x
    same = [np.array_equal(answer, new.predict_on_batch(x)[head]) for head, answer in old.predict_on_batch(x).items()]
    assert same == [frozen, frozen]


def test_a_config_read_back_from_json_builds_the_same(run: Path) -> None:
    config = Config(head="difficulty", trained=run)
    read = Config(head="difficulty", trained=str(run))  # type: ignore[arg-type]
    jax.tree.map(np.testing.assert_array_equal, tickets.build(config).init(), tickets.build(read).init())


def test_a_head_is_built_from_shapes_alone_too(run: Path) -> None:
    config = Config(head="difficulty", trained=run)
    learner, shapes = research.abstract(lambda: tickets.build(config))
    assert [leaf.shape for leaf in shapes.trainable] == [(8 + 8 + len(TAGS), 3), (3,)]
    assert learner.names.trainable == ["difficulty/kernel", "difficulty/bias"]


def recorded(directory: Path, experiment: str, head: str | None) -> None:
    config = {} if head is None else {"head": head}
    (directory / "config.json").write_text(json.dumps({"experiment": experiment, "config": config}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "config.json").unlink(), "it is no run's directory"),
        (lambda run: (run / "config.json").write_text("[]"), "it is no run's directory"),
        (lambda run: recorded(run, "digits", None), "it is a run of digits, expected "),
        (lambda run: recorded(run, "tickets", "difficulty"), "it is a run of tickets --head difficulty, expected "),
        (lambda run: (run / "model.keras").unlink(), "it holds no model.keras"),
        (lambda run: (run / "model.keras").write_bytes(b"PK\x03\x04"), "its model.keras can't be read"),
    ],
)
def test_what_a_head_can_not_stand_on_is_refused_in_one_line(run: Path, spoil: Any, said: str) -> None:
    spoil(run)
    with pytest.raises(research.Refused) as refused:
        tickets.build(Config(head="difficulty", trained=run))
    assert str(refused.value).startswith(f"--trained {run}: {said}")
    assert "\n" not in str(refused.value)


def test_a_trained_run_is_asked_for_with_a_head_and_refused_without_one(run: Path) -> None:
    with pytest.raises(research.Refused, match="--trained is missing, expected the directory of a finished run"):
        tickets.build(Config(head="difficulty"))
    with pytest.raises(research.Refused, match="only --head difficulty goes on from a run"):
        tickets.build(Config(trained=run))


def made_up(monkeypatch: pytest.MonkeyPatch, **held_out: Ticket) -> None:
    """Eight tickets of two departments to train on, one in each other split."""
    train = [Ticket("jax" if i < 6 else "scipy", f"alpha beta word{'abcdefgh'[i]}", "gamma", frozenset(), i, i) for i in range(8)]
    other = Ticket("keras", "alpha unheard", "gamma gamma", frozenset(), 0, 10_000)
    monkeypatch.setattr(tickets, "tickets", lambda: {"train": train, "val": [other], "test": [held_out.get("test", other)]})


def test_held_out_tickets_change_neither_the_words_nor_the_thirds_nor_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(head="difficulty")
    made_up(monkeypatch)
    before = tickets.examples(config)
    made_up(monkeypatch, test=Ticket("jax", "unheard unheard unheard beta", "", frozenset(), 5, 0))
    now = tickets.examples(config)
    jax.tree.map(np.testing.assert_array_equal, before["train"], now["train"])
    x, y = now["test"]
    assert x["title"][0, :5].tolist() == [1, 1, 1, before["train"][0]["title"][0, 1], 0]
    assert y["difficulty"].tolist() == [0]


def test_every_department_weighs_the_same_in_training_and_nothing_else_is_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch)
    found = tickets.examples(Config())
    assert [len(found[split]) for split in ("train", "val", "test")] == [3, 2, 2]
    _, y, weights = found["train"]
    sums = {int(d): float(weights["department"][y["department"] == d].sum()) for d in np.unique(y["department"])}
    assert list(sums.values()) == pytest.approx([4.0, 4.0])  # of eight tickets
    assert (weights["priority"] == 1).all()
    assert [len(split) for split in tickets.examples(Config(balanced=False)).values()] == [2, 2, 2]


def test_words_are_numbered_by_how_often_they_come_and_texts_cut_and_padded() -> None:
    numbers = tickets.vocabulary(["the mean of the array", "The Mean, by numpy", "the rest"])
    assert list(numbers.items())[:2] == [("the", 2), ("mean", 3)]
    assert "numpy" not in numbers
    assert tickets.numbered(["the mean mean the", "unknown"], numbers, 3).tolist() == [[2, 3, 3], [1, 0, 0]]


def test_packages_that_head_their_sections_differently_get_the_same_tags() -> None:
    headed = {
        "underlined": ("Parameters\n    ----------\n    x", "Returns\n    -------\n    y", "See Also\n    --------\n    g"),
        "with colons": ("Args:\n        x", "Returns:\n        y", "See also:\n        g"),
    }
    found = []
    for sections in headed.values():
        text = "\n\n    ".join(("Sum of\n    all.", "Of what\n    there is.", *sections))
        function = ast.parse(f'def f(x, /, y, *rest, z=1):\n    """{text}\n    """\n    a = 1\n    return a').body[0]
        found.append(tickets._ticket("jax", function))
    tags = frozenset({"parameters", "returns", "see also"})
    assert found == [Ticket("jax", "Sum of all.", "Of what there is.", tags, 3, 2)] * 2


def test_no_ticket_is_in_two_splits_and_they_are_the_same_whenever_gathered() -> None:
    splits = tickets.tickets()
    assert {name: len(held) for name, held in splits.items()} == tickets.SIZES
    texts = [{(t.title, t.body) for t in held} for held in splits.values()]
    assert len(set.union(*texts)) == sum(tickets.SIZES.values())
    assert tickets.tickets.__wrapped__() == splits

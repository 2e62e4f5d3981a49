"""Three inputs, outputs and weights by name, and a head added to a trained network equal Keras; no test data leaks."""

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
    """Random tickets of random lengths, with the targets and weights of `config`."""
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


def train(config: Config, steps: int = 3) -> research.State:
    learner = tickets.build(config)
    state, step = learner.init(), jax.jit(learner.train)
    for i in range(steps):
        state, _ = step(state, batch(config, i))
    return state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a finished run with two outputs."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"experiment": "tickets", "config": {"head": "tickets"}}))
    config = Config(units=8)
    keras.utils.set_random_seed(5)
    tickets.network(config).save(directory / "model.keras")
    return directory


@pytest.mark.sample(2)
@pytest.mark.parametrize("balanced", [True, False])
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
        x, y, sample_weight, _ = batch(config, i)
        model.train_on_batch(x, y, sample_weight=sample_weight)
    state = train(config)
    for value, variable in zip(state.trainable, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(value, variable.value, err_msg=variable.path)
    for value, variable in zip(state.optimizer, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(value, variable.value, err_msg=variable.path)


def test_accuracy_of_the_priority_counts_a_logit_above_zero_as_positive() -> None:
    config = Config(units=8)
    learner, tickets_batch = tickets.build(config), batch(config)
    tags = tickets_batch.x["tags"]
    tags *= np.random.default_rng(1).normal(size=tags.shape).astype("float32")
    state = learner.init()
    _, logs = jax.jit(learner.evaluate)(state, tickets_batch)
    outputs = jax.jit(learner.predict)(state, tickets_batch)
    assert ((outputs["priority"] > 0) & (outputs["priority"] < 0.5)).any()  # negative with the threshold of a probability
    for head, correct in (
        ("priority", (np.asarray(outputs["priority"]) > 0) == tickets_batch.y["priority"]),
        ("department", np.asarray(outputs["department"]).argmax(-1) == tickets_batch.y["department"]),
    ):
        assert float(logs[f"{head}_accuracy"]) == np.mean(correct)


def test_an_lstm_that_does_not_support_masks_uses_them_and_nothing_warns(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras 3.16 says so of every recurrent layer, and warns where one gets a mask. Here Keras' class is changed like that."""
    x = batch(Config()).x
    plain = tickets.network(Config(units=8))
    initialize = keras.layers.LSTM.__init__

    def without_masks(self: Any, *args: Any, **options: Any) -> None:
        initialize(self, *args, **options)
        self.supports_masking = False

    monkeypatch.setattr(keras.layers.LSTM, "__init__", without_masks)
    model = tickets.network(Config(units=8))
    model.set_weights(plain.get_weights())
    np.testing.assert_array_equal(model(x)["priority"], plain(x)["priority"])
    loaded = tickets.load_trained(Config(trained=run))
    loaded.set_weights(plain.get_weights())
    np.testing.assert_array_equal(loaded(x)["priority"], plain(x)["priority"])


def test_padding_changes_nothing_before_or_behind_the_words() -> None:
    config = Config(units=8)
    learner, padded_behind = tickets.build(config), batch(config)
    padded_before = dict(padded_behind.x)
    for part, length in LENGTHS.items():
        # The same words in the same order, with the padding in front of them.
        rows = padded_behind.x[part]
        padded_before[part] = np.take_along_axis(rows, np.argsort(rows > 0, axis=1, kind="stable"), axis=1)
        assert (padded_before[part][:, 0] == 0).any()
        assert padded_before[part].shape == (SIZE, length)
    state = learner.init()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        learner.predict(state, padded_behind),
        learner.predict(state, padded_behind._replace(x=padded_before)),
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_network_keeps_its_weights_and_predictions_bit_for_bit_while_a_new_head_learns(run: Path, frozen: bool) -> None:
    config = Config(head="difficulty", trained=run, frozen=frozen, batch_size=SIZE)
    old = tickets.load_trained(Config(trained=run))
    new = tickets.models(config, train(config))["model"]
    initial = tickets.models(config, tickets.build(config).init())["model"]
    assert set(new.output) == {*old.output, "difficulty"}
    for layer in old.layers:
        for before, after in zip(layer.get_weights(), new.get_layer(layer.name).get_weights(), strict=True):
            assert np.array_equal(before, after) == frozen, layer.name
    for before, after in zip(initial.get_layer("difficulty").weights, new.get_layer("difficulty").weights, strict=True):
        assert not np.array_equal(before.value, after.value), after.path
    x = batch(config).x
    equal = [np.array_equal(output, new.predict_on_batch(x)[head]) for head, output in old.predict_on_batch(x).items()]
    assert equal == [frozen, frozen]


def test_a_config_read_from_json_builds_the_same_learner(run: Path) -> None:
    config = Config(head="difficulty", trained=run)
    from_json = Config(head="difficulty", trained=str(run))  # type: ignore[arg-type]
    jax.tree.map(np.testing.assert_array_equal, tickets.build(config).init(), tickets.build(from_json).init())


def test_a_head_can_be_built_abstractly(run: Path) -> None:
    config = Config(head="difficulty", trained=run)
    learner, shapes = research.init_abstract(lambda: tickets.build(config))
    assert [leaf.shape for leaf in shapes.trainable] == [(8 + 8 + len(TAGS), 3), (3,)]
    assert learner.names.trainable == ["difficulty/kernel", "difficulty/bias"]


def write_config(directory: Path, experiment: str, head: str | None) -> None:
    config = {} if head is None else {"head": head}
    (directory / "config.json").write_text(json.dumps({"experiment": experiment, "config": config}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "not the directory of a run"),
        (lambda run: (run / "config.json").write_text("[]"), "not the directory of a run"),
        (lambda run: write_config(run, "digits", None), "a run of digits, expected "),
        (lambda run: write_config(run, "tickets", "difficulty"), "a run of tickets --head difficulty, expected "),
        (lambda run: (run / "model.keras").unlink(), "it has no model.keras"),
        (lambda run: (run / "model.keras").write_bytes(b"PK\x03\x04"), "its model.keras can't be read"),
    ],
)
def test_a_run_without_a_usable_trained_network_is_an_error_of_one_line(run: Path, damage: Any, message: str) -> None:
    damage(run)
    with pytest.raises(research.InvalidArgument) as raised:
        tickets.build(Config(head="difficulty", trained=run))
    assert str(raised.value).startswith(f"--trained {run}: {message}")
    assert "\n" not in str(raised.value)


def test_the_difficulty_head_needs_a_trained_run_and_the_others_accept_none(run: Path) -> None:
    with pytest.raises(research.InvalidArgument, match="--trained is missing, expected the directory of a finished run"):
        tickets.build(Config(head="difficulty"))
    with pytest.raises(research.InvalidArgument, match="only --head difficulty starts from a run"):
        tickets.build(Config(trained=run))


def replace_tickets(monkeypatch: pytest.MonkeyPatch, test: Ticket | None = None) -> None:
    """Eight training tickets of two departments, and one ticket in each other split."""
    train = [Ticket("jax" if i < 6 else "scipy", f"alpha beta word{'abcdefgh'[i]}", "gamma", frozenset(), i, i) for i in range(8)]
    val = Ticket("keras", "alpha unheard", "gamma gamma", frozenset(), 0, 10_000)
    monkeypatch.setattr(tickets, "load_tickets", lambda: {"train": train, "val": [val], "test": [test or val]})


def test_vocabulary_thirds_and_weights_do_not_depend_on_test_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(head="difficulty")
    replace_tickets(monkeypatch)
    before = tickets.load_examples(config)
    replace_tickets(monkeypatch, test=Ticket("jax", "unheard unheard unheard beta", "", frozenset(), 5, 0))
    after = tickets.load_examples(config)
    jax.tree.map(np.testing.assert_array_equal, before["train"], after["train"])
    x, y = after["test"]
    assert x["title"][0, :5].tolist() == [1, 1, 1, before["train"][0]["title"][0, 1], 0]
    assert y["difficulty"].tolist() == [0]


def test_only_training_is_weighted_and_each_department_has_the_same_sum_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_tickets(monkeypatch)
    splits = tickets.load_examples(Config())
    assert [len(splits[split]) for split in ("train", "val", "test")] == [3, 2, 2]
    _, y, weights = splits["train"]
    sums = {int(d): float(weights["department"][y["department"] == d].sum()) for d in np.unique(y["department"])}
    assert list(sums.values()) == pytest.approx([4.0, 4.0])  # of eight tickets
    assert (weights["priority"] == 1).all()
    assert [len(arrays) for arrays in tickets.load_examples(Config(balanced=False)).values()] == [2, 2, 2]


def test_word_ids_are_ordered_by_frequency_and_texts_are_cut_and_padded() -> None:
    ids = tickets.vocabulary(["the mean of the array", "The Mean, by numpy", "the rest"])
    assert list(ids.items())[:2] == [("the", 2), ("mean", 3)]
    assert "numpy" not in ids
    assert tickets.word_ids(["the mean mean the", "unknown"], ids, 3).tolist() == [[2, 3, 3], [1, 0, 0]]


def test_docstring_styles_of_different_packages_give_the_same_tags() -> None:
    styles = {
        "underlined": ("Parameters\n    ----------\n    x", "Returns\n    -------\n    y", "See Also\n    --------\n    g"),
        "with colons": ("Args:\n        x", "Returns:\n        y", "See also:\n        g"),
    }
    parsed = []
    for sections in styles.values():
        text = "\n\n    ".join(("Sum of\n    all.", "Of what\n    there is.", *sections))
        function = ast.parse(f'def f(x, /, y, *rest, z=1):\n    """{text}\n    """\n    a = 1\n    return a').body[0]
        parsed.append(tickets._ticket("jax", function))
    tags = frozenset({"parameters", "returns", "see also"})
    assert parsed == [Ticket("jax", "Sum of all.", "Of what there is.", tags, 3, 2)] * 2


def test_no_ticket_is_in_two_splits_and_loading_again_gives_the_same_tickets() -> None:
    splits = tickets.load_tickets()
    assert {split: len(members) for split, members in splits.items()} == tickets.SIZES
    texts = [{(t.title, t.body) for t in members} for members in splits.values()]
    assert len(set.union(*texts)) == sum(tickets.SIZES.values())
    assert tickets.load_tickets.__wrapped__() == splits

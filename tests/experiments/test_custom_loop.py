"""The loop by hand and the library's loop compute the same."""

import jax
import numpy as np
import pytest

import research
from experiments import custom_loop

pytestmark = pytest.mark.slow

LOG_EVERY = 4


@pytest.mark.parametrize("steps", [None, 17], ids=["two epochs", "stopped in the second"])
def test_both_loops_give_the_same_weights_and_logs_bit_for_bit(steps: int | None) -> None:
    config = custom_loop.Config(units=16, epochs=2, steps=steps, batch_size=128)
    splits, learner = custom_loop.data(config), custom_loop.build(config)
    assert splits["train"].steps_per_epoch == 12  # the last batch is shorter
    state, history = custom_loop.train_by_hand(config, learner, splits, log_every=LOG_EVERY)
    entries: list[research.LogEntry] = []
    expected, last = research.train(
        learner,
        splits["train"],
        epochs=config.epochs,
        steps=steps,
        log_every=LOG_EVERY,
        log=entries.append,
        evaluations={"val": splits["val"]},
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert custom_loop.largest_difference(state, expected) == 0.0
    assert history == [entry for entry in entries if entry.split == "val" or entry.step % LOG_EVERY == 0]
    assert history[-1].values == {name: last[f"val_{name}"] for name in ("loss", "accuracy")}
    assert custom_loop.results(config, learner, expected, splits) == {"largest_difference": 0.0}


def test_metrics_are_reset_before_each_epoch_and_each_validation() -> None:
    config = custom_loop.Config(units=16, epochs=2, batch_size=128, learning_rate=0.0)
    splits, learner = custom_loop.data(config), custom_loop.build(config)
    _, history = custom_loop.train_by_hand(config, learner, splits, log_every=12)
    (train_1, val_1), (train_2, val_2) = history[:2], history[2:]
    assert [entry.split for entry in history] == ["train", "val"] * 2
    assert val_1.values == val_2.values == research.evaluate(learner, splits["val"], learner.init())
    # The weights do not change; the order of the images does.
    assert train_1.values == pytest.approx(train_2.values, rel=1e-5)


def test_every_log_is_reported_as_a_line() -> None:
    config = custom_loop.Config(units=8, epochs=1, batch_size=479)
    lines: list[str] = []
    _, history = custom_loop.train_by_hand(config, custom_loop.build(config), custom_loop.data(config), 2, lines.append)
    assert [(entry.step, entry.split) for entry in history] == [(2, "train"), (3, "val")]
    assert [line.split()[:5] for line in lines] == [["epoch", "1", "step", "2", "train"], ["epoch", "1", "step", "3", "val"]]

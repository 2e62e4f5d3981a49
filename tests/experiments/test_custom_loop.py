"""The loop by hand and the library's are the same fold."""

import dataclasses

import jax
import numpy as np
import pytest

import research
from experiments import custom_loop

pytestmark = pytest.mark.slow

EVERY = 4


@pytest.mark.parametrize("steps", [None, 17], ids=["two epochs", "stopped in the second"])
def test_by_hand_and_by_the_library_give_the_same_weights_and_logs_bit_for_bit(steps: int | None) -> None:
    config = custom_loop.Config(units=16, epochs=2, steps=steps, batch_size=128)
    splits, learner = custom_loop.data(config), custom_loop.build(config)
    assert splits["train"].steps_per_epoch == 12  # the last of them shorter
    state, history = custom_loop.by_hand(config, learner, splits, log_every=EVERY)
    entries: list[research.Entry] = []
    wanted, last = research.train(
        learner,
        splits["train"],
        epochs=config.epochs,
        steps=steps,
        log_every=EVERY,
        log=entries.append,
        evaluations={"val": splits["val"]},
    )
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert custom_loop.difference(state, wanted) == 0.0
    assert history == [e for e in entries if e.split == "val" or e.step % EVERY == 0]
    assert history[-1].values == {name: last[f"val_{name}"] for name in ("loss", "accuracy")}
    assert custom_loop.results(config, learner, wanted, splits) == {"largest_difference": 0.0}


def test_each_epoch_and_each_validation_count_from_nothing() -> None:
    config = custom_loop.Config(units=16, epochs=2, batch_size=128, learning_rate=0.0)
    splits, learner = custom_loop.data(config), custom_loop.build(config)
    _, history = custom_loop.by_hand(config, learner, splits, log_every=12)
    (train, val), (train_again, val_again) = history[:2], history[2:]
    assert [e.split for e in history] == ["train", "val"] * 2
    assert val.values == val_again.values == research.evaluate(learner, splits["val"], learner.init())
    # Weights that stay, and the same images in another order.
    assert train.values == pytest.approx(train_again.values, rel=1e-5)


def test_it_says_a_line_for_each_log() -> None:
    config = dataclasses.replace(custom_loop.Config(), units=8, epochs=1, batch_size=479)
    lines: list[str] = []
    _, history = custom_loop.by_hand(config, custom_loop.build(config), custom_loop.data(config), 2, lines.append)
    assert [(e.step, e.split) for e in history] == [(2, "train"), (3, "val")]
    assert [line.split()[:5] for line in lines] == [["epoch", "1", "step", "2", "train"], ["epoch", "1", "step", "3", "val"]]

"""Hooks that are due by the clock change no numbers, and come after the logs of all earlier steps; what is kept stays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_training import assert_same_weights, data, learner

import research
from research.data import prefetch
from research.training import checkpoint
from research.training.checkpoint_policy import Timer, keep
from research.training.logs import LogEntry


@pytest.mark.parametrize("dispatch_seconds", [1000, 0])  # many steps at once, or single ones
def test_a_hook_that_is_due_by_a_function_comes_after_all_earlier_logs_and_changes_nothing(
    dispatch_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "DISPATCH_SECONDS", dispatch_seconds)
    order: list[Any] = []
    asked: list[int] = []

    def every(step: int) -> bool:
        asked.append(step)
        return len(asked) % 3 == 0

    def log(entry: LogEntry) -> None:
        order.append(entry)

    hooks = [(every, lambda step, state, logs: order.append((step, dict(logs))))]
    state, logs = research.train(learner(), data(), steps=43, log_every=2, log=log, hooks=hooks)
    plain: list[LogEntry] = []
    expected, expected_logs = research.train(learner(), data(), steps=43, log_every=2, log=plain.append)
    assert_same_weights(state, expected)
    assert logs == expected_logs
    assert [each for each in order if isinstance(each, LogEntry)] == plain
    hooked = [each for each in order if not isinstance(each, LogEntry)]
    assert [step for step, _ in hooked] == sorted({*asked[2::3], 43})
    for step, logs in hooked:
        before = order[: next(i for i, each in enumerate(order) if each[0] == step and not isinstance(each, LogEntry))]
        assert [entry for entry in before if isinstance(entry, LogEntry)] == [entry for entry in plain if entry.step < step]
        assert all(np.isfinite(log) for log in logs.values())


def test_every_dispatch_asks_once_whether_a_hook_is_due() -> None:
    asked: list[int] = []

    def never(step: int) -> bool:
        asked.append(step)
        return False

    called: list[int] = []
    research.train(learner(), data(), steps=20, hooks=[(never, lambda step, *_: called.append(step))])
    assert called == [20]
    assert asked[-1] == 20
    assert asked == sorted(set(asked))


def test_checkpoints_that_are_to_be_kept_stay_and_others_go(tmp_path: Path) -> None:
    names, scores = {"w": "weight"}, {1: 0.2, 3: 0.9, 4: float("nan"), 5: 0.9}
    for step in range(1, 12):
        checkpoint.save(tmp_path / "c", step, {"w": np.full(2, step)}, names, keep=keep(last=2, every=4, scores=scores))
    assert checkpoint.steps(tmp_path / "c") == [3, 4, 8, 10, 11]
    checkpoint.save(tmp_path / "c", 12, {"w": np.full(2, 12)}, names, keep=lambda steps: [])
    assert checkpoint.steps(tmp_path / "c") == [12]


def test_a_checkpoint_of_a_stop_takes_no_other_ones_place(tmp_path: Path) -> None:
    """A run that was stopped and resumed ends with the checkpoints of one that was not."""
    scores = {10: 0.5, 17: 0.9, 20: 0.6, 30: 0.4, 40: 0.3}
    kept = keep(last=1, every=15, scores=scores, due=lambda step: step % 10 == 0)

    def save(step: int, folder: str) -> list[int]:
        checkpoint.save(tmp_path / folder, step, {"w": np.full(2, step)}, {"w": "weight"}, keep=kept)
        return checkpoint.steps(tmp_path / folder)

    undisturbed = [save(step, "a") for step in (10, 20, 30, 40)]
    stopped = [save(step, "b") for step in (10, 17, 20, 30, 33, 40)]
    assert undisturbed[-1] == stopped[-1] == [20, 30, 40]
    assert stopped[1] == [10, 17]


def test_until_enough_checkpoints_are_due_those_of_stops_stay() -> None:
    kept = keep(last=2, due=lambda step: step == 100)
    assert kept([10, 20, 30]) == {20, 30}
    assert kept([20, 30, 100]) == {30, 100}


def test_the_last_checkpoint_replaces_the_best_one_before_it_once_its_score_is_known(tmp_path: Path) -> None:
    scores: dict[int, float] = {}
    kept = keep(last=1, scores=scores)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "c", step, {"w": np.full(2, step)}, {"w": "weight"}, keep=kept)
        scores[step] = float(step)  # evaluated while the checkpoint is written, or after that
    assert checkpoint.steps(tmp_path / "c") == [2, 3]
    checkpoint.remove_others(tmp_path / "c", kept)
    assert checkpoint.steps(tmp_path / "c") == [3]


def test_saves_that_are_due_by_the_clock_take_no_more_than_their_share_however_their_cost_varies() -> None:
    """But for the last one, whose cost the time after it makes up for."""
    rng, now, costs = np.random.default_rng(0), [0.0], list[float]()

    def save(step: int, state: Any, logs: dict[str, Any]) -> None:
        costs.append(float(rng.lognormal(0.0, 2.0)))
        now[0] += costs[-1]

    timer = Timer(60.0, share=0.01, clock=lambda: now[0])
    hook = timer.timed(save)
    for step in range(100_000):
        now[0] += float(rng.exponential(5.0))
        if timer.due():
            hook(step, {}, {})
            assert sum(costs[:-1]) <= 0.01 * (now[0] - costs[-1])
    assert len(costs) > 100

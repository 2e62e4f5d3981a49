"""Bad steps of a run: the exact step is found, and its states are computed again bit for bit, decisions included."""

from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest
from command_line import ROOT, command, strict
from command_line import research as research_command
from keras import layers

import research
from research.debugging.history import Decision, History, first_bad_step, read_decisions, state_after
from research.training import checkpoint
from research.training.bad_steps import NONFINITE, SPIKE, BadStep, LossWatch, state_check
from research.training.logs import LogEntry

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
BAD = 6  # the step, from 1, whose gradient is NaN though its loss is finite


def distances() -> research.Learner:
    """Returns a learner whose loss has no derivative at the outputs 0, which a row of zeros has."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dropout(0.1), layers.Dense(3, use_bias=False)])

    def loss(batch: Any, training: bool) -> Any:
        return keras.ops.mean(keras.ops.sqrt(keras.ops.sum(model(batch.x, training=training) ** 2, axis=-1))), {}

    return research.learner(loss, model, "adam", example=research.Batch(X[:4]))


def data(bad: int | None = BAD) -> research.Batches:
    x = X.copy()
    if bad is not None:
        x[4 * (bad - 1)] = 0
    return research.from_arrays(x, batch_size=4, shuffle=False)


def history(learner: research.Learner, batches: research.Batches, directory: Path, *decisions: Decision) -> History:
    return History(learner, batches, directory, learner.init, learner.init(), decisions=decisions)


def assert_equal(first: Any, second: Any) -> None:
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_step_that_spoiled_the_weights_is_found_though_only_the_loss_of_the_next_is_nan(tmp_path: Path) -> None:
    learner, batches = distances(), data()
    reported: list[LogEntry] = []
    with pytest.raises(BadStep, match="loss is nan") as error:
        research.train(learner, batches, epochs=2, log_every=1, log=reported.append, watch=LossWatch(10))
    assert (error.value.step, error.value.reason) == (BAD + 1, NONFINITE)
    assert [entry.step for entry in reported] == list(range(1, BAD + 1))
    past = history(learner, batches, tmp_path / "checkpoints")
    step, before = first_bad_step(past, error.value.step)
    assert (step, before.step) == (BAD, BAD - 1)
    state, step_alone = learner.init(), jax.jit(learner.train)
    for i in range(BAD - 1):
        state, logs = step_alone(state, batches.batch(i))
    assert_equal((before.state, before.logs), (state, logs))


def test_a_state_that_is_not_finite_is_not_saved() -> None:
    learner, batches = distances(), data()
    saved: list[int] = []
    hooks = [(3, state_check(learner.init())), (3, lambda step, state, logs: saved.append(step))]
    with pytest.raises(BadStep, match="the state is not finite") as error:
        research.train(learner, batches, epochs=2, hooks=hooks)
    assert (error.value.step, saved) == (BAD, [3])


@pytest.mark.slow
@pytest.mark.parametrize("restored", [BAD - 1, 2])
def test_states_after_a_decision_are_those_of_a_run_that_went_on_so(restored: int, tmp_path: Path) -> None:
    learner, batches = distances(), data()
    decisions = (Decision(BAD, restored, NONFINITE),)
    expected, _ = research.train(learner, data(), steps=restored)
    checkpoints = tmp_path / "checkpoints"
    expected, _ = research.train(learner, batches, steps=13, start=BAD, state=expected)
    assert_equal(state_after(history(learner, batches, checkpoints, *decisions), 13).state, expected)
    mid = state_after(history(learner, batches, checkpoints, *decisions), 9)
    checkpoint.save(checkpoints, 9, mid.state, learner.names, mid.logs)
    assert_equal(state_after(history(learner, batches, checkpoints, *decisions), 13).state, expected)
    before, _ = research.train(learner, batches, steps=BAD - 1)
    assert_equal(state_after(history(learner, batches, checkpoints, *decisions), BAD - 1).state, before)


def test_a_spike_is_found_in_fused_steps_and_across_an_interruption() -> None:
    losses = np.random.default_rng(0).normal(1.0, 0.05, 60)
    losses[50] = 2.0
    means = np.concatenate([np.cumsum(part) / np.arange(1, 31) for part in np.split(losses, 2)]).astype(np.float32)

    def watched(split: int) -> int:
        first = LossWatch(30, threshold=8.0, window=20)
        first(1, split, {}, {"loss": np.pad(means[:split], (0, 5)), "accuracy": np.zeros(60)})
        second = LossWatch(30, threshold=8.0, window=20, logs={"loss": means[split - 1], **first.recent()})
        with pytest.raises(BadStep, match=r"loss is 2, the median of the last 20 is") as error:
            second(split + 1, 60 - split, {}, {"loss": means[split:]})
        assert error.value.reason == SPIKE
        return error.value.step

    assert [watched(split) for split in (10, 30, 45, 50)] == [51] * 4
    LossWatch(30, threshold=25.0, window=20)(1, 60, {}, {"loss": means})


EXPERIMENT = '''"""Digits, one batch of which is bad."""

import sys
from dataclasses import dataclass

import jax
import numpy as np
import research

sys.path.append(CHECKOUT)
from experiments import digits
from experiments.digits import build


@dataclass(frozen=True, kw_only=True)
class Config(digits.Config):
    bad: int = 30
    weight: float = 0.0


def data(config):
    splits = digits.data(config)
    train = splits["train"]

    def batch(step):
        weights = np.ones(len(train.batch(step).y), np.float32)
        weights[3] = 1.0 if step + 1 != config.bad else config.weight or np.nan
        return train.batch(step)._replace(sample_weight=weights)

    weight = jax.ShapeDtypeStruct(train.shapes.y.shape, np.float32)
    return {"train": train._replace(batch=batch, shapes=train.shapes._replace(sample_weight=weight), resident=None, part=None)}
'''.replace("CHECKOUT", repr(str(ROOT)))


def run(tmp_path: Path, *options: str) -> Any:
    (tmp_path / "bad.py").write_text(EXPERIMENT)
    return command(
        "bad.py", "--epochs", "2", "--run-dir", "run", "--checkpoint-every", "20", "--log-every", "10", *options, cwd=tmp_path
    )


@pytest.mark.slow
def test_a_run_stops_at_a_bad_step_in_one_line_and_goes_on_with_another_option(tmp_path: Path) -> None:
    stopped = run(tmp_path)
    assert stopped.returncode == 1
    (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: step 30: loss is nan; the loss is not finite, though all outputs are; not finite in the batch: "
    )
    assert "rows that do it on their own: 3; written to run/failures/000000030; stopped (--on-nonfinite stop)" in line
    failure = tmp_path / "run" / "failures" / "000000030"
    assert strict((failure / "blame.json").read_text())["rows"] == [3]
    assert np.isnan(np.load(failure / "batch.npz")["sample_weight"][3])
    lines = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20]
    assert all(value is not None for line in lines for value in line["values"].values())
    assert strict((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [20]
    resumed = run(tmp_path, "--on-nonfinite", "skip")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 30: loss is nan; " in resumed.stderr
    assert "; skipped, and goes on with step 31" in resumed.stderr
    assert read_decisions(tmp_path / "run") == (Decision(30, 29, NONFINITE),)


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "decision"),
    [
        (["--on-nonfinite", "skip"], Decision(30, 29, NONFINITE)),
        (["--on-nonfinite", "rollback"], Decision(30, 20, NONFINITE)),
        (
            ["--bad", "50", "--weight", "1000", "--on-spike", "rollback", "--spike-window", "16", "--keep", "99"],
            Decision(50, 40, SPIKE),
        ),
    ],
)
def test_a_run_past_a_bad_step_ends_with_the_state_that_its_decisions_say(
    options: list[str], decision: Decision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run(tmp_path, *options)
    assert ended.returncode == 0, ended.stderr
    assert read_decisions(tmp_path / "run") == (decision,)
    from research.cli.runs import load_run

    monkeypatch.chdir(tmp_path)
    recorded = load_run("run")
    learner = recorded.experiment.module.build(recorded.config)
    batches = recorded.experiment.module.data(recorded.config)["train"]
    entries: list[LogEntry] = []
    again = state_after(history(learner, batches, tmp_path / "none", decision), 90, entries.append, 10)
    last = checkpoint.restore(tmp_path / "run" / "checkpoints" / "000000090", learner.init(), learner.names)
    assert_equal(again.state, last.state)
    lines = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = {entry.step: entry.values for entry in entries}
    same = [line["step"] for line in lines if line["split"] == "train" and values.get(line["step"]) == line["values"]]
    replaced = range(decision.restored + 1, decision.step + 1)
    assert set(same) >= {1, 10, 20, 30, 40, 45, 50, 60, 70, 80, 90} - {*replaced}
    kept = [20, 40, 50, 60, 80, 90] if "--keep" in options else [80, 90]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == kept


@pytest.mark.slow
def test_a_run_stops_after_max_skips(tmp_path: Path) -> None:
    (tmp_path / "always.py").write_text(EXPERIMENT.replace("step + 1 != config.bad", "step + 1 < config.bad"))
    ended = command("always.py", "--epochs", "2", "--on-nonfinite", "skip", "--max-skips", "2", "--run-dir", "run", cwd=tmp_path)
    assert ended.returncode == 1
    assert "error: step 32: loss is nan; " in ended.stderr
    assert "stopped (2 bad steps were skipped before (--max-skips 2))" in ended.stderr.splitlines()[-1]
    assert [each.step for each in read_decisions(tmp_path / "run")] == [30, 31]


@pytest.mark.complete
@pytest.mark.slow
def test_on_a_mesh_a_bad_step_is_found_and_steps_are_replayed_too(tmp_path: Path) -> None:
    four = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    (tmp_path / "bad.py").write_text(EXPERIMENT)
    options = ["--epochs", "1", "--run-dir", "run", "--log-every", "5", "--on-nonfinite", "skip", "--mesh", "data=2,fsdp=2"]
    ended = command("bad.py", *options, cwd=tmp_path, **four)
    assert ended.returncode == 0, ended.stderr
    assert "rows that do it on their own: 3; written to run/failures/000000030; skipped" in ended.stderr
    replayed = research_command("replay", "run", "--step", "40", cwd=tmp_path, **four)
    assert replayed.returncode == 0, replayed.stderr
    contents = strict((tmp_path / "run" / "replay" / "000000040" / "replay.json").read_text())
    assert (contents["start"], contents["compared"]) == (30, [35, 40])
    assert contents["layers"]["sequential/dense"]["output"]["nonfinite"] == 0

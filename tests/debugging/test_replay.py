"""Any step of a run, run again: bit for bit, and it is noticed if not."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import command, strict
from command_line import research as research_command
from test_history import distances

import research
from research.cli.runs import load_run
from research.debugging.replay import replay, state_digest


@pytest.fixture(scope="module")
def gan_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan")
    options = ["--steps", "60", "--log-every", "5", "--checkpoint-every", "20", "--run-dir", "run"]
    ended = command("gan", *options, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def digests(learner: research.Learner, data: research.Batches, steps: int) -> dict[int, str]:
    """Returns the digest of the state after each step of one uninterrupted run."""
    found: dict[int, str] = {}
    hooks = [(1, lambda step, state, logs: found.setdefault(step, state_digest(state)) and None)]
    research.train(learner, data, steps=steps, hooks=hooks)
    return found


@pytest.mark.complete
@pytest.mark.slow
def test_replayed_states_are_those_of_the_run(gan_run: Path) -> None:
    run = load_run(str(gan_run))
    learner, data = run.experiment.module.build(run.config), run.experiment.module.data(run.config)["train"]
    expected = digests(learner, data, 60)
    for number, start in [(60, 40), (52, 40), (40, 0), (7, 0)]:
        step = replay(learner, data, gan_run, number)
        assert (step.start, step.digest_before, step.digest) == (start, expected[number - 1], expected[number])
        assert step.blame is not None
        assert step.blame.place is None
        assert step.compared == [each for each in (1, *range(5, 61, 5)) if start < each <= number]


@pytest.mark.slow
def test_a_log_that_differs_is_an_error_in_one_line(gan_run: Path) -> None:
    path = gan_run / "metrics.jsonl"
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    changed = next(line for line in lines if line["step"] == 45 and line["split"] == "train")
    changed["values"]["generator_loss"] = float(np.nextafter(changed["values"]["generator_loss"], 9))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = research_command("replay", "run", "--step", "50", cwd=gan_run.parent)
    path.write_text(text)
    assert ended.returncode == 1
    assert "step 45: generator_loss is" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_command_writes_a_page_and_strict_json(gan_run: Path) -> None:
    ended = research_command("replay", "run", "--step", "50", cwd=gan_run.parent)
    assert ended.returncode == 0, ended.stderr
    directory = gan_run / "replay" / "000000050"
    assert ended.stdout.splitlines()[-1] == str(directory.relative_to(gan_run.parent) / "replay.html")
    contents = strict((directory / "replay.json").read_text())
    assert contents["layers"]["generator/dense"]["output"]["nonfinite"] == 0
    assert len(contents["row_losses"]) == len(np.load(directory / "batch.npz")["x"])
    page = (directory / "replay.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    too_far = research_command("replay", "run", "--step", "61", cwd=gan_run.parent)
    assert (too_far.returncode, too_far.stderr) == (
        1,
        "error: --step 61: the run in run has the steps 1 to 60; choose one of them.\n",
    )


def test_a_digest_tells_states_apart_by_one_bit() -> None:
    state = distances().init()
    other: Any = jax.tree.map(lambda leaf: leaf, state)
    assert state_digest(state) == state_digest(other)
    kernel = np.array(other.trainable[0])
    kernel[0, 0] = np.nextafter(kernel[0, 0], np.float32(9))
    other.trainable[0] = kernel
    assert state_digest(state) != state_digest(other)

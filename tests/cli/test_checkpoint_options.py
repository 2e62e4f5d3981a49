"""`--checkpoint-every`, `--keep`, `--keep-every` and `--keep-best`: what they take, and what a run does then."""

import importlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from experiment_file import write_experiment

from research.cli import recovery, resume, run
from research.cli.checkpoints import Best, Cadence, Scores, kept_checkpoints, parse_best, parse_cadence
from research.cli.options import Options
from research.core.state import InvalidArgument
from research.debugging.history import Decision, History
from research.training import checkpoint
from research.training.bad_steps import NONFINITE
from research.training.logs import LogEntry


@pytest.mark.parametrize(
    ("text", "cadence"),
    [
        ("500", Cadence(steps=500)),
        (500, Cadence(steps=500)),  # as config.json of version 0.1 has it
        ("0", Cadence()),
        (0, Cadence()),
        ("1epoch", Cadence(epochs=1)),
        ("2epochs", Cadence(epochs=2)),
        ("30s", Cadence(seconds=30.0)),
        ("0.5s", Cadence(seconds=0.5)),
        ("5min", Cadence(seconds=300.0)),
        ("1.5h", Cadence(seconds=5400.0)),
        ("auto", Cadence(seconds=60.0, share=0.01)),
    ],
)
def test_how_often_checkpoints_are_written(text: int | str, cadence: Cadence) -> None:
    assert parse_cadence(text) == cadence


@pytest.mark.parametrize(
    "text",
    [
        -1,
        "-1",
        "often",
        "",
        "0epochs",
        "1.5epochs",
        "1.5",
        "0s",
        "s",
        "5 min",
        "5m",
        "1e3",
        "inf",
        "nans",
        "99999999999",
        "٣",
        True,
    ]
    + ["2147483648", "auto "],
)
def test_anything_else_is_one_line(text: int | str) -> None:
    with pytest.raises(InvalidArgument) as error:
        Options(checkpoint_every=text)
    forms = "expected steps (500; 0 for the end only), 2epochs, 30s, 5min, 1h or auto."
    assert str(error.value) == f"--checkpoint-every {text}: {forms}"


def test_what_is_best() -> None:
    assert parse_best("val_loss:min") == Best("val_loss", False)
    for text in ("", "val_loss", "val_loss:", ":min", "val_loss:lowest"):
        with pytest.raises(InvalidArgument) as error:
            Options(keep_best=text)
        assert str(error.value) == f"--keep-best {text}: expected a metric and min or max, such as val_loss:min."


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"checkpoint_every": 10}, {20, 21}),
        ({"checkpoint_every": "2epochs"}, {16, 21}),
        ({"checkpoint_every": "2epochs", "keep_best": "loss:min"}, {20, 21}),
        ({"checkpoint_every": "30s"}, {19, 21}),
        ({"checkpoint_every": 0}, {19, 21}),  # fewer are due than are to stay
    ],
)
def test_the_checkpoint_of_a_stop_counts_only_where_checkpoints_are_due_by_the_clock(
    options: dict[str, Any], kept: set[int]
) -> None:
    session: Any = SimpleNamespace(options=Options(**options), splits={"train": SimpleNamespace(steps_per_epoch=4)}, steps=21)
    steps = [10, 16, 20, 21] if options["checkpoint_every"] not in ("30s", 0) else [10, 19, 21]
    assert kept_checkpoints(session, Scores(None, []))(steps) == kept


@pytest.mark.parametrize(("every", "restored"), [(20, 20), (0, 0), ("30s", 27)])
def test_a_run_is_rolled_back_to_a_checkpoint_that_was_due_not_to_that_of_a_stop(
    every: int | str, restored: int, tmp_path: Path
) -> None:
    state, names = {"w": np.ones(2)}, {"w": "weight"}
    for step in (20, 27):
        checkpoint.save(tmp_path, step, state, names)
    past = History(SimpleNamespace(names=names), None, tmp_path, lambda: state, state)
    options = Options(checkpoint_every=every, on_nonfinite="rollback")
    splits = {"train": SimpleNamespace(steps_per_epoch=100)}
    session: Any = SimpleNamespace(options=options, splits=splits, steps=100, run=SimpleNamespace(checkpoints=tmp_path))
    assert recovery._decide(session, past, 30, NONFINITE, "rollback", "") == Decision(30, restored, NONFINITE)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The checkpoints of a run of mine.py with 4 steps in an epoch, in the current directory. Its loss on val data grows."""
    monkeypatch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    train = 'return {"train": sibling.batches(config)}'
    val = 'return {"train": sibling.batches(config), "val": sibling.batches(config)._replace(steps_per_epoch=1)}'
    write_experiment(tmp_path, (train, val), ('optimizer="sgd"', "optimizer=keras.optimizers.SGD(-0.01)"))
    yield tmp_path / "run" / "checkpoints"
    for name in ("mine", "sibling"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], [20]),  # auto: a run of less than a minute writes one at its end
        (["--checkpoint-every", "0"], [20]),
        (["--checkpoint-every", "3"], [18, 20]),
        (["--checkpoint-every", "2epochs"], [16, 20]),
        (["--checkpoint-every", "1000h"], [20]),
        (["--checkpoint-every", "3", "--keep", "3"], [15, 18, 20]),
        (["--checkpoint-every", "3", "--keep-every", "7"], [9, 15, 18, 20]),
        (["--checkpoint-every", "3", "--keep-best", "val_loss:min"], [4, 18, 20]),
        (["--keep", "1", "--keep-best", "val_loss:min"], [4, 20]),
    ],
)
def test_a_run_keeps_the_checkpoints_that_its_options_say(options: list[str], kept: list[int], checkpoints: Path) -> None:
    assert run.main(["mine.py", "--epochs", "5", "--run-dir", "run", *options]) == 0
    assert checkpoint.steps(checkpoints) == kept


@pytest.mark.slow
def test_a_score_that_is_known_after_the_last_save_still_decides_what_stays(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Scores.add

    def add_after_save(scores: Scores, entry: LogEntry) -> None:
        waited_until = time.monotonic() + 60
        while entry.step == 20 and not (checkpoints / f"{20:09d}").exists() and time.monotonic() < waited_until:
            time.sleep(0.01)
        time.sleep(0.3 * (entry.step == 20))  # until the saving thread has removed what it found not to be the best
        add(scores, entry)

    monkeypatch.setattr(Scores, "add", add_after_save)
    assert run.main(["mine.py", "--epochs", "5", "--run-dir", "run", "--keep", "1", "--keep-best", "val_loss:max"]) == 0
    assert checkpoint.steps(checkpoints) == [20]


@pytest.mark.slow
def test_checkpoints_by_the_clock_do_not_change_the_numbers(checkpoints: Path) -> None:
    metrics = []
    for directory, every in (("run", "0.000001s"), ("other", "0")):
        arguments = ["mine.py", "--epochs", "5", "--log-every", "1", "--keep", "99", "--checkpoint-every", every]
        assert run.main([*arguments, "--run-dir", directory]) == 0
        metrics.append(Path(directory, "metrics.jsonl").read_text())
    assert metrics[0] == metrics[1]
    assert len(checkpoint.steps(checkpoints)) > 1


@pytest.mark.slow
def test_the_best_checkpoint_stays_after_resuming(checkpoints: Path) -> None:
    assert (
        run.main(["mine.py", "--epochs", "5", "--run-dir", "run", "--checkpoint-every", "3", "--keep-best", "val_loss:min"]) == 0
    )
    Path("run/summary.json").unlink()
    shutil.rmtree(checkpoints / f"{20:09d}")
    assert resume.main(["run"]) == 0
    assert checkpoint.steps(checkpoints) == [4, 18, 20]


@pytest.mark.slow
def test_a_metric_that_there_is_not_is_one_line_before_training(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["mine.py", "--run-dir", "run", "--keep-best", "val_accuracy:max"]) == 1
    line = "error: --keep-best val_accuracy: there is no such metric; expected one of loss, val_loss.\n"
    assert capsys.readouterr().err == line
    assert not checkpoints.exists()

"""`just check NAME`: a table and 0 if nothing is wrong, 1 and one line if something is."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiment_file import write_experiment

from research.cli import check


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    write_experiment(tmp_path)
    yield
    for name in ("mine", "sibling"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_right_experiment_is_compared_with_keras_and_a_wrong_one_fails_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["mine.py", "--first-steps", "2"]) == 0
    output = capsys.readouterr()
    assert "Keras' fit and here" in output.out
    assert output.out.splitlines()[-1] == "nothing is wrong"
    assert output.err == ""
    path = Path("mine.py")
    path.write_text(
        path.read_text()
        + "\n\nright = build\n\n\ndef build(config):\n    learner = right(config)\n"
        + "    return learner._replace(train=lambda state, batch: (state, learner.train(state, batch)[1]))\n"
    )
    sys.modules.pop("mine")
    importlib.invalidate_caches()
    assert check.main(["mine.py", "--first-steps", "2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: weights ")
    assert "differs from Keras' fit by " in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "just check NAME [--option value ...]: NAME is an experiment's name, or the path of its file."),
        (["mine.py"], 2, "no file 'mine.py'; expected the path of an experiment's file."),
        (
            ["digits", "--first-step", "1"],
            2,
            "no option '--first-step': did you mean '--first-steps'?; `just check digits --help`",
        ),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(arguments) == code
    assert capsys.readouterr().err.startswith(f"error: {message}")

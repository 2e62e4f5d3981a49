"""config.json says whose code a run is of: only the user's own is run."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from research.cli import export, replay, resume, run, trust
from research.core.state import InvalidArgument
from research.reporting import run_files

COMMANDS = {
    "resume": lambda: resume.main(["got"]),
    "export": lambda: export.main(["got"]),
    "replay": lambda: replay.main(["got", "--step", "1"]),
}
EVIL = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nraise SystemExit\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with what a stranger sent: a run directory, `got`, and files of code inside and beside it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("got").mkdir()
    for path in (Path("got/evil.py"), Path("evil.py"), Path("experiments/evil.py"), Path("got/experiments/evil.py")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(EVIL)
    yield tmp_path
    assert not list(tmp_path.rglob("ran"))
    assert not [name for name in sys.modules if "evil" in name]


def write_config(**changes: Any) -> None:
    contents = {"experiment": "evil", "id": "1", "file": None, "config": {}, "options": {}} | changes
    Path("got", "config.json").write_text(json.dumps(contents))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["got/evil.py", "evil.py", "experiments/evil.py", "got/../evil.py", "/proc/self/cwd/evil.py"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_that_the_user_has_not_named_is_not_run(
    place: str, absolute: bool, command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = os.path.join(folder, place) if absolute else place
    write_config(file=file)
    assert COMMANDS[command]() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: got: its experiment is {file!r}, which you have not run here; if it is your own, name it once: "
        f"just run {file} --run-dir got"
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name", ["evil", "evil.py", "got/evil.py", "experiments/evil.py", "../evil", "experiments.evil", "digits.py", "_data"]
)
def test_an_experiment_by_name_is_one_of_this_package(
    name: str, command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(experiment=name)
    assert COMMANDS[command]() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: got: it is a run of {name!r}, and there is no such experiment here."


def test_a_file_that_was_named_on_a_command_line_is_the_users_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("")
    assert run.main(["mine.py"]) == 1  # it defines nothing
    write_config(file=str(folder / "mine.py"))
    assert resume.main(["got"]) == 1
    assert "which you have not run here" not in capsys.readouterr().err
    assert trust.is_own(folder / "mine.py")
    assert not trust.is_own(folder / "evil.py")


def test_without_a_place_to_record_it_a_file_has_to_be_named_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    Path("mine.py").write_text("")
    assert run.main(["mine.py"]) == 1
    assert not trust.is_own(folder / "mine.py")


@pytest.mark.parametrize("name", ["config.json", "summary.json", "versions.json", "code.json"])
def test_a_file_larger_than_any_of_its_kind_is_not_read(name: str, folder: Path) -> None:
    write_config()
    with Path("got", name).open("a") as file:
        file.truncate(10**13)  # takes no room on the disk
    lines: list[str] = []
    if name == "config.json":
        with pytest.raises(InvalidArgument, match="it has 10,000,000,000,000 bytes, more than such a file has"):
            run_files.read_config(Path("got"))
        return
    for read in (run_files.read_summary, run_files.read_versions, run_files.read_code):
        assert not read(Path("got"), lines.append)
    (line,) = [line for line in lines if "missing" not in line]
    assert line.startswith(f"got/{name}: it has 10,000,000,000,000 bytes, more than such a file has; ")

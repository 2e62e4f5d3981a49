"""Run directories that are damaged, or a stranger's: each command says in one line what is wrong, or what it does without."""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from experiment_file import write_experiment

from research.cli import export, report, resume, run
from research.core.state import InvalidArgument
from research.reporting import record

pytestmark = pytest.mark.slow  # a third of a second each

Damage = Callable[[Path], None]
OPTIONS = ["--run-dir", "run", "--checkpoint-every", "3", "--log-every", "1"]
COMMANDS: dict[str, Callable[[], int]] = {
    "run": lambda: run.main(["mine.py", *OPTIONS]),
    "resume": lambda: resume.main(["run"]),
    "report": lambda: report.main(["run"]),
    "export": lambda: export.main(["run"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory, with an experiment, mine.py, and its finished run in `finished`."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "enable_compilation_cache", lambda: None)  # other tests count the programs in the process' own
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        write_experiment(folder)
        assert COMMANDS["run"]() == 0
        (folder / "run").rename(folder / "finished")
        yield folder
    for name in ("mine", "sibling"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def directory(folder: Path) -> Iterator[Path]:
    """The directory of a run that was killed after its checkpoint of step 6, with all its logs up to there."""
    copy = Path("run")
    shutil.copytree(folder / "finished", copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / f"{8:09d}")
    record.start(record.read_run(copy)[0], record_options(copy), 7, str(folder / "mine.py"))
    yield copy
    shutil.rmtree(copy)


def record_options(directory: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((directory / "config.json").read_text())["options"]
    return options


@pytest.fixture
def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Skips training: `run` and `resume` append the step that they start from, and the steps of the earlier logs."""
    starts: list[tuple[int, list[int]]] = []

    def run_session(session: Any) -> int:
        starts.append((session.start.step, [entry.step for entry in record.read_entries(session.run)]))
        return 0

    monkeypatch.setattr(run, "run_session", run_session)
    monkeypatch.setattr(run.programs, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(run.contract, "check_models", lambda *_: None)
    return starts


def text(content: str | bytes) -> Damage:
    """A file with another content."""
    return lambda path: void(path.write_bytes(content if isinstance(content, bytes) else content.encode()))


def void(_: Any) -> None:
    """Makes a statement of an expression."""


def replaced_by(make: Damage) -> Damage:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 5])


# What may happen to any file, and how messages tell it of one that should hold an object.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (Path.unlink, "it is missing"),
    "empty": (text(""), "it is empty"),
    "zeros": (text(bytes(512)), "it is empty"),
    "not UTF-8": (text(b'{"\xff\xfe": 1}'), "it is not UTF-8"),
    "UTF-16": (text('{"a": 1}'.encode("utf-16")), "it is not UTF-8"),
    "truncated": (halve, "it is not JSON"),
    "other text": (text("experiment: mine"), "it is not JSON (Expecting value at character 0)"),
    "list": (text("[1, 2]"), "it holds a list, expected an object"),
    "string": (text('"text"'), "it holds a string, expected an object"),
    "number": (text("3"), "it holds a number, expected an object"),
    "boolean": (text("true"), "it holds a boolean, expected an object"),
    "null": (text("null"), "it holds null, expected an object"),
    "thousands of brackets": (text('{"a":' + "[" * 100_000), "it holds too long a number, or lists in lists too deep"),
    "hundred brackets": (text('{"a":' + "[" * 100 + "]" * 100 + "}"), "it holds too long a number, or lists in lists too deep"),
    "long number": (text('{"a":' + "1" * 5000 + "}"), "it holds too long a number, or lists in lists too deep"),
    "directory": (replaced_by(Path.mkdir), "it is not a regular file"),
    "pipe": (replaced_by(lambda path: os.mkfifo(path)), "it is not a regular file"),
    "device": (replaced_by(lambda path: path.symlink_to("/dev/zero")), "it is not a regular file"),
    "dangling link": (replaced_by(lambda path: path.symlink_to("nowhere")), "it is missing"),
    "link to itself": (replaced_by(lambda path: path.symlink_to(path.name)), "it is missing"),
}
CONFIG = {
    "no name": ({"experiment": ...}, "'experiment' is missing in it"),
    "a number as name": ({"experiment": 3}, "'experiment' is a number, expected a string"),
    "a list as name": ({"experiment": ["mine"]}, "'experiment' is a list, expected a string"),
    "a number as file": ({"file": 3}, "'file' is a number, expected a string"),
    "no config": ({"config": ...}, "'config' is missing in it"),
    "a list as config": ({"config": []}, "'config' is a list, expected an object"),
    "null as config": ({"config": None}, "'config' is null, expected an object"),
    "a string as options": ({"options": "none"}, "'options' is a string, expected an object"),
    "a number as id": ({"id": 3}, "'id' is a number, expected a string"),
    "null as options": ({"options": None}, "'options' is null, expected an object"),
}


def change(changes: dict[str, Any], part: str | None = None) -> Damage:
    """Changes values of a JSON file, or of one of its objects; `...` removes one."""

    def damage(path: Path) -> None:
        contents = json.loads(path.read_text())
        target = contents if part is None else contents[part]
        target |= changes
        for name in [name for name, value in changes.items() if value is ...]:
            del target[name]
        path.write_text(json.dumps(contents))

    return damage


# In no file of a user, as an error of the system.
FULL = "lambda *_, **__: (_ for _ in ()).throw(OSError(28, 'No space left on device'))"
full = eval(compile(FULL, "<system>", "eval"))


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return str(line)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [*DAMAGES.values(), *((change(changes), message) for changes, message in CONFIG.values())],
    ids=[*DAMAGES, *CONFIG],
)
def test_a_config_that_can_not_be_used_ends_each_command_with_one_line(
    damage: Damage, message: str, command: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory / "config.json")
    assert COMMANDS[command]() == 1
    line = error_line(capsys)
    if message != "it is missing":
        assert line.startswith(f"error: run/config.json: {message}")
        assert line.endswith("; restore it from a backup, or choose another run.")
    elif command == "run":
        assert line == "error: --run-dir run: it is not empty and holds no run; choose a new directory."
    else:
        assert line in (
            "error: run/config.json: it is missing; restore it from a backup, or choose another run.",
            "error: no run 'run': expected a run directory, or an experiment that has runs in runs.",
        )


ADVICE = "correct it there, or continue the run with the code that wrote it."


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("config", {"unitz": 3}, "there is no field 'unitz'; expected epochs, steps, batch_size, seed, units"),
        ("config", {"": 3}, "there is no field ''; expected epochs, steps, batch_size, seed, units"),
        ("config", {"epochs": "many"}, "epochs is 'many'; expected a whole number"),
        ("config", {"epochs": 1.5}, "epochs is 1.5; expected a whole number"),
        ("config", {"epochs": True}, "epochs is True; expected a whole number"),
        ("config", {"epochs": None}, "epochs is null; expected a whole number"),
        ("config", {"epochs": []}, "epochs is []; expected a whole number"),
        ("config", {"steps": "x" * 300}, f"steps is '{'x' * 79} ...; expected a whole number or null"),
        ("config", {"units": 3}, "units is 3; expected a list"),
        ("config", {"units": ["a"]}, "units is ['a']; expected a whole number"),
        ("config", {"units": {"a": 1}}, "units is {'a': 1}; expected a list"),
        ("options", {"log": 3}, "there is no field 'log'; expected population, vary, run_dir, "),
        ("options", {"log_every": "often"}, "log_every is 'often'; expected a whole number"),
        ("options", {"log_every": 0}, "log_every is 0; expected a value in [1, 2147483647]"),
        ("options", {"checkpoint_every": -1}, "checkpoint_every is -1; expected a value in [0, 2147483647]"),
        ("options", {"mesh": 3}, "mesh is 3; expected a string or null"),
        ("options", {"layout": "rows"}, "layout is 'rows'; expected 'data' or 'fsdp' or 'tensor' or null"),
        ("options", {"profile": [1]}, "profile is [1]; expected a list of 2 or null"),
        ("options", {"coordinator": "here"}, "it can't be built (--coordinator here: expected host:port, with a port from 1 to "),
    ],
)
@pytest.mark.parametrize("command", ["resume", "export"])
def test_values_that_the_experiment_can_not_have_are_named(
    part: str, changes: dict[str, Any], message: str, command: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(changes, part)(directory / "config.json")
    assert COMMANDS[command]() == 1
    line = error_line(capsys)
    assert line.startswith(f"error: run/config.json: {part}: {message}")
    assert line.endswith(ADVICE)
    assert report.main(["run"]) == 0  # a page can show any values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "mined", "file": None}, "run: it is a run of 'mined', and there is no such experiment here."),
        ({"file": "gone.py"}, "run: its experiment 'gone.py' is not there any more; move it back, or edit config.json."),
        ({"file": "x" * 5000 + ".py"}, "run: its experiment 'xxx"),
        ({"file": "a\0b.py"}, "run: its experiment 'a\\x00b.py' is not there any more; move it back, or edit config.json."),
        ({"file": "."}, "run: its experiment '.' is not there any more; move it back, or edit config.json."),
        ({"experiment": "\ud800", "file": None}, "run: it is a run of '?', and there is no such experiment here."),
    ],
)
@pytest.mark.parametrize("command", ["resume", "export"])
def test_a_run_of_an_experiment_that_is_not_here_is_reported(
    changes: dict[str, Any], message: str, command: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(changes)(directory / "config.json")
    assert COMMANDS[command]() == 1
    assert error_line(capsys).startswith(f"error: {message}")


SUMMARY = {
    "a list as metrics": ({"metrics": [1]}, "'metrics' is a list, expected an object"),
    "text as a metric": ({"metrics": {"loss": "low"}}, "'loss' in 'metrics' is a string, expected a number that a float can "),
    "a huge metric": ({"metrics": {"loss": 10**400}}, "'loss' in 'metrics' is a number, expected a number that a float can hold"),
    "no status": ({"status": ...}, "'status' is missing in it"),
    "a list as status": ({"status": ["finished"]}, "'status' is a list, expected a string"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [*DAMAGES.values(), *((change(changes), message) for changes, message in SUMMARY.values())],
    ids=[*DAMAGES, *SUMMARY],
)
def test_a_damaged_summary_is_left_out_in_one_line(
    damage: Damage,
    message: str,
    command: str,
    directory: Path,
    prepared: list[Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(folder / "finished" / "summary.json", directory)
    damage(directory / "summary.json")
    is_directory = (directory / "summary.json").is_dir()
    assert COMMANDS[command]() == 0
    lines = capsys.readouterr().err.splitlines()
    expected = [f"run/summary.json: {message}"] if message != "it is missing" and command != "export" else []
    if is_directory and command in ("run", "resume"):
        expected += ["run/summary.json: expected a file; what is there is kept as summary.json.damaged"]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert prepared == ([(6, [1, 2, 3, 4, 5])] if command in ("run", "resume") else [])
    if command == "report":
        assert "not finished" in (directory / "report.html").read_text()


@pytest.mark.parametrize("command", ["resume", "report"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_versions_are_left_out_in_one_line(
    damage: Damage, message: str, command: str, directory: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory / "versions.json")
    is_directory = (directory / "versions.json").is_dir()
    assert COMMANDS[command]() == 0
    lines = capsys.readouterr().err.splitlines()
    if command == "report":
        (line,) = lines
        assert line.startswith(f"run/versions.json: {message}")
        assert line.endswith("; it is left out")
    else:  # it writes them anew
        assert lines == is_directory * ["run/versions.json: expected a file; what is there is kept as versions.json.damaged"]
        assert json.loads((directory / "versions.json").read_text())["jax"]


def in_line(number: int, replacement: bytes) -> Damage:
    """Replaces a line of a file, counted from 1."""

    def damage(path: Path) -> None:
        lines = path.read_bytes().splitlines()
        lines[number - 1] = replacement
        path.write_bytes(b"\n".join(lines) + b"\n")

    return damage


def logged(**changes: Any) -> bytes:
    return json.dumps({"step": 3, "epoch": 0, "split": "train", "values": {"loss": 1.0}} | changes).encode()


def last_lines_are_lost(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))


LOST = "the logs of steps {} are missing; the run goes on without them"
METRICS: dict[str, tuple[Damage, str, list[int]]] = {
    "missing": (Path.unlink, LOST.format("1 to 5"), []),
    "empty": (text(""), LOST.format("1 to 5"), []),
    "zeros": (text(bytes(512)), LOST.format("1 to 5"), []),
    "truncated": (halve, LOST.format("3 to 5"), [1, 2]),
    "truncated between lines": (last_lines_are_lost, LOST.format("3 to 5"), [1, 2]),
    "directory": (replaced_by(Path.mkdir), "expected a file; what is there is kept as metrics.jsonl.damaged", []),
    "dangling link": (replaced_by(lambda path: path.symlink_to("nowhere")), LOST.format("1 to 5"), []),
    "pipe": (replaced_by(lambda path: os.mkfifo(path)), "it is not a regular file; the logs in it are left out; ", []),
    "UTF-16": (lambda path: text(path.read_text().encode("utf-16"))(path), "6 of 6 lines can't be read (line 1: it is not", []),
    "a line is not UTF-8": (in_line(3, b"\xff\xff"), "1 of 6 lines can't be read (line 3: it is not UTF-8); ", [1, 2, 4, 5, 6]),
    "a line is other text": (in_line(3, b"oops"), "1 of 6 lines can't be read (line 3: it is not JSON (Expect", [1, 2, 4, 5, 6]),
    "zeros in a line": (in_line(3, bytes(8) + logged() + bytes(8)), "", [1, 2, 3, 4, 5, 6]),
    "zeros for a line": (in_line(3, bytes(80)), "", [1, 2, 4, 5, 6]),
    **{
        f"a line of {name}": (in_line(3, line), f"1 of 6 lines can't be read (line 3: {message}", [1, 2, 4, 5, 6])
        for name, line, message in [
            ("a list", b"[1]", "it holds a list, expected an object); they are left out; the file is kept as "),
            ("a number", b"3", "it holds a number, expected an object); they are left out; the file is kept as "),
            ("null", b"null", "it holds null, expected an object); they are left out; the file is kept as "),
            ("brackets", b"[" * 100_000, "it holds too long a number, or lists in lists too deep); they are left out"),
            ("an empty object", b"{}", "'step' is null, expected a whole number from 0 to 2**53); they are left out"),
            ("a negative step", logged(step=-1), "'step' is a number, expected a whole number from 0 to 2**53); "),
            ("a huge step", logged(step=10**30), "'step' is a number, expected a whole number from 0 to 2**53); "),
            ("half a step", logged(step=1.5), "'step' is a number, expected a whole number from 0 to 2**53); "),
            ("text as step", logged(step="3"), "'step' is a string, expected a whole number from 0 to 2**53); "),
            ("truth as epoch", logged(epoch=True), "'epoch' is a boolean, expected a whole number from 0 to 2**53); "),
            ("no split", logged(split=None), "'split' is null, expected a string); they are left out; "),
            ("a list as values", logged(values=[1.0]), "'values' is a list, expected an object); they are left out; "),
            ("text as value", logged(values={"loss": "low"}), "'loss' in 'values' is a string, expected a number that "),
            ("a list as value", logged(values={"loss": [1.0]}), "'loss' in 'values' is a list, expected a number that "),
            ("a huge value", logged(values={"loss": 10**400}), "'loss' in 'values' is a number, expected a number that "),
        ]
    },
    "an unknown key": (in_line(3, logged(more=[])), "", [1, 2, 3, 4, 5, 6]),
    "windows' line ends": (lambda path: text(path.read_bytes().replace(b"\n", b"\r\n"))(path), "", [1, 2, 3, 4, 5, 6]),
    "no end of the last line": (lambda path: text(path.read_bytes().rstrip())(path), "", [1, 2, 3, 4, 5, 6]),
}


@pytest.mark.parametrize(("damage", "message", "left"), METRICS.values(), ids=list(METRICS))
def test_damaged_logs_are_used_as_far_as_they_can_be_read_and_the_run_goes_on(
    damage: Damage, message: str, left: list[int], directory: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory / "metrics.jsonl")
    before = (directory / "metrics.jsonl").read_bytes() if (directory / "metrics.jsonl").is_file() else None
    assert resume.main(["run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(message)
    assert all(line.startswith(f"run/metrics.jsonl: {message}") for line in lines)
    assert prepared == [(6, [step for step in left if step < 6])]
    kept = directory / "metrics.jsonl.damaged"
    assert kept.exists() == any("kept as" in line for line in lines)
    assert before is None or not kept.exists() or kept.read_bytes() == before


@pytest.mark.parametrize(("damage", "message", "left"), METRICS.values(), ids=list(METRICS))
def test_the_report_of_a_run_with_damaged_logs_has_those_that_can_be_read(
    damage: Damage, message: str, left: list[int], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory / "metrics.jsonl")
    assert report.main(["run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    if "missing" in message or not message:  # whether logs should be there only a run that goes on can know
        assert lines == []
    elif "expected a file" in message:
        assert lines == ["run/metrics.jsonl: it is not a regular file; the logs in it are left out"]
    else:
        (line,) = lines
        assert line.startswith(f"run/metrics.jsonl: {message.partition('; the file')[0].rstrip('; ')}")
    assert [entry.step for entry in record.read_entries(record.read_run(directory)[0])] == left


def test_the_complete_history_is_there_after_a_run_that_went_on_from_damaged_logs(
    directory: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = (folder / "finished" / "metrics.jsonl").read_text().splitlines()
    in_line(2, b"oops")(directory / "metrics.jsonl")
    assert resume.main(["run"]) == 0
    assert error_line(capsys).endswith("they are left out; the file is kept as metrics.jsonl.damaged")
    assert (directory / "metrics.jsonl").read_text().splitlines() == [expected[0], *expected[2:]]
    assert json.loads((directory / "summary.json").read_text())["status"] == "finished"


FOREIGN = {
    "text as a picture": ("plots/more.png", text("PNG"), "run/plots/more.png: it is no PNG image; it is left out"),
    "an empty picture": ("plots/curves-2.png", text(""), "run/plots/curves-2.png: it is no PNG image; it is left out"),
    "a directory as a picture": ("plots/more.png", Path.mkdir, "run/plots/more.png: it is not a regular file; it is left out"),
    "a picture of no epoch": ("plots/epochs/photo.png", text(b"\x89PNG\r\n\x1a\n..."), ""),
    "a picture of other digits": ("plots/epochs/photo-²³.png", text(b"\x89PNG\r\n\x1a\n..."), ""),
    "text as an epoch": ("plots/epochs/photo-0001.png", text("PNG"), "run/plots/epochs/photo-0001.png: it is no PNG image; it "),
    "a link to nowhere": (
        "plots/a.png",
        lambda path: path.symlink_to("nowhere"),
        "run/plots/a.png: it is missing; it is left out",
    ),
}


@pytest.mark.parametrize(("name", "make", "message"), FOREIGN.values(), ids=list(FOREIGN))
def test_foreign_pictures_do_not_prevent_a_report(
    name: str, make: Damage, message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    make(directory / name)
    assert report.main(["run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(message)
    assert all(line.startswith(message) for line in lines)
    assert (directory / name).exists() == (
        f'alt="{(directory / name).stem}"' in (directory / "report.html").read_text()
    ) or message


@pytest.mark.parametrize("name", ["plots", "tensorboard"])
def test_a_file_in_the_place_of_a_directory_is_kept_under_another_name(
    name: str, directory: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(directory / name)
    (directory / name).write_text("mine")
    assert resume.main(["run"]) == 0
    assert error_line(capsys) == f"run/{name}: expected a directory; what is there is kept as {name}.damaged"
    assert (directory / f"{name}.damaged").read_text() == "mine"


def test_the_report_of_a_finished_run_is_written_if_the_process_was_killed_before_it_had_done_so(
    directory: Path, folder: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for command, page, partial in (("run", None, None), ("resume", "an old page", None), ("run", "", ".report.html.9.partial")):
        shutil.copy(folder / "finished" / "summary.json", directory)
        (directory / "report.html").unlink(missing_ok=True)
        if page is not None:
            (directory / "report.html").write_text(page)
            os.utime(directory / "report.html", ns=(0, 0))
        if partial is not None:
            (directory / partial).write_text("<!doctype")
        assert COMMANDS[command]() == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert output.out == "run: this run is finished; open run/report.html\n"
        assert "<h1>mine" in (directory / "report.html").read_text()
        assert not list(directory.glob(".*.partial"))
    before = (directory / "report.html").stat()
    assert COMMANDS["run"]() == 0
    assert (directory / "report.html").stat() == before
    assert prepared == []


def test_another_process_that_is_about_to_write_the_report_is_left_to_it(
    directory: Path, folder: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "finished" / "summary.json", directory)
    (directory / "report.html").unlink(missing_ok=True)
    with record.lock(record.read_run(directory)[0]):
        assert COMMANDS["run"]() == 0
    assert capsys.readouterr().err == ""
    assert not (directory / "report.html").exists()


def test_a_report_that_can_not_be_written_is_reported_and_the_run_stays_finished(
    directory: Path, folder: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "finished" / "summary.json", directory)
    (directory / "report.html").unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert COMMANDS["run"]() == 1
        assert error_line(capsys) == (
            "error: run/report.html: it can't be written (No space left on device), but the run is finished; free space or fix "
            "permissions, then: just report run"
        )
        assert report.main(["run"]) == 1
        assert error_line(capsys).startswith("error: run: it can't be written (No space left on device); choose another place: ")
    assert COMMANDS["run"]() == 0
    assert (directory / "report.html").exists()


def test_a_full_disk_at_the_start_is_reported_in_one_line(
    folder: Path, prepared: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        patch.setattr(Path, "write_text", full)
        assert run.main(["mine.py", "--run-dir", "new"]) == 1
        advice = "free space or fix permissions, then run the same command again"
        assert error_line(capsys) == f"error: new: it can't be written or read (No space left on device); {advice}"
        assert [path.name for path in Path("new").iterdir()] == [".lock"]
        patch.setattr(Path, "mkdir", full)
        assert run.main(["mine.py"]) == 1
        assert "it can't be created (No space left on device); choose another place: --run-dir DIRECTORY." in error_line(capsys)
    assert run.main(["mine.py", "--run-dir", "new"]) == 0
    shutil.rmtree("new")


def test_a_new_directory_in_which_nothing_was_written_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise InvalidArgument("no data")

    monkeypatch.setattr(run, "prepare", fail)
    assert run.main(["mine.py"]) == 1
    assert error_line(capsys) == "error: no data"
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x" * 300, "it can't be written (File name too long); choose another place: --output FILE."),
        ("a\0b", "it can't be written (it is no path); choose another place: --output FILE."),
        ("run", "it can't be written (Is a directory); choose another place: --output FILE."),
        ("run/config.json/page.html", "it can't be written (File exists); choose another place: --output FILE."),
        ("/dev/null/page.html", "it can't be written (File exists); choose another place: --output FILE."),
    ],
)
def test_a_page_that_can_not_be_written_is_reported_in_one_line(
    output: str, message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["run", "--output", output]) == 1
    assert error_line(capsys).endswith(message)
    assert not list(Path().glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "host:99999"], "--coordinator host:99999: expected host:port, with a port from 1 to 65535."),
        (["--processes", "0"], "--processes 0: expected a value in [1, 2147483647]."),
        (["--process", "-1"], "--process -1: expected a value in [0, 2147483647]."),
        (["--join-timeout", "0"], "--join-timeout 0: expected a value in [1, 1000000]."),
        (
            ["--processes", "two"],
            "just resume RUN: argument --processes: invalid int value: 'two'; RUN is one run directory, or an ",
        ),
        (["--layout", "rows"], "just resume RUN: argument --layout: invalid choice: 'rows' (choose from "),
        (
            ["--epochs", "3"],
            "just resume RUN: unrecognized arguments: --epochs 3; RUN is one run directory, or an experiment's name",
        ),
    ],
)
def test_wrong_options_of_resume_are_wrong_usage(
    options: list[str], message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume.main(["run", *options]) == 2
    assert error_line(capsys).startswith(f"error: {message}")

"""The files of a run directory as values: one reader for each, for files that may be damaged or a stranger's.

What is needed raises `InvalidArgument`: `read_config`. What can be done without is reported in one line, and the rest is used:
`read_summary`, `read_versions`, `read_code`, `read_metrics`, `read_png`. `tidy` clears the way for new files.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.core.state import InvalidArgument
from research.training.logs import LogEntry
from research.transforms.population import MEMBERS_SUFFIX

FILES = ("versions.json", "code.json", "source.diff", "metrics.jsonl", "performance.jsonl", "summary.json", "report.html")
PERFORMANCE = "performance.jsonl"
DIRECTORIES = ("plots", "tensorboard")
CHECKPOINTS = ("checkpoints", "start")  # what is in them is checked by its manifests
MAX_DEPTH = 50  # of nested lists and objects
MAX_BYTES = 100_000_000  # of a file other than logs, which may be longer
MAX_STEP = 2**53  # the integers up to here are floats, too
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Report = Callable[[str], None]


class Damage(Exception):
    """A file that can't be used, and why: `it is empty`."""


class Missing(Damage):
    """A file that does not exist."""


class RecordedConfig(NamedTuple):
    """What config.json holds: the experiment's name and file, its config, options that do not change the numbers, the run's id.

    >>> RecordedConfig("digits", None, {"epochs": 3}, {}).config["epochs"]
    3
    """

    experiment: str
    file: str | None
    config: dict[str, Any]
    options: dict[str, Any]
    id: str | None = None


def ignore(line: str) -> None:
    """Reports nothing."""


def check_entries(directory: Path) -> None:
    """Raises `InvalidArgument` for a link, pipe or device in a run's directory: a run writes nowhere else, and waits for nobody.

    Not for those in place of `FILES` and pictures, which are reported where they are read, and replaced where they are written.

    >>> check_entries(Path("no/run"))
    """
    entry = next(_irregular(directory), None)
    if entry is not None:
        kind = "a link" if entry.is_symlink() else "no regular file"
        raise InvalidArgument(f"{entry.path}: it is {kind}; a run reads and writes inside of its directory only: remove it.")


def _irregular(directory: Path) -> Iterator["os.DirEntry[str]"]:
    """Yields what is neither a file nor a directory, at any depth. Directories that can't be read are left out."""
    exempt = {os.path.join(directory, name) for name in ("config.json", *FILES)}
    pictures = os.path.join(directory, "plots", "")
    manifests = {os.path.join(directory, name) for name in CHECKPOINTS}
    directories = [str(directory)]
    while directories:
        parent = directories.pop()
        with contextlib.suppress(OSError, ValueError), os.scandir(parent) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories += [] if entry.path in manifests else [entry.path]
                elif entry.is_file(follow_symlinks=False) or entry.path in exempt:
                    continue
                elif entry.is_dir() or not entry.path.startswith(pictures):
                    yield entry


def read_config(directory: Path) -> RecordedConfig:
    """Returns the contents of `config.json`. Raises `InvalidArgument` if it is missing or damaged.

    >>> read_config(Path("no/run"))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: no/run/config.json: it is missing; restore it from a backup, or choose another run.
    """
    path = directory / "config.json"
    try:
        contents = _read_object(path)
        texts = {name: None if contents.get(name) is None else _checked(contents, name, str) for name in ("file", "id")}
        options = _checked({"options": {}, **contents}, "options", dict)
        experiment, config = _checked(contents, "experiment", str), _checked(contents, "config", dict)
        return RecordedConfig(experiment, texts["file"], config, options, texts["id"])
    except Damage as damage:
        raise InvalidArgument(f"{path}: {damage}; restore it from a backup, or choose another run.") from None


def read_summary(directory: Path, report: Report) -> dict[str, Any] | None:
    """Returns the contents of `summary.json`, with numbers or None as metrics; None if it is missing. Reports damage.

    >>> read_summary(Path("no/run"), print) is None
    True
    """
    path = directory / "summary.json"
    try:
        summary = _read_object(path)
        _checked(summary, "status", str)
        return {**summary, "metrics": _numbers(summary.get("metrics", {}), "metrics")}
    except Missing:
        return None
    except Damage as damage:
        report(f"{path}: {damage}; it is left out")
        return None


def read_versions(directory: Path, report: Report) -> dict[str, Any]:
    """Returns the contents of `versions.json`. Reports it if the file is missing or damaged, and returns an empty dict.

    >>> read_versions(Path("no/run"), print)
    no/run/versions.json: it is missing; it is left out
    {}
    """
    path = directory / "versions.json"
    try:
        return _read_object(path)
    except Damage as damage:
        report(f"{path}: {damage}; it is left out")
        return {}


def read_code(directory: Path, report: Report) -> dict[str, Any]:
    """Returns the contents of `code.json`; an empty dict if it is missing. Reports damage.

    >>> read_code(Path("no/run"), print)
    {}
    """
    path = directory / "code.json"
    try:
        return _read_object(path)
    except Missing:
        return {}
    except Damage as damage:
        report(f"{path}: {damage}; whether the code changed is not checked")
        return {}


def read_metrics(directory: Path, report: Report) -> list[LogEntry]:
    """Returns the entries of `metrics.jsonl`, null as NaN. Reports lines that can't be read, and leaves them out.

    An incomplete last line is what a killed process leaves, and is not reported.

    >>> read_metrics(Path("no/run"), print)
    []
    """
    path = directory / "metrics.jsonl"
    try:
        lines = _read_bytes(path, None).split(b"\n")
    except Missing:
        return []
    except Damage as damage:
        report(f"{path}: {damage}; the logs in it are left out")
        return []
    entries, damaged, first = [], 0, ""
    for number, line in enumerate(lines, 1):
        line = line.strip(b"\0 \t\r")  # a crash of the machine may leave zeros
        if not line:
            continue
        try:
            entries.append(_entry(line))
        except Damage as damage:
            if number < len(lines):
                damaged, first = damaged + 1, first or f"line {number}: {damage}"
    if damaged:
        report(f"{path}: {damaged} of {damaged + len(entries)} lines can't be read ({first}); they are left out")
    return entries


def read_performance(directory: Path, report: Report) -> list[dict[str, Any]]:
    """Returns the lines of `performance.jsonl`. Leaves out lines that can't be read; reports a file that can't.

    >>> read_performance(Path("no/run"), print)
    []
    """
    try:
        lines = _read_bytes(directory / PERFORMANCE, None).split(b"\n")
    except Missing:
        return []
    except Damage as damage:
        report(f"{directory / PERFORMANCE}: {damage}; it is left out")
        return []
    found = []
    for line in lines:
        with contextlib.suppress(Damage):
            values = {
                name: value for name, value in _numbers(_object(line), "it").items() if value is not None and math.isfinite(value)
            }
            found += [values] if {"step", "started", "training_seconds"} <= set(values) else []
    return found


def read_png(path: Path, report: Report) -> bytes | None:
    """Returns the bytes of a PNG file. Reports it if the file is none, and returns None.

    >>> read_png(Path("no/picture.png"), print)
    no/picture.png: it is missing; it is left out
    """
    try:
        data = _read_bytes(path)
        if not data.startswith(PNG_SIGNATURE):
            raise Damage("it is no PNG image")
        return data
    except Damage as damage:
        report(f"{path}: {damage}; it is left out")
        return None


def tidy(directory: Path, report: Report) -> None:
    """Removes half-written files of killed processes, and renames what stands in the way of a run's own files.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> _ = (directory / ".summary.json.123.partial").write_text("{")
    >>> tidy(directory, print)
    >>> list(directory.iterdir())
    []
    """
    for path in [*directory.glob(".*.partial"), *(directory / "plots").rglob(".*.partial")]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    wrong = [directory / name for name in FILES if (directory / name).is_dir()]
    wrong += [directory / name for name in DIRECTORIES if (directory / name).exists() and not (directory / name).is_dir()]
    for path in wrong:
        expected = "file" if path.is_dir() else "directory"
        report(f"{path}: expected a {expected}; what is there is kept as {set_aside(path).name}")


def set_aside(path: Path, copy: bool = False) -> Path:
    """Renames, or copies, something damaged to a name beside it. Returns the new path.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = path.write_text("not JSON")
    >>> set_aside(path).name
    'metrics.jsonl.damaged'
    """
    names = (f"{path.name}.damaged" + (f"-{i}" if i else "") for i in itertools.count())
    kept = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    if copy:
        shutil.copyfile(path, kept)
    else:
        path.rename(kept)
    return kept


def shown(value: Any) -> str:
    """Returns a value of a file as a message shows it.

    >>> shown("x" * 100) == "'" + "x" * 79 + " ..."
    True
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _read_bytes(path: Path, limit: int | None = MAX_BYTES) -> bytes:
    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise Damage("it is not a regular file") if path.exists() else Missing("it is missing")
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise Damage(f"it has {size:,} bytes, more than such a file has")
        return path.read_bytes()
    except OSError as error:
        raise Damage(f"it can't be read ({error.strerror})") from error


def _read_object(path: Path) -> dict[str, Any]:
    data = _read_bytes(path)
    if not data.strip(b"\0 \t\r\n"):
        raise Damage("it is empty")
    return _object(data)


def _object(data: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises `Damage` for anything else."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if not isinstance(value, dict):
            raise Damage(f"it holds {_kind(value)}, expected an object")
        result: dict[str, Any] = _plain_text(value)
        return result
    except UnicodeDecodeError:
        raise Damage("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Damage(f"it is not JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError):  # integers of thousands of digits, thousands of brackets
        raise Damage("it holds too long a number, or lists in lists too deep") from None


def _plain_text(value: Any, depth: int = 0) -> Any:
    """Returns a JSON value with a ? for each half of a surrogate pair in its strings: no file and no terminal can hold one."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_plain_text(key): _plain_text(element, depth + 1) for key, element in value.items()}
    return [_plain_text(element, depth + 1) for element in value] if isinstance(value, list) else value


def _checked(contents: Mapping[str, Any], name: str, expected: type) -> Any:
    if name not in contents:
        raise Damage(f"{name!r} is missing in it")
    if not isinstance(contents[name], expected):
        raise Damage(f"{name!r} is {_kind(contents[name])}, expected {'a string' if expected is str else 'an object'}")
    return contents[name]


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


def _entry(line: bytes) -> LogEntry:
    contents = _object(line)
    step, epoch = _count(contents, "step"), _count(contents, "epoch")
    values = _checked(contents, "values", dict)
    lists = {name: value for name, value in values.items() if name.endswith(MEMBERS_SUFFIX) and isinstance(value, list)}
    floats = _floats({name: value for name, value in values.items() if name not in lists}, "values")
    members = {
        name.removesuffix(MEMBERS_SUFFIX): list(_floats({str(i): v for i, v in enumerate(each)}, name).values())
        for name, each in lists.items()
    }
    return LogEntry(step, epoch, _checked(contents, "split", str), floats, members)


def _floats(values: Any, name: str) -> dict[str, float]:
    """Returns numbers as `_numbers` does, null as NaN."""
    return {key: math.nan if value is None else float(value) for key, value in _numbers(values, name).items()}


def _count(contents: Mapping[str, Any], name: str) -> int:
    value = contents.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_STEP:
        raise Damage(f"{name!r} is {_kind(value)}, expected a whole number from 0 to 2**53")
    return value


def _numbers(values: Any, name: str) -> dict[str, Any]:
    """Returns numbers by name. Raises `Damage` unless each is a number that a float can hold, or None."""
    if not isinstance(values, dict):
        raise Damage(f"{name!r} is {_kind(values)}, expected an object")
    for key, value in values.items():
        number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023)
        if value is not None and not number:
            raise Damage(f"{shown(key)} in {name!r} is {_kind(value)}, expected a number that a float can hold, or null")
    return values

"""Experiments by name or by file: where they are looked up, and how they are imported."""

import ast
import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from research.cli.errors import describe_error
from research.core.state import InvalidArgument

CHECKOUT = Path(__file__).resolve().parents[2]  # holds experiments/ in a checkout; site-packages in an installation


class Experiment(NamedTuple):
    """An experiment's name, its module with `Config`, `build` and `data`, and the file it was read from.

    `member` is the experiment of one member if this is that of a population, see `cli.members`.
    """

    name: str
    module: Any  # a `ModuleType`
    file: Path
    member: "Experiment | None" = None


class UnknownExperiment(InvalidArgument):
    """There is no experiment of that name, or no such file."""


def list_experiments() -> dict[str, str]:
    """Returns the name of every experiment with the first line of its docstring. Nothing is imported.

    >>> list_experiments()["digits"]
    'Classify handwritten digits, or clothes, with a small network.'
    """
    return {path.stem: _first_line(path) for path in _files().values()}


def load_experiment(name_or_path: str) -> Experiment:
    """Imports an experiment, by name or by the path of a file that ends in .py.

    Names are looked up in the `experiments/` folder beside the `research` package, then in `experiments/` of the current
    directory. A file in a package (a folder with `__init__.py`) is imported as a module of the package, any other file under its
    own name. Its folder is put on `sys.path`, so that it can import its siblings. Raises `UnknownExperiment`, an
    `InvalidArgument`, if there is no such experiment, and `InvalidArgument` if the file can't be imported.

    >>> load_experiment("digits").module.__name__
    'experiments.digits'
    >>> load_experiment("digit")
    Traceback (most recent call last):
    research.cli.experiment.UnknownExperiment: no experiment 'digit': did you mean 'digits'?
    """
    if name_or_path.endswith(".py"):
        if not os.path.isfile(name_or_path):  # unlike Path.is_file, False for a name that no file can have
            raise UnknownExperiment(f"no file {name_or_path[:200]!r}; expected the path of an experiment's file.")
        file = Path(name_or_path).resolve()
    else:
        files = _files()
        if name_or_path not in files:
            raise UnknownExperiment(f"no experiment {name_or_path[:200]!r}: {_suggestion(name_or_path, files)}")
        file = files[name_or_path]
    try:
        return Experiment(file.stem, _import(file), file)
    except InvalidArgument:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidArgument(f"{describe_error(error)}; the experiment can't be imported.") from error


def display_path(path: Path) -> str:
    """Returns a path relative to the current directory if it lies there, else as it is.

    >>> display_path(Path.cwd() / "mine.py"), display_path(Path("/elsewhere/mine.py"))
    ('mine.py', '/elsewhere/mine.py')
    """
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _files() -> dict[str, Path]:
    """The file of every experiment that has a name. The checkout's own come first and win."""
    files: dict[str, Path] = {}
    for folder in (CHECKOUT / "experiments", Path.cwd() / "experiments"):
        for path in sorted(folder.glob("[!_]*.py")):
            files.setdefault(path.stem, path)
    return files


def _first_line(path: Path) -> str:
    try:
        return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    except (OSError, SyntaxError, ValueError):
        return "(it can't be read)"


def _suggestion(name: str, files: dict[str, Path]) -> str:
    nearest = difflib.get_close_matches(name, files, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"expected {', '.join(files)}, or the path of a file." if files else "give the path of an experiment's file."


def _import(file: Path) -> ModuleType:
    root, names = file.parent, [file.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    for folder in (file.parent, root):
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    name = ".".join(names)
    if len(names) > 1:
        module = importlib.import_module(name)
        if module.__file__ is not None and Path(module.__file__).resolve() == file:
            return module
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(file):
            return loaded
        name = f"experiment_{file.stem}"  # another module has the name already
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

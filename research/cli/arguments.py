"""Command lines: parsing, and wrong usage as one line."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from research.cli.fields import check_fields
from research.core.state import InvalidArgument
from research.errors import one_line, printable


class UsageError(Exception):
    """A command line that can't be understood; the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` with one line, instead of printing the usage and exiting."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raises `UsageError`."""
        raise UsageError(message)


def print_error(line: str) -> None:
    """Prints a line to stderr. Texts from files in it can't move the cursor."""
    print(printable(line), file=sys.stderr, flush=True)


def fail(message: str, code: int) -> int:
    """Prints `error: message` to stderr, and returns the exit code."""
    print(printable(f"error: {message}"), file=sys.stderr)
    return code


def unknown_option(arguments: Iterable[str], fields: Iterable[dataclasses.Field[Any]]) -> str | None:
    """Returns a message about the first option that is not one of the fields, with the nearest that is; None if all are known.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     epochs: int = 1
    >>> unknown_option(["--epoch", "3"], dataclasses.fields(Config))
    "no option '--epoch': did you mean '--epochs'?"
    >>> unknown_option(["--epochs", "3"], dataclasses.fields(Config))
    """
    known = [f"--{field.name.rstrip('_').replace('_', '-')}" for field in fields]
    options = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for option in options:
        if option not in [*known, *(f"--no-{name[2:]}" for name in known), "--help"]:
            nearest = difflib.get_close_matches(option, known, n=1)
            return f"no option {option!r}" + (f": did you mean {nearest[0]!r}?" if nearest else "")
    return None


def parse(config_class: type, options_class: type, arguments: list[str], prog: str, description: str | None) -> tuple[Any, Any]:
    """Parses one flat set of options into an experiment's config and a command's own options.

    Both classes are dataclasses, and every field of `options_class` has a default. `prog` is the command as a user types it.
    Raises `UsageError` for an unknown option and for a value that can't be parsed, lies outside of its field's `Interval`, or
    that the class itself rejects; `InvalidArgument` for a field that both classes have. `--help` ends the process, with exit
    code 0.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     epochs: int = 1
    >>> @dataclasses.dataclass(frozen=True)
    ... class Options:
    ...     log_every: int = 50
    >>> parse(Config, Options, ["--epochs", "3"], "just run mine", None)
    (Config(epochs=3), Options(log_every=50))
    >>> parse(Config, Options, ["--epochs", "many"], "just run mine", None)
    Traceback (most recent call last):
    research.cli.arguments.UsageError: --epochs: expected a whole number, got 'many'; `just run mine --help` lists the options.
    """
    hint = f"`{prog} --help` lists the options."
    both = {field.name for field in dataclasses.fields(config_class)} & {
        field.name for field in dataclasses.fields(options_class)
    }
    if both:
        raise InvalidArgument(f"Config has the field {min(both)!r}, which is an option of the command; rename it.")
    unknown = unknown_option(arguments, [*dataclasses.fields(config_class), *dataclasses.fields(options_class)])
    if unknown is not None:
        raise UsageError(f"{unknown}; {hint}")
    import tyro  # slow to import

    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)
    # The names of these two fields are titles in the help: "experiment options" and "run options".
    command = prog.split()[1]
    fields: list[Any] = [
        ("experiment", _checked_first(config_class)),
        (command, options_class, dataclasses.field(default_factory=options_class)),
    ]
    arguments_class = dataclasses.make_dataclass("Arguments", fields, frozen=True)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed: Any = tyro.cli(flat(arguments_class), args=arguments, prog=prog, description=description)
        values, options = parsed.experiment, getattr(parsed, command)
        check_fields(values)
        config = config_class(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config_class) if f.init})
        check_fields(options)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(f"{_box_text(errors.getvalue())}; {hint}") from None
    except Exception as error:  # __post_init__ raises what it likes
        raise UsageError(f"{one_line(error).rstrip('.')}; {hint}") from error
    return config, options


def _checked_first(config_class: type) -> type:
    """Returns a config class whose fields are checked before its own `__post_init__`, which may rely on their intervals."""
    own = getattr(config_class, "__post_init__", None)
    if own is None:
        return config_class

    def post_init(config: Any) -> None:
        check_fields(config)
        own(config)

    return type(config_class.__name__, (config_class,), {"__post_init__": post_init, "__module__": config_class.__module__})


def _box_text(box: str) -> str:
    """Returns the message in a box that tyro draws around an error, on one line.

    >>> box = ["╭─ Value error ──╮", "│ Error parsing --rate: could not │", "│ convert string to float: 'a' │", "│ ──── │"]
    >>> print(_box_text(chr(10).join(box)))
    --rate: expected a number, got 'a'
    """
    lines = [line.strip("│╭╮╰╯ ").strip("─-") for line in box.strip().splitlines()[1:]]  # without the title; rules are empty
    message = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines))
    text = " ".join(" ".join(message).split()).removeprefix("Error parsing ")
    text = re.sub("^(experiment|run|check|plan|sweep): ", "", text)
    text = text.replace("invalid literal for int() with base 10:", "expected a whole number, got")
    return text.replace("could not convert string to float:", "expected a number, got").rstrip(".")


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axes of a mesh and their sizes. Raises `InvalidArgument` for any other text.

    >>> parse_mesh("data=2,fsdp=-1")
    {'data': 2, 'fsdp': -1}
    """
    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InvalidArgument(f"--mesh {text}: expected axes and sizes, such as data=8 or data=2,fsdp=-1.") from None

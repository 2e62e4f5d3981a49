"""The `research` command: `research run NAME --option value ...` and the other commands, each a module of `research.cli`."""

import contextlib
import difflib
import importlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from research.cli.arguments import fail
from research.cli.errors import describe_error, write_traceback
from research.cli.signals import exit_on_signal, ignore_signals
from research.cli.startup import check_keras_settings
from research.core.state import InvalidArgument

COMMANDS = {
    "run": "runs an experiment",
    "resume": "continues a run that was stopped",
    "replay": "runs a step of a run again, and shows what happens inside it",
    "sweep": "searches for good values of an experiment's options",
    "report": "writes a page about a run, or about several side by side",
    "export": "writes the Keras models of a run",
    "check": "compares training with Keras' fit, and looks for the traps of hand-written steps",
    "plan": "compiles a training step for TPUs that are not here",
    "processes": "runs a command as several processes of this machine",
}

WITH_KERAS = ("run", "resume", "sweep", "replay", "export", "check", "plan")  # those that build an experiment


def main(arguments: list[str]) -> int:
    """Runs a command, and returns the exit code.

    >>> main(["report", "--output"])
    2
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("research COMMAND ...; `research run` lists the experiments\n")
        print("\n".join(f"  {name:9}  {line}" for name, line in COMMANDS.items()))
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected {', '.join(COMMANDS)}."
        return fail(f"no command {name!r}: {hint}", 2)
    if name in WITH_KERAS:
        try:
            check_keras_settings()
        except InvalidArgument as error:
            return fail(str(error), 1)
    code: int = importlib.import_module(f"research.cli.{name}").main(rest)
    return code


def _new_file() -> Path:
    """Returns a new file: others write to that folder too, and may have put a link there under a name that they can guess."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="research-error-", suffix=".txt")
        os.close(descriptor)
        return Path(path)
    except OSError:  # the disk may be what failed
        return Path(os.devnull, "error.txt")


def command() -> NoReturn:
    """Runs the command line of this process. SIGTERM and SIGINT end it with exit code 75 outside of training too."""
    exit_on_signal()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a path may hold any bytes
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except Exception as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it may be what failed, and would again at the end
        code = fail(f"{describe_error(error)}{write_traceback(_new_file())}", 1)
    ignore_signals()
    sys.exit(code)

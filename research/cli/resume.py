"""Continues a run that was stopped: `resume RUN`, a run directory or an experiment's name for its latest.

just resume digits
just resume runs/clothes --mesh data=8    # on other devices than before; `--mesh one` for a single one
"""

import argparse
import dataclasses

from research.cli.arguments import Parser, UsageError, fail
from research.cli.fields import check_fields
from research.cli.options import Options
from research.cli.run import fail_or_exit, run_experiment
from research.cli.runs import RecordedRun, load_run
from research.core.state import InvalidArgument

RUN = "one run directory, or an experiment's name for its latest run."


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main([])
    2
    """
    parser = Parser("just resume", __doc__)
    parser.add_argument("run", help="a run directory, or an experiment's name for its latest run")
    parser.add_argument("--mesh", help="other devices than before, as in `just run`; one: a single device")
    parser.add_argument("--layout", choices=("data", "fsdp", "tensor"), help="how weights are sharded on them")
    parser.add_argument("--allow-changed", action="store_true", help="go on although the code or config.json changed")
    parser.add_argument("--coordinator", help="as in `just run`, for one of several processes")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process", type=int, help="index of this process, from 0")
    parser.add_argument("--join-timeout", type=int, default=300, help="seconds to wait for the other processes")
    try:
        parsed = parser.parse_args(arguments)
    except UsageError as error:
        return fail(f"just resume RUN: {RUN}" if not arguments else f"just resume RUN: {error}; RUN is {RUN}", 2)
    try:
        run = load_run(parsed.run)
        return run_experiment(run.experiment, run.config, _options(run, parsed))
    except UsageError as error:
        return fail(str(error), 2)
    except InvalidArgument as error:
        return fail_or_exit(error)


def _options(run: RecordedRun, parsed: argparse.Namespace) -> Options:
    """Returns the recorded options with those of the command line. Raises `UsageError` if the latter can't be."""
    changes = {name: getattr(parsed, name) for name in ("allow_changed", "coordinator", "processes", "process", "join_timeout")}
    if parsed.mesh is not None:
        changes |= {"mesh": None if parsed.mesh == "one" else parsed.mesh, "layout": parsed.layout}
    elif parsed.layout is not None:
        changes |= {"layout": parsed.layout}
    try:
        options = dataclasses.replace(run.options, run_dir=run.directory, **changes)
        check_fields(options)
    except InvalidArgument as error:
        raise UsageError(str(error)) from None
    return options

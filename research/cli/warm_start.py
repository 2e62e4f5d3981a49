"""A run that starts from weights that exist already: `--from RUN_OR_FILE`, `--only REGEX`, `--everything`."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from research.cli.arguments import print_error
from research.cli.contract import check_mapping
from research.cli.experiment import Experiment
from research.cli.fields import restore_config
from research.cli.options import Options
from research.cli.placement import Placed
from research.cli.runs import checkpoint_origin
from research.core.state import InvalidArgument
from research.distributed import processes
from research.reporting import record, run_files
from research.training import checkpoint, warm_start
from research.training.warm_start import RestoreReport
from research.training.weight_files import open_weights


def resolve_source(options: Options) -> Options:
    """Returns the options with `--from` as an absolute path: of a file or directory, or of the latest run of an experiment.

    >>> resolve_source(Options()).from_
    """
    if options.from_ is None:
        return options
    path = Path(options.from_)
    if not path.exists() and path.name == options.from_ and not path.suffix:
        path = record.find_run(options.from_, Path("runs"))
    return dataclasses.replace(options, from_=str(path.absolute()))


def check_source(directory: Path, options: Options) -> None:
    """Raises `InvalidArgument` if the source of a run that has not started can't be opened, before anything is built."""
    if options.from_ is None:
        return
    started = processes.broadcast_from_first(
        lambda: any((directory / name).exists() for name in ("checkpoints", warm_start.START))
    )
    if not started:
        with open_weights(options.from_, lambda line: None):
            pass


def first_state(
    run: record.Run, experiment: Experiment, config: Any, options: Options, placed: Placed
) -> tuple[Any, RestoreReport | None]:
    """Returns the state that a run without checkpoints starts from, and if weights were read for that, a report.

    A run that had started from other weights before, and was killed, starts from the same state: its source is not read again.
    """
    directory = run.checkpoints.parent
    saved = warm_start.restore_start(directory, placed.state, placed.learner.names, print_error, checkpoint_origin(run))
    if saved is not None or options.from_ is None:
        return (placed.state if saved is None else saved), None
    state, report = warm_start.restore(
        placed.learner,
        options.from_,
        placed.state,
        partial=True,
        only=options.only,
        mapping=check_mapping(experiment, config),
        everything=options.everything,
        report=print_error,
    )
    if processes.is_first():
        show_report(report)
    return state, report


def recorded_source(run: record.Run, options: Options) -> Options:
    """Returns the options of a run that goes on, with the source that it was started from: a checkpoint wins over `--from`."""
    if not (run.directory / "config.json").exists():  # another process than the first
        return options
    recorded = run_files.read_config(run.directory).options
    names = ("from_", "only", "everything")
    try:
        values = restore_config(Options, {name: recorded[name] for name in names if name in recorded})
    except InvalidArgument as error:
        raise InvalidArgument(f"{run.directory / 'config.json'}: options: {error}; correct it there.") from None
    source = {name: getattr(values, name) for name in names}
    if options.from_ not in (None, source["from_"]):
        print_error(f"--from {options.from_}: not read again, since the run has started already; choose a new --run-dir for it")
    return dataclasses.replace(options, **source)


def record_start(run: record.Run, report: RestoreReport, state: Any, names: Any) -> None:
    """Writes what was read, warm_start.json, and the initial state, start/: a resumed or replayed run needs no source."""
    record.write_json(run.directory / "warm_start.json", report._asdict())
    directory = run.checkpoints.parent / warm_start.START
    try:
        checkpoint.save(directory, 0, state, names, origin=checkpoint_origin(run))
    except OSError as error:
        raise InvalidArgument(f"{error}; free space or fix permissions, then run the same command again.") from error


def show_report(report: RestoreReport) -> None:
    """Prints a table of what was taken from a source, and what was not."""
    table = Table("", "leaves", "", box=None, pad_edge=False, title=escape(f"started from {report.source}"), title_justify="left")
    cast = [f"{name} ({change})" for name, change in report.cast.items()]
    rows = {"taken": report.taken, "cast": cast, "missing there": report.missing, "left there": report.left}
    for what, names in rows.items():
        if names:
            table.add_row(what, f"{len(names):,}", escape(", ".join(names[:3]) + (" ..." if len(names) > 3 else "")))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    console.print(table)

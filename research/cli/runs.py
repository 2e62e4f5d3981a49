"""Runs that exist already, by directory or by the name of their experiment."""

import dataclasses
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from research.cli import trust
from research.cli.contract import check_module
from research.cli.experiment import CHECKOUT, Experiment, load_experiment
from research.cli.fields import restore_config
from research.cli.members import as_population
from research.cli.options import Options
from research.core.state import InvalidArgument
from research.reporting import record, run_files
from research.training.manifest import Origin, config_digest


class RecordedRun(NamedTuple):
    """A run's directory, experiment, config, the options that it was started with, and what its checkpoints are of."""

    directory: Path
    experiment: Experiment
    config: Any
    options: Options
    origin: Origin


def load_run(run: str) -> RecordedRun:
    """Loads the run of a directory, or the latest of an experiment's name.

    Raises `InvalidArgument` if there is none, its config.json is damaged, the experiment does not have such a config, or it is a
    file that the user has not named on a command line before.

    >>> load_run("nothing")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: no run 'nothing': ...
    """
    directory = record.find_run(run, Path("runs"))
    recorded = run_files.read_config(directory)
    experiment = _load_own(directory, recorded)
    check_module(experiment)
    if {"population", "vary"} <= recorded.config.keys() - {field.name for field in dataclasses.fields(experiment.module.Config)}:
        experiment = as_population(experiment)
    config = _restore(directory, "config", experiment.module.Config, recorded.config)
    origin = checkpoint_origin(record.Run(directory, recorded.experiment, recorded.config, id=recorded.id))
    return RecordedRun(directory, experiment, config, _restore(directory, "options", Options, recorded.options), origin)


def _load_own(directory: Path, recorded: run_files.RecordedConfig) -> Experiment:
    """Imports the experiment of a run, if that is this package's or the user's own: importing runs its code."""
    name, file = recorded.experiment[:200], recorded.file
    if file is None:
        if name not in {path.stem for path in (CHECKOUT / "experiments").glob("[!_]*.py")}:
            raise InvalidArgument(f"{directory}: it is a run of {name!r}, and there is no such experiment here.")
        return load_experiment(name)
    if not os.path.isfile(file) or not file.endswith(".py"):
        raise InvalidArgument(
            f"{directory}: its experiment {file[:200]!r} is not there any more; move it back, or edit config.json."
        )
    if not trust.is_own(Path(file)) or str(Path(file).resolve()) != file:
        raise InvalidArgument(
            f"{directory}: its experiment is {file[:200]!r}, which you have not run here; if it is your own, name it once: "
            f"just run {shlex.quote(file[:200])} --run-dir {shlex.quote(str(directory))}"
        )
    return load_experiment(file)


def _restore(directory: Path, part: str, config_class: type, values: dict[str, Any]) -> Any:
    try:
        return restore_config(config_class, values)
    except InvalidArgument as error:
        advice = "correct it there, or continue the run with the code that wrote it"
        raise InvalidArgument(f"{directory / 'config.json'}: {part}: {str(error).rstrip('.')}; {advice}.") from None


def checkpoint_origin(run: record.Run) -> Origin:
    """Returns what the checkpoints of a run are of: the run's id, its experiment and its config.

    >>> checkpoint_origin(record.Run(Path("runs/digits/1"), "digits", {"epochs": 3}, id="3f2a")).run
    '3f2a'
    """
    return Origin(run.id, config_digest({"experiment": run.experiment, "config": run.config}))


def recorded_file(experiment: Experiment) -> str | None:
    """Returns the file by which a run finds its experiment again; None for one beside the package, which is found by its name.

    >>> recorded_file(load_experiment("digits"))
    >>> recorded_file(Experiment("mine", None, Path("/projects/mine.py")))
    '/projects/mine.py'
    """
    return None if experiment.file.parent == CHECKOUT / "experiments" else str(experiment.file)

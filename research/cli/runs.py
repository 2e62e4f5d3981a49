"""Runs that exist already, by directory or by the name of their experiment."""

from pathlib import Path
from typing import Any, NamedTuple

from research.cli.contract import check_module
from research.cli.experiment import CHECKOUT, Experiment, UnknownExperiment, load_experiment
from research.cli.fields import restore_config
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

    Raises `InvalidArgument` if there is none, its config.json is damaged, or the experiment does not have such a config.

    >>> load_run("nothing")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: no run 'nothing': ...
    """
    directory = record.find_run(run, Path("runs"))
    recorded = run_files.read_config(directory)
    try:
        experiment = load_experiment(recorded.file or recorded.experiment)
    except UnknownExperiment:
        if recorded.file is not None:
            file = recorded.file[:200]
            raise InvalidArgument(
                f"{directory}: its experiment {file!r} is not there any more; move it back, or edit config.json."
            ) from None
        raise InvalidArgument(
            f"{directory}: it is a run of {recorded.experiment[:200]!r}, and there is no such experiment here."
        ) from None
    check_module(experiment)
    config = _restore(directory, "config", experiment.module.Config, recorded.config)
    origin = checkpoint_origin(record.Run(directory, recorded.experiment, recorded.config, id=recorded.id))
    return RecordedRun(directory, experiment, config, _restore(directory, "options", Options, recorded.options), origin)


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

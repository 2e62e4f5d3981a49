"""The study of a sweep, in which Optuna keeps its trials: opened, continued and read."""

import argparse
import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.core.state import InvalidArgument
from research.errors import one_line

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# As lines and pages say it.
STATES = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
MIN_TRIALS = 10  # to tell which fields matter


def check_optuna() -> None:
    """Raises `InvalidArgument` if Optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InvalidArgument("a sweep needs Optuna: pip install 'research[sweep]'.") from error


@contextlib.contextmanager
def open_study(own: argparse.Namespace, directory: Path, experiment: str, arguments: list[str]) -> "Iterator[Study]":
    """Yields the study of a sweep, new or of an earlier start. Raises `InvalidArgument` if it can't be or is another's."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = own.storage or f"sqlite:///{directory.resolve() / 'sweep.db'}"
    name = own.study or experiment
    direction = optuna.study.StudyDirection.MAXIMIZE if own.metric.endswith(":max") else optuna.study.StudyDirection.MINIMIZE
    database = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        database = optuna.storages.RDBStorage(storage)
        study = optuna.create_study(study_name=name, storage=database, direction=direction, load_if_exists=True)
        identity = {"experiment": experiment, "options": arguments, "vary": own.vary, "metric": own.metric}
        for key, value in identity.items():
            recorded = study.user_attrs.get(key, value)
            if recorded != value:
                raise InvalidArgument(
                    f"study {name!r} there has another {key}, {recorded}: expected it again, or another "
                    f"--{'study' if own.storage else 'sweep-dir'}."
                )
            study.set_user_attr(key, value)
    except InvalidArgument:
        _close(database)
        raise
    except Exception as error:  # of the file system, the database or its driver
        _close(database)
        place = f"--storage {own.storage}" if own.storage else f"--sweep-dir {directory}"
        raise InvalidArgument(f"{place}: it can't be opened ({one_line(error)[:300]}); choose another.") from error
    samplers, pruners = optuna.samplers, optuna.pruners
    seed = own.sampler_seed + len(study.get_trials(deepcopy=False))  # else the next start would draw the same values again
    study.sampler = samplers.TPESampler(seed=seed) if own.sampler == "tpe" else samplers.RandomSampler(seed=seed)
    chosen = {"median": pruners.MedianPruner, "halving": pruners.SuccessiveHalvingPruner, "none": pruners.NopPruner}
    study.pruner = chosen[own.pruner]()
    try:
        yield study
    finally:
        _close(database)


def _close(database: Any) -> None:
    """Closes the connections to a database, if it is open: without that they stay until the garbage collector finds them."""
    if database is not None:
        database.remove_session()
        database.engine.dispose()


def latest(study: "Study") -> "list[FrozenTrial]":
    """Returns the trials of a study; of several of the same run, which was interrupted, the last."""
    by_run: dict[Any, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        where = trial.user_attrs.get("sweep"), trial.user_attrs.get("run"), trial.user_attrs.get("member")
        by_run[where if where[1] else trial.number] = trial
    return list(by_run.values())


def started(study: "Study") -> "list[FrozenTrial]":
    """Returns the trials of a study that are going on or have ended."""
    return [trial for trial in latest(study) if trial.state.name != "WAITING"]


def finished(study: "Study") -> "list[FrozenTrial]":
    """Returns the trials of a study that have ended."""
    return [trial for trial in latest(study) if trial.state.is_finished()]


def best_trial(study: "Study") -> "FrozenTrial | None":
    """Returns the trial with the best value, the first of equals; None if no trial has one."""
    complete = [(trial.value, trial) for trial in finished(study) if trial.state.name == "COMPLETE" and trial.value is not None]
    choose = max if study.direction.name == "MAXIMIZE" else min
    return choose(complete, key=lambda pair: pair[0])[1] if complete else None


def importances(study: "Study") -> dict[str, float]:
    """Returns the share of each field in the differences between trials; nothing where there are too few trials to tell."""
    import optuna

    if sum(trial.state.name == "COMPLETE" for trial in finished(study)) < MIN_TRIALS:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of too few trials to tell
            return dict(optuna.importance.get_param_importances(study))
    except (UserWarning, ValueError, RuntimeError):
        return {}


def grid(space: "dict[str, BaseDistribution]") -> list[dict[str, Any]]:
    """Returns all points of a grid. Raises `InvalidArgument` for a range, which has no points."""
    from optuna.distributions import CategoricalDistribution

    choices = {name: each.choices for name, each in space.items() if isinstance(each, CategoricalDistribution)}
    ranges = [name for name in space if name not in choices]
    if ranges:
        raise InvalidArgument(f"--vary {ranges[0]}=...: a grid has no ranges; expected {ranges[0]}=A:B:C.")
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*choices.values())]

"""Writes what others can use of a run's latest checkpoint: its Keras models, or its training step.

just export digits                       # model.keras and model.weights.h5
just export digits --step                # exported/STEP: programs for CPU, GPU and TPU, the state, and a script that trains on
just export digits --step --batches 100  # with the next 100 batches of the run
just export digits --member 3            # of a population: member 3 alone, in members/3; without --member the best one

Where TensorFlow is installed, --step writes the predictions as a SavedModel too.
"""

import importlib.util
import re
from pathlib import Path

from research.cli import members
from research.cli.arguments import Parser, UsageError, fail, print_error
from research.cli.contract import check_splits
from research.cli.errors import describe_error
from research.cli.outputs import build_models, save_models
from research.cli.runs import RecordedRun, load_run
from research.cli.startup import check_devices
from research.core.learner import Learner
from research.core.state import InvalidArgument
from research.reporting import record
from research.training import checkpoint, portable

MAX_BATCHES = 10_000


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main([])
    2
    """
    parser = Parser("just export", __doc__)
    parser.add_argument("run", help="a run directory, or an experiment's name for its latest run")
    parser.add_argument("--step", action="store_true", help="write the training step, for use without this package")
    parser.add_argument("--batches", type=int, default=3, help="how many of the run's next batches to write with it")
    parser.add_argument("--member", default="best", help="which member of a population: its number, or best")
    try:
        parsed = parser.parse_args(arguments)
        if parsed.member != "best" and not re.fullmatch("[0-9]{1,9}", parsed.member):
            raise UsageError(f"--member {parsed.member}: expected the number of a member, or best")
        if not 1 <= parsed.batches <= MAX_BATCHES:
            raise UsageError(f"--batches {parsed.batches}: expected a value in [1, {MAX_BATCHES}]")
    except UsageError as error:
        usage = "one run directory, or an experiment's name for its latest run"
        return fail(f"just export RUN: {error if arguments else usage}.", 2)
    try:
        check_devices()
        run = load_run(parsed.run)
    except InvalidArgument as error:
        return fail(str(error), 1)
    try:
        learner, restored = _restore(run)
        if run.experiment.member is not None or parsed.member != "best":
            run, learner, restored = _take_member(run, restored, parsed.member)
        if parsed.step:
            print(f"step {restored.step}: {_export_step(run, learner, restored, parsed.batches)}")
            return 0
        run.directory.mkdir(parents=True, exist_ok=True)
        paths = save_models(run.directory, build_models(run.experiment.module, run.config, restored.state))
    except InvalidArgument as error:
        return fail(str(error), 1)
    except Exception as error:
        return fail(f"{describe_error(error)}; nothing was exported.", 1)
    print(f"step {restored.step}: " + (", ".join(map(str, paths)) or f"{run.experiment.name} defines no Keras models"))
    return 0


def _restore(run: RecordedRun) -> tuple[Learner, checkpoint.Checkpoint]:
    directory = run.directory / "checkpoints"
    if not directory.exists():
        raise InvalidArgument(f"{run.directory}: it has no checkpoint yet; go on with it first: just resume {run.directory}")
    learner = run.experiment.module.build(run.config)
    restored = checkpoint.restore_latest(directory, learner.init(), learner.names, print_error, run.origin)
    assert restored is not None
    return learner, restored


def _take_member(
    run: RecordedRun, restored: checkpoint.Checkpoint, number: str
) -> tuple[RecordedRun, Learner, checkpoint.Checkpoint]:
    """Returns a member of a population as a run of its own, with its learner and its state at the checkpoint."""
    if run.experiment.member is None:
        raise InvalidArgument(f"--member {number}: {run.directory} is not a run of a population; leave the option out.")
    of_population = record.Run(run.directory, run.experiment.name, {})
    index = (
        members.best(of_population, run.options.keep_best, run.config.population, restored.step)
        if number == "best"
        else int(number)
    )
    if index >= run.config.population:
        raise InvalidArgument(f"--member {number}: the population has members 0 to {run.config.population - 1}.")
    experiment, config, state = members.take(run.experiment, run.config, restored.state, index)
    directory = run.directory if number == "best" else run.directory / "members" / str(index)
    print(f"member {index} of {run.config.population}, ", end="")
    alone = run._replace(directory=directory, experiment=experiment, config=config)
    return alone, experiment.module.build(config), restored._replace(state=state)


def _export_step(run: RecordedRun, learner: Learner, restored: checkpoint.Checkpoint, count: int) -> Path:
    data = check_splits(run.experiment, run.experiment.module.data(run.config))["train"]
    batches = [data.batch(step) for step in range(restored.step, restored.step + count)]
    folder = run.directory / "exported" / f"{restored.step:09d}"
    portable.export_step(learner, restored.state, batches, folder, step=restored.step, steps_per_epoch=data.steps_per_epoch)
    if importlib.util.find_spec("tensorflow") is not None and (folder / "predict.jax").exists():
        portable.write_saved_model(folder)
    return folder

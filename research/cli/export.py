"""Writes the Keras models of a run, with the weights of its latest checkpoint: `export RUN`."""

from research.cli.arguments import fail, print_error
from research.cli.errors import describe_error
from research.cli.outputs import build_models, save_models
from research.cli.runs import load_run
from research.cli.startup import check_devices
from research.core.state import InvalidArgument


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["--help"])
    2
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return fail("just export RUN: one run directory, or an experiment's name for its latest run.", 2)
    from research.training import checkpoint

    try:
        check_devices()
        run = load_run(arguments[0])
    except InvalidArgument as error:
        return fail(str(error), 1)
    module = run.experiment.module
    try:
        directory = run.directory / "checkpoints"
        if not directory.exists():
            raise InvalidArgument(f"{run.directory}: it has no checkpoint yet; go on with it first: just resume {run.directory}")
        learner = module.build(run.config)
        restored = checkpoint.restore_latest(directory, learner.init(), learner.names, print_error, run.origin)
        assert restored is not None
        paths = save_models(run.directory, build_models(module, run.config, restored.state))
    except InvalidArgument as error:
        return fail(str(error), 1)
    except Exception as error:
        return fail(f"{describe_error(error)}; nothing was exported.", 1)
    print(f"step {restored.step}: " + (", ".join(map(str, paths)) or f"{run.experiment.name} defines no Keras models"))
    return 0

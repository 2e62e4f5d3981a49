"""Checks an experiment's training: `check NAME [--option value ...]`, or `check path/to/mine.py ...`.

just check digits                    # the options are those of the experiment
just check digits --first-steps 10

Training that `research.supervised` made is compared with Keras' own `fit`, tensor by tensor. Every learner's step is looked
through for the traps of hand-written Keras steps, by experiments on it. The exit code is 0 if nothing is wrong.
"""

import dataclasses
from typing import Annotated, Any

from rich.console import Console

from research.cli import contract
from research.cli.arguments import UsageError, fail, parse
from research.cli.errors import describe_error
from research.cli.experiment import UnknownExperiment, load_experiment
from research.cli.fields import Interval
from research.cli.startup import check_devices
from research.core.state import InvalidArgument
from research.debugging.check import Check, check

USAGE = "just check NAME [--option value ...]: NAME is an experiment's name, or the path of its file."


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is checked."""

    first_steps: Annotated[int, Interval("[1, 10000]")] = 3
    """Number of the first training steps that are checked."""


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["digit"])
    2
    """
    if not arguments:
        return fail(USAGE, 2)
    if arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        return 0
    try:
        found = _check(*arguments)
    except (UnknownExperiment, UsageError) as error:
        return fail(str(error), 2)
    except InvalidArgument as error:
        return fail(str(error), 1)
    except Exception as error:  # the experiment's own code raises what it likes
        return fail(f"{describe_error(error)}; nothing was checked.", 1)
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)
    console.print(found)
    return 0 if found.problem is None else fail(found.problem, 1)


def _check(name: str, *arguments: str) -> Check:
    experiment = load_experiment(name)
    contract.check_module(experiment)
    module: Any = experiment.module
    config, options = parse(module.Config, Options, list(arguments), f"just check {name}", module.__doc__)
    contract.check_config(experiment, config)
    check_devices()
    splits = contract.check_splits(experiment, module.data(config))
    learner = contract.check_learner(experiment, module.build(config))
    return check(learner, splits["train"], steps=options.first_steps)

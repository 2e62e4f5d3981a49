"""Runs a step of a run again and shows what happens inside it: `replay RUN --step N`.

just replay digits --step 37    # writes runs/digits/.../replay/000000037/replay.html
"""

import os

from rich.console import Console

from research.cli import contract
from research.cli.arguments import Parser, UsageError, fail
from research.cli.errors import errors_as_one_line
from research.cli.placement import place
from research.cli.runs import RecordedRun, load_run
from research.cli.startup import check_devices, enable_compilation_cache
from research.core.state import InvalidArgument
from research.debugging import failures, history, replay_page
from research.debugging.replay import Replay, replay_step
from research.training import compiler_flags


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["digits"])
    2
    """
    parser = Parser("just replay", __doc__)
    parser.add_argument("run", help="a run directory, or an experiment's name for its latest run")
    parser.add_argument("--step", type=int, required=True, help="the step to run again, counted from 1")
    try:
        parsed = parser.parse_args(arguments)
    except UsageError as error:
        return fail(f"just replay RUN --step N: {error}; RUN is a run directory, or an experiment's name for its latest run.", 2)
    try:
        run = load_run(parsed.run)
        with errors_as_one_line(run.directory):
            return _replay(run, parsed.step)
    except InvalidArgument as error:
        return fail(str(error), 1)


def _replay(run: RecordedRun, number: int) -> int:
    if run.options.compiler_flags:
        compiler_flags.add_recommended_flags(os.environ)
    enable_compilation_cache()
    check_devices()
    splits = contract.check_splits(run.experiment, run.experiment.module.data(run.config))
    placed = place(run.experiment, run.config, run.options, splits)
    past = history.History(
        placed.learner,
        placed.splits["train"],
        run.directory / "checkpoints",
        lambda: place(run.experiment, run.config, run.options, splits).state,
        placed.state,
        run.origin,
        history.read_decisions(run.directory),
    )
    local = None if run.options.mesh is None else run.experiment.module.build(run.config)
    step = replay_step(past, run.directory, number, local)
    name = f"{run.experiment.name} · {run.directory.resolve().name} · step {number}"
    page = replay_page.write_replay(run.directory / "replay" / f"{number:09d}", step, name)
    _show(step)
    print(page)
    return 0


def _show(step: Replay) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)
    for name, value in replay_page.facts(step).items():
        console.print(f"{name:22}{value:.6g}" if isinstance(value, float) else f"{name:22}{value}")
    console.print()
    console.print(replay_page.layer_table(step))
    if step.blame is not None:
        console.print()
        console.print(failures.norm_table(step.blame))
    if step.row_losses:
        worst = [f"{row} ({step.row_losses[row]:.4g})" for row in replay_page.worst_rows(step, 8)]
        console.print(f"\nrows with the largest loss: {', '.join(worst)}")

"""Goes on with a run that was stopped: `resume.py RUN`, a run directory or an experiment's name for its latest."""

import run as runner


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return runner.refuse("just resume RUN: one run directory, or an experiment's name for its latest run.", 2)
    from research import Refused

    try:
        found = runner.recorded(arguments[0])
        options = runner.Options(run_dir=found.directory, **found.options)
        return runner.run(found.experiment, found.module, found.config, options)
    except Refused as refusal:
        return runner.refuse(str(refusal), 1)


if __name__ == "__main__":
    runner.as_program(main)

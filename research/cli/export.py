"""Writes a run's networks, as its newest checkpoint has them, as plain Keras files: `export.py RUN`."""

import sys

import run as runner


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return runner.refuse("just export RUN: one run directory, or an experiment's name for its latest run.", 2)
    from research import Refused, checkpoint

    try:
        found = runner.recorded(arguments[0])
        newest = checkpoint.newest(found.directory / "checkpoints", lambda line: print(line, file=sys.stderr))
        if newest is None:
            raise Refused(f"{found.directory}: it has no checkpoint yet; go on with it first: just resume {found.directory}")
        learner = found.module.build(found.config)
        at = checkpoint.restore(newest, learner.init(), learner.names)
        written = runner.export(found.directory, found.module, found.config, at.state)
    except Refused as refusal:
        return runner.refuse(str(refusal), 1)
    print(f"step {at.step}: " + (", ".join(map(str, written)) or f"{found.experiment} names no Keras models"))
    return 0


if __name__ == "__main__":
    runner.as_program(main)

"""Goes on with a run that was stopped: `resume.py RUN`, a run directory or an experiment's name for its latest."""

import importlib
import json
from pathlib import Path

import run as runner


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return runner.refuse("just resume RUN: one run directory, or an experiment's name for its latest run.", 2)
    from research import Refused, record

    try:
        directory = record.find(arguments[0], Path("runs"))
        found = json.loads((directory / "config.json").read_text())
        if found["experiment"] not in runner.experiments():
            return runner.refuse(f"{directory}: it is a run of {found['experiment']!r}, and there is no such experiment here.", 1)
        module = importlib.import_module(f"experiments.{found['experiment']}")
        options = runner.Options(run_dir=directory, **found.get("options", {}))
        return runner.run(found["experiment"], module, module.Config(**found["config"]), options)
    except Refused as refusal:
        return runner.refuse(str(refusal), 1)


if __name__ == "__main__":
    runner.as_program(main)

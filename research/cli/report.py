"""Writes a page about runs: `report.py RUN` that run's report.html, `report.py RUN RUN ... [--output FILE]` one with all."""

from pathlib import Path

import run as runner

USAGE = "just report RUN [RUN ...] [--output FILE]: run directories, or experiments' names for their latest runs."


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    names, output = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--output" or argument.startswith("--output="):
            output = argument.partition("=")[2] or next(remaining, "")
        else:
            names.append(argument)
    if not names or output == "" or any(name.startswith("-") for name in names):
        return runner.refuse(USAGE, 2)
    from research import Refused, picture, record, report

    try:
        runs = [record.read(path)[0] for path in dict.fromkeys(record.find(name, Path("runs")) for name in names)]
        if len(runs) > 1 or output is not None:
            path = report.comparison(runs, Path(output or "runs/report.html"))
        else:
            record.draw(runs[0], {"curves": picture.curves(record.entries(runs[0]))})
            path = report.page(runs[0])
    except Refused as refusal:
        return runner.refuse(str(refusal), 1)
    except OSError as error:
        return runner.refuse(f"{error.filename}: it can't be written ({error.strerror}); choose another place: --output FILE.", 1)
    print(path)
    return 0


if __name__ == "__main__":
    runner.as_program(main)

"""Writes a page about a run, report.html: `report RUN`; about several side by side: `report RUN RUN ... [--output FILE]`."""

from pathlib import Path

from research.cli.arguments import fail, print_error
from research.core.state import InvalidArgument

USAGE = "just report RUN [RUN ...] [--output FILE]: run directories, or experiments' names for their latest runs."


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["--output"])
    2
    """
    names, output = [], None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--output" or argument.startswith("--output="):
            output = argument.partition("=")[2] or next(remaining, "")
        else:
            names.append(argument)
    if not names or output == "" or any(name.startswith("-") for name in names):
        return fail(USAGE, 2)
    from research.reporting import comparison, picture, record, report

    try:
        directories = dict.fromkeys(record.find_run(name, Path("runs")) for name in names)
        runs = [record.read_run(directory, print_error)[0] for directory in directories]
        if len(runs) > 1 or output is not None:
            path = comparison.write_comparison(runs, Path(output or "runs/report.html"))
        else:
            record.save_figures(runs[0], {"curves": picture.plot_curves(record.read_entries(runs[0]))})
            path = report.write_report(runs[0], print_error)
    except InvalidArgument as error:
        return fail(str(error), 1)
    except (OSError, ValueError) as error:  # a path that can't be written, or that no file can have
        place = getattr(error, "filename", None) or output or runs[0].directory
        reason = getattr(error, "strerror", None) or "it is no path"
        return fail(f"{str(place)[:200]}: it can't be written ({reason}); choose another place: --output FILE.", 1)
    print(path)
    return 0

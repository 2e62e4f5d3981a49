"""Compares plans of a step on increasing numbers of chips: `scaling.py PLAN PLAN ... [--picture FILE]`; PLAN is a directory.

just plan digits --batch-size 256 --topology v5p:2x2x2 --mesh fsdp=8 --run-dir runs/8
just plan digits --batch-size 8192 --topology v5p:4x8x8 --mesh data=32,fsdp=8 --run-dir runs/256
just scaling runs/8 runs/256

Prints the memory and traffic of a chip and the step time at best, and plots their ratios to the smallest plan (`scaling.png`).
With a constant number of examples per chip, none of them should grow.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from research.cli.arguments import Parser, UsageError, fail

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: list[str]) -> int:
    """Runs the command line, and returns the exit code."""
    parser = Parser("just scaling", __doc__)
    parser.add_argument("plans", nargs="+", type=Path, help="directories that `just plan` wrote")
    parser.add_argument("--picture", type=Path, default=Path("scaling.png"), help="file of the plot")
    try:
        options = parser.parse_args(arguments)
    except UsageError as error:
        return fail(f"just scaling PLAN PLAN ...: {error}", 2)
    plans = []
    for directory in options.plans:
        try:
            plan = json.loads((directory / "plan.json").read_text())
        except (OSError, ValueError) as error:
            return fail(f"{directory}: its plan can't be read ({error}); expected a directory that `just plan` wrote.", 1)
        if not plan["fits"]:
            return fail(f"{directory}: its plan does not fit in memory; expected plans that do.", 1)
        plans.append(plan)
    plans.sort(key=lambda plan: plan["chips"])
    print(markdown_table(plans))
    plot(plans).savefig(options.picture, dpi=110)
    print(options.picture)
    return 0


def costs_per_chip(plan: dict[str, Any]) -> dict[str, float]:
    """Returns the costs to compare."""
    return {
        "GiB": plan["hbm_gib"]["total"],
        "GB received": sum(collective["bytes"] for collective in plan["collectives"].values()) / 1e9,
        "TFLOP": plan["flops"] / 1e12,
        "ms a step at best": plan["roofline"]["step"] * 1e3,
    }


def markdown_table(plans: list[dict[str, Any]]) -> str:
    """Returns a table in Markdown; after each number its ratio to the first plan's.

    >>> plan = {"topology": "v5e:2x4", "mesh": {"data": 8}, "chips": 8, "batch": 64, "hbm_gib": {"total": 2.0}, "flops": 10**12}
    >>> plan |= {"collectives": {"all-reduce": {"count": 1, "bytes": 10**9}}, "roofline": {"step": 0.5, "utilisation": 0.6}}
    >>> print(markdown_table([plan]))
    | topology | mesh | examples a chip | GiB | GB received | TFLOP | ms a step at best | of peak |
    | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
    | v5e:2x4 | data=8 | 8 | 2.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) | 500.00 (1.00) | 60.0% |
    """
    first = costs_per_chip(plans[0])
    lines = [
        f"| topology | mesh | examples a chip | {' | '.join(first)} | of peak |",
        f"| --- | --- |{' ---: |' * (len(first) + 2)}",
    ]
    for plan in plans:
        mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
        cells = [f"{cost:.2f} ({cost / first[name]:.2f})" for name, cost in costs_per_chip(plan).items()]
        examples, utilisation = plan["batch"] / plan["chips"], plan["roofline"]["utilisation"]
        lines.append(f"| {plan['topology']} | {mesh} | {examples:g} | {' | '.join(cells)} | {utilisation:.1%} |")
    return "\n".join(lines)


def plot(plans: list[dict[str, Any]]) -> "Figure":
    """Returns a plot of each cost per chip, relative to the smallest plan, over the number of chips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    chips, first = [plan["chips"] for plan in plans], costs_per_chip(plans[0])
    for (name, start), style in zip(first.items(), ("o-", "s-", "^-", "d-"), strict=True):
        ratios = [costs_per_chip(plan)[name] / start for plan in plans]
        axes.plot(chips, ratios, style, label=f"{name} ({start:.3g} on {chips[0]})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(chips, [f"{count:,}" for count in chips])
    axes.set(xlabel="chips", ylabel=f"per chip, relative to {chips[0]} chips", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

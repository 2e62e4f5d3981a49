"""How a step scales, from plans of it on ever more chips: `scaling.py PLAN PLAN ... [--picture FILE]`; PLAN: a directory.

just plan digits --batch-size 256 --topology v5p:2x2x2 --mesh fsdp=8 --run-dir runs/8
just plan digits --batch-size 8192 --topology v5p:4x8x8 --mesh data=32,fsdp=8 --run-dir runs/256
just scaling runs/8 runs/256

Shows memory and traffic of a chip and the step at best, and draws them over those of the smallest plan (in `scaling.png`). At
constant examples a chip nothing of it should grow.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import run as runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = runner.Parser("just scaling", __doc__)
    parser.add_argument("plans", nargs="+", type=Path, help="directories that `just plan` wrote")
    parser.add_argument("--picture", type=Path, default=Path("scaling.png"), help="where it is drawn")
    try:
        asked = parser.parse_args(arguments)
    except runner.Wrong as wrong:
        return runner.refuse(f"just scaling PLAN PLAN ...: {wrong}", 2)
    found = []
    for directory in asked.plans:
        try:
            found.append(json.loads((directory / "plan.json").read_text()))
        except (OSError, ValueError) as error:
            return runner.refuse(f"{directory}: no plan can be read in it ({error}); expected a directory of `just plan`.", 1)
        if not found[-1]["fits"]:
            return runner.refuse(f"{directory}: what it plans does not fit; expected plans that do.", 1)
    found.sort(key=lambda plan: plan["chips"])
    print(table(found))
    picture(found).savefig(asked.picture, dpi=110)
    print(asked.picture)
    return 0


def measured(plan: dict[str, Any]) -> dict[str, float]:
    """What is compared, of one chip."""
    return {
        "GiB": plan["hbm_gib"]["total"],
        "GB received": sum(each["bytes"] for each in plan["collectives"].values()) / 1e9,
        "TFLOP": plan["flops"] / 1e12,
        "ms a step at best": plan["roofline"]["step"] * 1e3,
    }


def table(plans: list[dict[str, Any]]) -> str:
    """The plans as a table in Markdown, beside each number its ratio to the first plan's.

    >>> plan = {"topology": "v5e:2x4", "mesh": {"data": 8}, "chips": 8, "batch": 64, "hbm_gib": {"total": 2.0}, "flops": 10**12}
    >>> plan |= {"collectives": {"all-reduce": {"count": 1, "bytes": 10**9}}, "roofline": {"step": 0.5, "utilisation": 0.6}}
    >>> print(table([plan]))
    | topology | mesh | examples a chip | GiB | GB received | TFLOP | ms a step at best | of peak |
    | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
    | v5e:2x4 | data=8 | 8 | 2.00 (1.00) | 1.00 (1.00) | 1.00 (1.00) | 500.00 (1.00) | 60.0% |
    """
    first = measured(plans[0])
    lines = [
        f"| topology | mesh | examples a chip | {' | '.join(first)} | of peak |",
        f"| --- | --- |{' ---: |' * (len(first) + 2)}",
    ]
    for plan in plans:
        grid = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
        cells = [f"{value:.2f} ({value / first[name]:.2f})" for name, value in measured(plan).items()]
        share = f"{plan['batch'] / plan['chips']:g}"
        lines.append(f"| {plan['topology']} | {grid} | {share} | {' | '.join(cells)} | {plan['roofline']['utilisation']:.1%} |")
    return "\n".join(lines)


def picture(plans: list[dict[str, Any]]) -> "Figure":
    """Each number of a chip over that of the smallest plan, by the number of chips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    chips, first = [plan["chips"] for plan in plans], measured(plans[0])
    for (name, start), style in zip(first.items(), ("o-", "s-", "^-", "d-"), strict=True):
        axes.plot(chips, [measured(plan)[name] / start for plan in plans], style, label=f"{name} ({start:.3g} on {chips[0]})")
    axes.set_xscale("log", base=2)
    axes.set_xticks(chips, [f"{count:,}" for count in chips])
    axes.set(xlabel="chips", ylabel=f"of a chip, over that on {chips[0]}", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

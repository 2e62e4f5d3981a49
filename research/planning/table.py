"""Plans and rankings of plans as tables for a terminal."""

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from research.planning.search import rank

GIB = 1 << 30
_SKIP_REASONS = 8  # lines in the caption of a ranking


def plan_table(plan: dict[str, Any]) -> Table:
    """Returns the table of a plan, as plan.json holds it.

    >>> memory = {"arguments": 12.0, "temporaries": 8.0, "total": 20.0, "limit": 15.75}
    >>> plan = {"experiment": "digits", "topology": "v5e:2x4", "mesh": {"data": 8}, "chips": 8, "layout": "data", "batch": 64}
    >>> plan |= {"tokens_per_chip": None, "parameters": 38_410, "remark": "", "fits": False, "hbm_gib": memory, "largest": []}
    >>> plan_table({**plan, "donation_misses": {}, "replicated": {}}).title
    'digits on v5e:2x4'
    """
    table = Table(title=f"{plan['experiment']} on {plan['topology']}", show_header=False, title_justify="left", min_width=76)
    table.add_column(style="bold")
    table.add_column()
    tokens = "" if plan["tokens_per_chip"] is None else f", {plan['tokens_per_chip']:,.0f} tokens a chip"
    axes = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    table.add_row("chips", f"{plan['chips']:,} as {axes}; layout {plan['layout']}")
    table.add_row("batch", f"{plan['batch']:,} examples on all chips{tokens}")
    table.add_row("parameters", f"{plan['parameters']:,}" + (f" ({plan['remark']})" if plan["remark"] else ""))
    table.add_section()
    _add_memory(table, plan)
    if plan["fits"]:
        table.add_section()
        _add_roofline(table, plan)
        table.caption = (
            "At best: links at full rate; compute, memory and network overlap completely.\n"
            "float32 products count as one bfloat16 pass, unless a higher precision is set."
        )
        table.caption_justify = "left"
    return table


def ranking_table(results: list[dict[str, Any]]) -> Table:
    """Returns the table of a search: what fits, what does not, and in the caption the reasons for skipping the others.

    >>> ranking_table([{"mesh": "data=8", "batch": 2, "skipped": "no time left"}]).caption
    '1 skipped: no time left'
    """
    table = Table(title="a step at best, by mesh", title_justify="left", box=SIMPLE, caption_justify="left")
    table.add_column("mesh", no_wrap=True)
    for name in ("batch", "GiB", "examples/s", "of peak"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by")
    skipped: dict[str, int] = {}
    for result in rank(results):
        if "skipped" in result:
            reason = "could not be faster than the best" if result["skipped"].startswith("at most") else result["skipped"]
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        mesh = result["mesh"] + (" remat" if result.get("remat") else "")
        cells = [mesh, f"{result['batch']:,}", f"{result['gib']:.2f}"]
        if result["fits"]:
            bound = result["bound_by"].removeprefix("network (").removesuffix(")")
            table.add_row(*cells, f"{result['examples_per_second']:,.0f}", f"{result['utilisation']:.1%}", bound)
        else:
            table.add_row(*cells, "", "", "does not fit")
    reasons = sorted(skipped.items(), key=lambda item: -item[1])
    table.caption = "\n".join(f"{count} skipped: {reason}" for reason, count in reasons[:_SKIP_REASONS]) or None
    return table


def decimal_units(number: int | float, unit: str) -> str:
    """Returns a number with three digits and a decimal prefix.

    >>> decimal_units(1234567, "B"), decimal_units(12, "FLOP")
    ('1.23 MB', '12 FLOP')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def binary_bytes(size: int | float) -> str:
    """Returns a number of bytes in GiB or MiB.

    >>> binary_bytes(3 * 2**29), binary_bytes(1000)
    ('1.50 GiB', '0.00 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:.2f} MiB"


def duration(seconds: float) -> str:
    """Returns a number of seconds in s, ms or us.

    >>> duration(0.0123), duration(2e-7)
    ('12.3 ms', '0.2 us')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _add_memory(table: Table, plan: dict[str, Any]) -> None:
    memory = {part: size * GIB for part, size in plan["hbm_gib"].items()}
    rest = memory["total"] - memory["arguments"] - memory["temporaries"]
    parts = f"{binary_bytes(memory['arguments'])} of arguments, {binary_bytes(memory['temporaries'])} of temporaries"
    parts += f", {binary_bytes(rest)} of code and results" if rest >= 0.01 * memory["total"] else ""
    excess = memory["total"] - memory["limit"]
    verdict = "fits" if plan["fits"] else f"does not fit: {binary_bytes(excess)} too much"
    table.add_row("memory", f"{binary_bytes(memory['total'])} of {binary_bytes(memory['limit'])} a chip: {verdict}\n{parts}")
    for array in plan["largest"][:5]:
        table.add_row("", f"{array['gib']:.2f} GiB  {array['shape']}  {array['what']}")
    if not plan["fits"]:
        table.add_row("what helps", "more fsdp, a smaller batch a chip, remat, or accumulate (a batch in parts)")
    for title, key, explanation in (
        ("not donated", "donation_misses", "in memory twice, as argument and as result"),
        ("replicated", "replicated", "complete on every chip, not split by this layout"),
    ):
        leaves = sorted(plan[key].items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} ({decimal_units(size, 'B')})" for name, size in leaves[:3])
        if leaves:
            more = f", and {len(leaves) - 3} more" if len(leaves) > 3 else ""
            table.add_row(title, f"{names}{more}: {explanation}")


def _add_roofline(table: Table, plan: dict[str, Any]) -> None:
    roofline = plan["roofline"]
    table.add_row("model", f"{decimal_units(plan['model_flops'], 'FLOP')} on all chips, without recomputation")
    received = sum(collective["bytes"] for collective in plan["collectives"].values())
    for title, part, amount in (
        ("compute", "compute", f"{decimal_units(plan['flops'], 'FLOP')} a chip"),
        ("memory traffic", "memory", f"{decimal_units(plan['memory_bytes'], 'B')} a chip"),
        ("network", "network", f"{decimal_units(received, 'B')} received by a chip"),
    ):
        table.add_row(title, f"{duration(roofline[part]):>10}  {amount}")
    for name, collective in plan["collectives"].items():
        table.add_row("", f"{'':10}  {decimal_units(collective['bytes'], 'B')} by {collective['count']:,} {name}")
    table.add_section()
    speed = f"{plan['batch'] / roofline['step']:,.0f} examples/s" if roofline["step"] else "nothing to do"
    table.add_row("a step at best", f"{duration(roofline['step']):>10}  {speed}; bound by {plan['bound_by']}")
    table.add_row("utilisation", f"{roofline['utilisation']:.1%} of the chips' peak, at best")
    table.add_row("compiled in", f"{plan['compile_seconds']:.1f} s")

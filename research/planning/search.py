"""Searches for the fastest way to spread a step, and for the largest batch: what `just plan --search` and `--max-batch` do.

Each way is compiled by a process of its own (`plan.py` once more), one after the other, so that no memory adds up.
"""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import run as runner

from research import record

if TYPE_CHECKING:
    from plan import Options, Subject

    from research.chips import Chip

PLAN = Path(__file__).parent / "plan.py"
LARGEST = 1 << 20  # examples a part of the mesh: nobody asks for more
TENSOR = (1, 2, 4, 8, 16)  # beyond, chips wait for each other in every layer


class Trial(NamedTuple):
    """One way to spread the work."""

    axes: dict[str, int]
    batch: int
    remat: bool | None

    @property
    def told(self) -> dict[str, Any]:
        """It, for a person and for search.json."""
        mesh = ",".join(f"{axis}={size}" for axis, size in self.axes.items())
        return {"mesh": mesh, "batch": self.batch, **({} if self.remat is None else {"remat": self.remat})}


def search(subject: "Subject", options: "Options", arguments: list[str], directory: Path) -> None:
    """Tries what may be fastest first; leaves out what can't fit or can't be faster than what was found, and says so."""
    from rich.console import Console
    from rich.live import Live

    from research import Refused

    began, console, path = time.monotonic(), Console(highlight=False), directory / "search.json"
    trials, results = candidates(subject, options)

    with Live(ranking(results), console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        for bound, trial in trials:
            left = options.minutes * 60 - (time.monotonic() - began)
            why = needless(trial, bound, results)
            if why is None and left <= 0:
                why = "no time left"
            result = tried(subject, options, arguments, trial, left) if why is None else {"skipped": why}
            results.append({**trial.told, **result})
            record.write_json(path, {"topology": options.topology, "experiment": subject.name, "tried": ranked(results)})
            if live is not None:
                live.update(ranking(results), refresh=True)
            elif "skipped" not in result:
                print(json.dumps(results[-1]), flush=True)
    if live is None:
        console.print(ranking(results))
    if not best(results):
        raise Refused(f"--search: nothing fits of what was tried; {path} says why: try larger chips, or more.")
    console.print(f"{path}", soft_wrap=True)


def needless(trial: Trial, bound: float, results: list[dict[str, Any]]) -> str | None:
    """Why a way that gives no more than `bound` examples a second need not be compiled after what was found; None if it has to.

    >>> found = [{"mesh": "data=2", "batch": 8, "remat": False, "fits": True, "examples_per_second": 100.0}]
    >>> needless(Trial({"data": 2}, 8, True), 200.0, found), needless(Trial({"data": 2}, 16, False), 90.0, found)
    ('fits without remat', 'at most 90 examples/s')
    """
    if bound <= best(results):
        return f"at most {bound:,.0f} examples/s"
    alike = [each for each in results if each["mesh"] == trial.told["mesh"]]
    if any(each["batch"] <= trial.batch and (each.get("remat") or not trial.remat) for each in alike if each.get("refused")):
        return "less did not fit"
    if trial.remat and any(each["batch"] == trial.batch and not each["remat"] for each in alike if each.get("fits")):
        return "fits without remat"
    return None


def best(results: list[dict[str, Any]]) -> float:
    """The most examples a second among what fits.

    >>> best([{"fits": False}])
    0.0
    """
    return max((each["examples_per_second"] for each in results if each.get("fits")), default=0.0)


def candidates(subject: "Subject", options: "Options") -> tuple[list[tuple[float, Trial]], list[dict[str, Any]]]:
    """What is worth compiling, each with the examples a second that it can't exceed, in order; and what is not, with the reason.

    What can be fastest comes first; of equals what splits weights most, for it fits, and layers least.
    """
    import jax

    from research import Refused, chips, parallel
    from research import plan as planning
    from research.flops import model_flops

    chip, count = chips.slice_of(options.topology)
    devices = planning.topology(options.topology)
    learner, shapes, base, _ = subject.make()
    batch = jax.tree.leaves(base)[0].shape[0]
    remats = (False, True) if any(field.name == "remat" for field in dataclasses.fields(subject.config)) else (None,)
    needed = model_flops(learner.train, shapes, base) / batch  # for one example
    trials: list[tuple[float, Trial]] = []
    left_out: list[dict[str, Any]] = []
    for axes in grids(count):
        told = Trial(axes, batch, None).told
        try:
            mesh = planning.wired(devices, options.topology, axes)
            placed = parallel.shardings(learner.names, shapes, mesh, parallel.fitting(mesh))
        except Refused as error:
            reason = " ".join(str(error).split()).partition(";")[0]
            left_out.append({**told, "skipped": reason.removeprefix(f"mesh: {told['mesh']} ")})
            continue
        split = any("tensor" in jax.tree.leaves(tuple(each.spec)) for each in jax.tree.leaves(placed))
        leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True)
        state = sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in leaves)
        parts = axes.get("data", 1) * axes.get("fsdp", 1)
        for trial in (Trial(axes, times * batch, remat) for times in (1, 2, 4) for remat in remats):
            if trial.batch % parts:
                left_out.append({**trial.told, "skipped": f"{trial.batch} examples do not divide into {parts} parts"})
            elif axes.get("tensor", 1) > 1 and not split:
                left_out.append({**trial.told, "skipped": "no layer can be split so"})
            elif state > chip.memory:
                left_out.append({**trial.told, "skipped": f"the state alone takes {state / chips.GIB:.2f} GiB a chip"})
            else:
                trials.append((ceiling(chip, count, needed, state, trial.batch), trial))
    trials.sort(key=lambda each: (-each[0], each[1].axes.get("tensor", 1), -each[1].axes.get("fsdp", 1), each[1].remat is True))
    return trials, left_out


def ceiling(chip: "Chip", count: int, needed: float, state: int, batch: int) -> float:
    """The examples a second that so many chips can't exceed.

    Each example takes `needed` FLOPs, each step reads the `state`, its bytes on a chip, once. Where computing is the bound it is
    the same number to the last bit whatever the batch, so that what is equal stays in order.

    >>> from research.chips import slice_of
    >>> v5e, count = slice_of("v5e:2x4")
    >>> ceiling(v5e, count, 1e12, 10**6, 64), ceiling(v5e, count, 0, 819 * 10**6, 64)
    (1576.0, 64000.0)
    """
    by_memory = batch * chip.bandwidth / state
    return min(count * chip.flops / needed, by_memory) if needed else by_memory


def grids(count: int) -> list[dict[str, int]]:
    """Every way to lay out so many chips over data, fsdp and tensor.

    >>> grids(2)
    [{'fsdp': 2}, {'data': 2}, {'tensor': 2}]
    """
    found = []
    for tensor in TENSOR:
        rest = count // tensor if count % tensor == 0 else 0
        for data in (size for size in range(1, rest + 1) if rest % size == 0):
            axes = {"data": data, "fsdp": rest // data, "tensor": tensor}
            found.append({axis: size for axis, size in axes.items() if size > 1} or {"data": 1})
    return found


def tried(subject: "Subject", options: "Options", arguments: list[str], trial: Trial, left: float) -> dict[str, Any]:
    """What another process says of one way."""
    kept = without(arguments, ("--mesh", "--batch-size", "--run-dir", "--minutes"), ("--search", "--max-batch"))
    told = [*kept, "--mesh", trial.told["mesh"], "--batch-size", str(trial.batch)]
    if trial.remat is not None:
        told = without(told, (), ("--no-remat",))
        kind = next(field.type for field in dataclasses.fields(subject.config) if field.name == "remat")
        if kind is bool:
            told = [*without(told, (), ("--remat",)), "--remat" if trial.remat else "--no-remat"]
        else:  # None, too, may be said
            told = [*without(told, ("--remat",), ()), "--remat", str(trial.remat)]
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(PLAN), *told, "--run-dir", directory]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(left, 1.0))
        except subprocess.TimeoutExpired:
            return {"skipped": f"not compiled in the {left:.0f} s that were left"}
        if done.returncode:
            return {"skipped": (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")}
        found = json.loads((Path(directory) / "plan.json").read_text())
    memory = found["hbm_gib"]
    told = {"fits": found["fits"], "gib": memory["total"], "limit": memory["limit"], "compile_seconds": found["compile_seconds"]}
    if not found["fits"]:
        # A compiler that is short of memory computes more again: where it found a program that is just too large, more may fit.
        return {**told, "refused": found["roofline"] is None}
    step, used = found["roofline"]["step"], found["roofline"]["utilisation"]
    speed = {"examples_per_second": found["batch"] / step, "step": step, "utilisation": used, "bound_by": found["bound_by"]}
    return {**told, **speed}


def ranked(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits, the fastest first; then what does not fit; then what was left out."""
    return sorted(results, key=lambda each: ("skipped" in each, not each.get("fits"), -each.get("examples_per_second", 0.0)))


def ranking(results: list[dict[str, Any]]) -> Any:
    """What was found so far, for a person: what fits and what does not, and a line for each reason to leave something out."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(title="a step at best, by mesh", title_justify="left", box=SIMPLE, caption_justify="left")
    shown.add_column("mesh", no_wrap=True)
    for name in ("batch", "GiB", "examples/s", "of peak"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("bound by")
    left_out: dict[str, int] = {}
    for each in ranked(results):
        if "skipped" in each:
            why = "could not be faster than the best" if each["skipped"].startswith("at most") else each["skipped"]
            left_out[why] = left_out.get(why, 0) + 1
            continue
        mesh = each["mesh"] + {None: "", True: " remat", False: ""}[each.get("remat")]
        row = [mesh, f"{each['batch']:,}", f"{each['gib']:.2f}"]
        if each["fits"]:
            bound = each["bound_by"].removeprefix("network (").removesuffix(")")
            shown.add_row(*row, f"{each['examples_per_second']:,.0f}", f"{each['utilisation']:.1%}", bound)
        else:
            shown.add_row(*row, "", "", "does not fit")
    reasons = sorted(left_out.items(), key=lambda item: -item[1])
    shown.caption = "\n".join(f"{count} left out: {why}" for why, count in reasons[:8]) or None
    return shown


def max_batch(subject: "Subject", options: "Options", arguments: list[str], directory: Path) -> None:
    """Doubles the batch until it does not fit, then halves the distance between what fits and what does not."""
    from research import Refused
    from research import plan as planning

    began = time.monotonic()
    mesh = planning.wired(planning.topology(options.topology), options.topology, runner.axes(options.mesh))
    parts, tries = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1), []

    about = {"topology": options.topology, "experiment": subject.name}

    def fits(size: int) -> bool:
        left = options.minutes * 60 - (time.monotonic() - began)
        found = (
            tried(subject, options, arguments, Trial(dict(mesh.shape), size * parts, None), left)
            if left > 0
            else {"skipped": "no time left"}
        )
        tries.append({"batch": size * parts, **found})
        told = found.get("skipped") or f"{found['gib']:.2f} of {found['limit']:.2f} GiB"
        print(f"{size * parts:12,} examples  {told}", flush=True)
        if "skipped" in found:
            fitting = [each["batch"] for each in tries if each.get("fits")]
            seen = f"; {max(fitting):,} fit" if fitting else ""
            record.write_json(directory / "search.json", {**about, "tried": tries})
            raise Refused(f"--max-batch: {size * parts:,} examples: {told}{seen}; give more --minutes, or mend that.")
        return bool(found["fits"])

    low, high = 0, 1
    while high <= LARGEST and fits(high):
        low, high = high, 2 * high
    while high <= LARGEST and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    record.write_json(
        directory / "search.json", {**about, "mesh": dict(mesh.shape), "max_batch": low * parts or None, "tried": tries}
    )
    if not low:
        raise Refused(f"--max-batch: {parts} examples, one for each part of the mesh, do not fit: split weights over more chips.")
    end = f"{high * parts:,} do not" if high <= LARGEST else "more were not tried"
    print(f"{low * parts:,} examples fit; {end}\n{directory / 'search.json'}")


def without(arguments: list[str], valued: tuple[str, ...], flags: tuple[str, ...]) -> list[str]:
    """A command line without some options.

    >>> without(["digits", "--mesh", "data=8", "--search", "--units=3"], ("--mesh",), ("--search",))
    ['digits', '--units=3']
    """
    kept, given = [], iter(arguments)
    for each in given:
        option, equals, _ = each.partition("=")
        option = option.replace("_", "-") if option.startswith("--") else option
        if option in valued and not equals:
            next(given, None)
        elif option not in (*valued, *flags):
            kept.append(each)
    return kept

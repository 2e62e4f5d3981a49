"""The same training side by side: this library, JAX by hand, Keras on three backends, PyTorch, Flax NNX.

    just bench                                            # everything; about an hour on two cores
    just bench digits-mlp-32 convnet-64                   # these workloads
    just bench digits-mlp-32 --systems research jax-scan  # these systems

What is trained is told in scripts/benchmarks/workloads.py, how each system does it in scripts/benchmarks/with_*.py. Every system
runs in a process of its own; all of a workload are alive at once and take turns, so that a ratio compares neighbours in time. The
run directory gets bench.json, bench.md (the same as tables) and bench.png. Run again into the same directory: goes on with the
workloads that are missing.

Ratios are medians over the rounds, with the interval that holds the median with 95% confidence or more (from the ranks, without
any assumption about the noise). All systems start anew for each sitting, since where a process' memory lies makes it faster or
slower throughout. The first start of a system fills JAX's compilation cache; seconds to the first step are those of later starts,
from the start of the process. Memory is the peak of the process over what it had after its imports.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import run as runner

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import worker
import workloads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "research": "research",
    "research-unfused": "research, a hook at each step",
    "research-reordered": "research, sums reordered",
    "research-fit": "research.fit",
    "jax-scan": "JAX by hand, scan (the floor)",
    "jax-loop": "JAX by hand, loop",
    "keras-jax": "Keras fit, JAX",
    "keras-jax-32": "Keras fit, JAX, 32 steps per execution",
    "keras-tensorflow": "Keras fit, TensorFlow, 32 steps per execution",
    "keras-torch": "Keras fit, PyTorch",
    "torch": "PyTorch",
    "flax-nnx": "Flax NNX",
}
PEERS = ("keras-jax", "keras-jax-32", "keras-tensorflow", "keras-torch", "torch", "flax-nnx")
RATIOS = {
    "ours_over_floor": ("research", "jax-scan"),
    "keras_over_ours": ("keras-jax", "research"),
    "keras32_over_ours": ("keras-jax-32", "research"),
    "keras_over_fit": ("keras-jax", "research-fit"),
    "reordered_over_ours": ("research-reordered", "research"),
}
PACKAGES = ("jax", "jaxlib", "keras", "tensorflow", "torch", "flax", "optax", "numpy")
NEEDS = dict.fromkeys(TITLES, "jax") | {
    "keras-tensorflow": "tensorflow",
    "keras-torch": "torch",
    "torch": "torch",
    "flax-nnx": "flax",
}
CORE = Path(__file__).parents[1] / ".venv" / "bin" / "python"  # where Keras does not find TensorFlow and PyTorch, and import them
PAUSE = 0.3  # seconds, in which threads that wait in a circle for more work give up


class Failed(Exception):
    """Nothing goes on: one line says why and what to do."""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__, formatter_class=formatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(workloads.WORKLOADS)} (default: all)")
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", default=list(TITLES), help=f"of {', '.join(TITLES)}")
    parser.add_argument("--rounds", type=positive, default=10, help="times that each system is run (default: 10)")
    parser.add_argument("--seconds", type=float, default=0.7, help="about how long each time (default: 0.7)")
    parser.add_argument("--sittings", type=positive, default=2, help="times that all start anew, rounds in each (default: 2)")
    parser.add_argument("--run-dir", type=Path, help="default: a new directory under runs/bench/")
    options = parser.parse_args(arguments)
    for kind, given, known in (("workload", options.workloads, workloads.WORKLOADS), ("system", options.systems, TITLES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            return runner.refuse(f"no {kind} {unknown[0]!r}: there are {', '.join(known)}.", 2)
    needed = {NEEDS[system] for system in options.systems}
    missing = sorted(package for package in needed if importlib.util.find_spec(package) is None)
    if missing:
        return runner.refuse(f"no {', no '.join(missing)} in this environment: `just bench` installs what it needs.", 1)
    from rich.console import Console

    from research import record

    directory = options.run_dir or record.new_directory("bench", Path("runs"))
    config = {"systems": options.systems, "rounds": options.rounds, "seconds": options.seconds, "sittings": options.sittings}
    console = Console(highlight=False, soft_wrap=True)
    try:
        found = begun(directory, config)
        directory.mkdir(parents=True, exist_ok=True)
        for name in options.workloads or workloads.WORKLOADS:
            if name not in found["ratios"]:
                rows = workload(name, config, directory, console)
                found["rows"] += rows
                found["ratios"][name] = ratios(rows)
                record.write(directory / "bench.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    except Failed as failure:
        return runner.refuse(str(failure), 1)
    except OSError as error:
        return runner.refuse(f"--run-dir {directory}: it can't be written ({error.strerror}); choose a directory of yours.", 1)
    record.write(directory / "bench.md", tables(found))
    picture(found).savefig(directory / "bench.png", dpi=110)
    console.print(tables(found))
    print(directory / "bench.json")
    return 0


def positive(text: str) -> int:
    """An option's number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def begun(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a directory holds of this benchmark; the beginnings of it where there is none. Raises `Failed` for something else."""
    if (directory / "bench.json").exists():
        found = json.loads((directory / "bench.json").read_text())
        if found["config"] != config:
            raise Failed(f"--run-dir {directory}: it holds a benchmark with other options; choose another directory.")
        return found
    if directory.exists() and any(directory.iterdir()):
        raise Failed(f"--run-dir {directory}: it is not empty and holds no benchmark; choose a new directory.")
    return {"config": config, "machine": machine(), "rows": [], "ratios": {}}


def machine() -> dict[str, Any]:
    """What the figures are of."""
    from research import record

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory[0]) if memory else None,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES if importlib.util.find_spec(package)},
        "revision": record.versions()["revision"],
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def workload(name: str, config: dict[str, Any], directory: Path, console: Any) -> list[dict[str, Any]]:
    """A row for each system on one workload."""
    work = workloads.WORKLOADS[name]
    console.print(f"{name}: {work.steps} steps of {work.batch_size} in an epoch")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        data, cache = Path(scratch, "data"), Path(scratch, "cache")
        data.mkdir()
        workloads.write(name, data)
        first: dict[str, float] = {}
        later: dict[str, list[float]] = {system: [] for system in config["systems"]}
        answers: dict[str, list[dict[str, Any]]] = {system: [] for system in config["systems"]}
        for sitting in range(config["sittings"] + 1):
            systems: dict[str, System] = {}
            warm = System(config["systems"][0], name, data, cache / "warm", directory)  # the first to start takes longer
            stack.callback(warm.close)
            warm.answer()
            warm.close()
            for system in config["systems"]:
                started = systems[system] = System(system, name, data, cache, directory)
                stack.callback(started.close)
                answer = started.answer()
                later[system].append(answer["seconds"]) if sitting else first.update({system: answer["seconds"]})
                console.print(f"  {TITLES[system]:45} first epoch after {answer['seconds']:5.1f} s   {_told(answer['logs'])}")
            if sitting:  # the one before filled the cache
                first_round, end = (config["rounds"] * n // config["sittings"] for n in (sitting - 1, sitting))
                for system, found in interleaved(systems, range(first_round, end), config["seconds"], console).items():
                    answers[system] += found
            for started in systems.values():
                started.close()
    rows = []
    for system, found in answers.items():
        each = [1e6 * answer["seconds"] / (answer["epochs"] * work.steps) for answer in found]
        rest = (work.steps - 1) * median(each) / 1e6  # of the epoch that the first step was in
        row = {
            "workload": name,
            "system": system,
            "us_per_step": {"median": median(each), "min": min(each), "max": max(each), "rounds": each},
            "seconds_to_first_step": median(later[system]) - rest,
            "seconds_to_first_step_cold": first[system] - rest,
            "starts": [seconds - rest for seconds in later[system]],
            "peak_mb_over_imports": found[-1]["peak_mb_over_imports"],
            "epochs_per_round": found[-1]["epochs"],
            "logs": found[-1]["logs"],
        }
        waited = [answer["logs"].get("seconds_waiting_for_data", 0.0) / answer["seconds"] for answer in found]
        rows.append(row | ({"waiting_share": median(waited)} if any(waited) else {}))
        console.print(f"  {TITLES[system]:45} {median(each):10.1f} us a step ({min(each):.1f} to {max(each):.1f})")
    return rows


def interleaved(systems: dict[str, "System"], turns: range, seconds: float, console: Any) -> dict[str, list[dict[str, Any]]]:
    """What systems answer that train in turn, each turn from another one on, about so many seconds each."""
    epochs = {}
    for system, process in systems.items():
        epochs[system] = max(1, math.ceil(seconds / process.train(1)["seconds"]))
        if epochs[system] > 1:  # the first epoch by itself is slower
            epochs[system] = max(1, math.ceil(seconds / process.train(epochs[system])["seconds"] * epochs[system]))
    answers: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    names = list(systems)
    for turn in turns:
        for system in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            answers[system].append(systems[system].train(epochs[system]) | {"epochs": epochs[system]})
        console.print(f"  round {turn + 1}", end="\r")
    return answers


class System:
    """One system at work in a process of its own."""

    def __init__(self, system: str, workload: str, data: Path, cache: Path, directory: Path) -> None:
        self.name, self.log = f"{TITLES[system]} on {workload}", directory / f"{system}-{workload}.log"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Every start but the first finds what it compiles, whoever's it is.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        python = str(CORE) if NEEDS[system] == "jax" and CORE.exists() else sys.executable
        command = [python, worker.__file__, system, workload, str(data), str(time.time())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def answer(self) -> dict[str, Any]:
        """The next line that it says. Raises `Failed` where there is none, or its loss is no number."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            said = [text for text in self.log.read_text().splitlines() if text.strip()]
            raise Failed(f"{self.name} failed: {said[-1] if said else 'no reason given'}; all that it said is in {self.log}")
        answer = json.loads(line)
        if not all(math.isfinite(value) for value in answer["logs"].values()):
            raise Failed(f"{self.name}: its logs are not finite: {answer['logs']}")
        return answer

    def train(self, epochs: int) -> dict[str, Any]:
        """Lets it train so many epochs."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{epochs}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends the process; what it said goes with it where all went well."""
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        if self.process.wait() == 0:
            self.log.unlink(missing_ok=True)


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How systems compare, round by round."""
    times = {row["system"]: row["us_per_step"]["rounds"] for row in rows}
    found: dict[str, Any] = {}
    for name, (above, below) in RATIOS.items():
        if above in times and below in times:
            found[name] = interval([a / b for a, b in zip(times[above], times[below], strict=True)])
    peers = [peer for peer in PEERS if peer in times]
    if peers and "research" in times:
        found["fastest_peer"] = min(peers, key=lambda peer: median(times[peer]))
        both = zip(times[found["fastest_peer"]], times["research"], strict=True)
        found["fastest_peer_over_ours"] = interval([a / b for a, b in both])
        if "research-reordered" in times:
            both = zip(times[found["fastest_peer"]], times["research-reordered"], strict=True)
            found["fastest_peer_over_reordered"] = interval([a / b for a, b in both])
    return found


def interval(values: list[float]) -> list[float]:
    """The median between the ranks that hold it with 95% confidence or more (a sign test turned round).

    >>> interval([float(i) for i in range(1, 11)])
    [2.0, 5.5, 9.0]
    """
    n, ordered = len(values), sorted(values)
    below = [sum(math.comb(n, j) for j in range(k + 1)) / 2**n for k in range(n)]
    cut = sum(tail <= 0.025 for tail in below[: n // 2])
    return [ordered[max(cut - 1, 0)], median(values), ordered[-max(cut, 1)]]


def median(values: list[float]) -> float:
    """Of two in the middle, their mean."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def tables(found: dict[str, Any]) -> str:
    """What was found, in Markdown: ratios, then times, starts and memory of every system."""
    rows = {(row["workload"], row["system"]): row for row in found["rows"]}
    names, systems = list(found["ratios"]), found["config"]["systems"]
    heads = [f"{above} / {below}" for above, below in RATIOS.values()]
    ratio_rows = [
        [
            name,
            *(_ratio(found["ratios"][name].get(ratio)) for ratio in RATIOS),
            f"{found['ratios'][name].get('fastest_peer', '')} {_ratio(found['ratios'][name].get('fastest_peer_over_ours'))}",
            _ratio(found["ratios"][name].get("fastest_peer_over_reordered")),
        ]
        for name in names
    ]

    def grid(cell: Any) -> list[list[str]]:
        return [[TITLES[s], *(cell(rows[name, s]) if (name, s) in rows else "" for name in names)] for s in systems]

    parts = [
        _table(["time per step", *heads, "fastest peer / research", "the same / research-reordered"], ratio_rows),
        "Microseconds a step, median:\n\n" + _table(["", *names], grid(lambda row: _short(row["us_per_step"]["median"]))),
        "Seconds from the start of the process to the end of its first step, compiled before:\n\n"
        + _table(["", *names], grid(lambda row: f"{row['seconds_to_first_step']:.1f}")),
        "The same, compiled for the first time:\n\n"
        + _table(["", *names], grid(lambda row: f"{row['seconds_to_first_step_cold']:.1f}")),
        "Peak memory over that after imports, MB:\n\n"
        + _table(["", *names], grid(lambda row: f"{row['peak_mb_over_imports']:.0f}")),
    ]
    waiting = [row for row in found["rows"] if "waiting_share" in row]
    parts += [f"{row['system']} on {row['workload']} waited for data {row['waiting_share']:.1%} of the time." for row in waiting]
    about = found["machine"]
    parts.append(
        f"{about['processor']}, {about['cpus']} cores, {about['memory_gib']} GiB; {about['platform']}; Python {about['python']}; "
        + ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        + f"; {about['date']}."
    )
    return "\n\n".join(parts) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(values: list[float] | None) -> str:
    return "" if values is None else f"{values[1]:.2f} [{values[0]:.2f}, {values[2]:.2f}]"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _told(logs: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in logs.items())


def picture(found: dict[str, Any]) -> "Figure":
    """Each system's time per step over the floor's (or the first system's), a panel for each workload; lines are the rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    names, systems = list(found["ratios"]), list(reversed(found["config"]["systems"]))
    rows = {(row["workload"], row["system"]): row["us_per_step"]["rounds"] for row in found["rows"]}
    floor = "jax-scan" if "jax-scan" in systems else systems[-1]
    columns = min(4, len(names))
    figure = Figure(
        figsize=(2.2 + 2.6 * columns, (0.6 + 0.24 * len(systems)) * -(-len(names) // columns) + 0.6), layout="constrained"
    )
    panels = list(figure.subplots(-(-len(names) // columns), columns, sharey=True, squeeze=False).flat)
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels, names, strict=False):
        for place, system in enumerate(systems):
            ratios = [a / b for a, b in zip(rows[name, system], rows[name, floor], strict=True)]
            colour = "#cc3311" if system.startswith("research") else "#333333" if system.startswith("jax") else "#4477aa"
            axes.plot(interval(ratios)[::2], [place, place], color=colour, linewidth=3, alpha=0.4, solid_capstyle="round")
            axes.plot(median(ratios), place, "o", color=colour, markersize=4)
            middle = (median(ratios), place)
            axes.annotate(f"{middle[0]:.2f}", middle, (0, 4), textcoords="offset points", ha="center", fontsize=6, color=colour)
        axes.axvline(1, color="#999999", linewidth=0.8)
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(systems)), [TITLES[system] for system in systems], fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#eeeeee")
    figure.supxlabel(f"time per step over {TITLES[floor]} (logarithmic; further left is faster)", fontsize=9)
    return figure


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; run the same command with --run-dir again to go on", file=sys.stderr)
        sys.exit(75)

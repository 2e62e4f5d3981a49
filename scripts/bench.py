"""Times the same training in this library, in JAX by hand, in Keras on three backends, in PyTorch and in Flax NNX.

    just bench                                            # everything; about 40 minutes on two cores
    just bench digits-mlp-32 convnet-64                   # these workloads
    just bench digits-mlp-32 --systems research jax-scan  # these systems

scripts/benchmarks/workloads.py describes what is trained, scripts/benchmarks/with_*.py how each system trains it. Each system
runs in a process of its own. All systems of a workload run in turn, so a ratio compares measurements that are close in time. The
run directory gets bench.json, bench.md (the same as tables) and bench.png. To continue a benchmark that was stopped, run it again
with the same run directory: it measures the workloads that are missing.

A ratio is the median over the rounds, with an interval that contains the median with at least 95% confidence. The interval comes
from ranks and assumes nothing about the noise. All processes are started again for each session, because where a process'
memory lies makes it faster or slower throughout. The first start of a system fills JAX's compilation cache. Seconds to the first
step are those of later starts, from the start of the process. Memory is the peak of the process minus its memory after imports.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import results
import timing
import workloads
from systems import SYSTEMS

PACKAGES = ("jax", "jaxlib", "keras", "tensorflow", "torch", "flax", "optax", "numpy")


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code."""
    options = parser().parse_args(arguments)
    for what, names, known in (("workload", options.workloads, workloads.WORKLOADS), ("system", options.systems, SYSTEMS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            return fail(f"no {what} {unknown[0]!r}: choose from {', '.join(known)}.", 2)
    packages = {SYSTEMS[system].package for system in options.systems}
    missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
    if missing:
        return fail(f"this environment lacks {', '.join(missing)}: `just bench` installs what it needs.", 1)
    from rich.console import Console

    from research.reporting import record

    directory = options.run_dir or record.new_directory("bench", Path("runs"))
    config = {"systems": options.systems, "rounds": options.rounds, "seconds": options.seconds, "sessions": options.sessions}
    console = Console(highlight=False, soft_wrap=True)
    try:
        bench = load(directory, config)
        directory.mkdir(parents=True, exist_ok=True)
        for name in options.workloads or workloads.WORKLOADS:
            if name not in bench["ratios"]:
                rows = timing.measure(name, config, directory, console)
                bench["rows"] += rows
                bench["ratios"][name] = results.ratios(rows)
                record.write_text(directory / "bench.json", json.dumps(bench, indent=1, allow_nan=False) + "\n")
    except timing.BenchmarkError as error:
        return fail(str(error), 1)
    except OSError as error:
        return fail(f"--run-dir {directory}: cannot be written ({error.strerror}); choose another directory.", 1)
    record.write_text(directory / "bench.md", results.tables(bench))
    results.figure(bench).savefig(directory / "bench.png", dpi=110)
    console.print(results.tables(bench))
    print(directory / "bench.json")
    return 0


def fail(message: str, code: int) -> int:
    """Prints one line on standard error and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="just bench", description=__doc__, formatter_class=formatter)
    workload_help = f"one or more of {', '.join(workloads.WORKLOADS)} (default: all)"
    system_help = f"one or more of {', '.join(SYSTEMS)} (default: all)"
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=workload_help)
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", default=list(SYSTEMS), help=system_help)
    parser.add_argument("--rounds", type=positive, default=10, help="measurements of each system (default: 10)")
    parser.add_argument("--seconds", type=float, default=0.7, help="approximate length of a measurement (default: 0.7)")
    parser.add_argument("--sessions", type=positive, default=2, help="sessions, which share the rounds (default: 2)")
    parser.add_argument("--run-dir", type=Path, help="default: a new directory under runs/bench/")
    return parser


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def load(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the directory's bench.json, or an empty one for a new directory.

    Raises `BenchmarkError` if the directory contains a benchmark with other options, or something else.
    """
    if (directory / "bench.json").exists():
        bench = json.loads((directory / "bench.json").read_text())
        if bench["config"] != config:
            raise timing.BenchmarkError(
                f"--run-dir {directory}: contains a benchmark with other options; choose another directory."
            )
        return bench
    if directory.exists() and any(directory.iterdir()):
        raise timing.BenchmarkError(f"--run-dir {directory}: is not empty and contains no benchmark; choose a new directory.")
    return {"config": config, "machine": machine(), "rows": [], "ratios": {}}


def machine() -> dict[str, Any]:
    """Returns what the measurements depend on: processor, memory, versions, revision and date."""
    from research.reporting import environment

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "platform": platform.platform(),
        "processor": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory[0]) if memory else None,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES if importlib.util.find_spec(package)},
        "revision": environment.versions()["revision"],
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; run the same command with the same --run-dir to continue", file=sys.stderr)
        sys.exit(75)

"""Interrupts runs at random moments, resumes them, and compares the results with an undisturbed run, bit for bit.

    torture.py --kills 30 --terms 30 --seed 0 -- digits --epochs 60 --checkpoint-every 50 --log-every 7

Each round starts a run, sends it SIGKILL or SIGTERM after a random time, and resumes it. Every second signal comes right after
the checkpoint that follows that time: what belongs to the steps before it must be on the disk already. The last checkpoint must
then equal that of the undisturbed run bit for bit, and so must metrics.jsonl and the metrics in summary.json. Exits with 1 if a
round differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts a `research` command with its output captured."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "research", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def checkpoint_leaves(directory: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a run's last checkpoint by position and name."""
    import orbax.checkpoint as ocp

    (path,) = sorted((directory / "checkpoints").glob("[0-9]*"))[-1:]
    names = [name for name, _, _ in json.loads((path / "manifest.json").read_text())["leaves"]]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.RestoreArgs(restore_type=np.ndarray)
        keys = [f"{i:05d}" for i in range(len(names))]
        item = dict.fromkeys(keys, 0)
        arrays = checkpointer.restore(
            path.absolute() / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=dict.fromkeys(keys, restore))
        )
    return {f"{i} {name}": np.asarray(arrays[key]) for i, (key, name) in enumerate(zip(keys, names, strict=True))}


def differences(first: Path, second: Path) -> list[str]:
    """Returns the names of the results that differ between two finished runs; timings are not compared."""
    a, b = checkpoint_leaves(first), checkpoint_leaves(second)
    names = [name for name in {**a, **b} if name not in a or name not in b or not np.array_equal(a[name], b[name])]
    if (first / "metrics.jsonl").read_bytes() != (second / "metrics.jsonl").read_bytes():
        names.append("metrics.jsonl")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (first, second)]
    keys = ("metrics", "steps", "epochs", "status", "parameters")
    return names + [key for key in keys if summaries[0][key] != summaries[1][key]]


def wait_for_checkpoint(process: subprocess.Popen[str], directory: Path) -> None:
    """Waits until a run writes its next checkpoint, or ends; a minute at most."""
    before, deadline = set(directory.glob("checkpoints/[0-9]*")), time.monotonic() + 60
    while process.poll() is None and set(directory.glob("checkpoints/[0-9]*")) <= before and time.monotonic() < deadline:
        time.sleep(0.0005)


def interrupted_run(
    run: list[str], directory: Path, number: signal.Signals, delay: float, after_checkpoint: bool
) -> tuple[bool, str]:
    """Runs with one signal after a time, then to the end. Returns whether the signal came in time, and any error."""
    process = start("run", *run, "--run-dir", str(directory))
    time.sleep(delay)
    if after_checkpoint:
        wait_for_checkpoint(process, directory)
    process.send_signal(number)
    output, _ = process.communicate()
    in_time = process.returncode != 0  # whether it still ran is known only afterwards: it can end between a look and the signal
    if process.returncode not in {0, -signal.SIGKILL if number == signal.SIGKILL else 75}:
        return in_time, f"{number.name} gave exit code {process.returncode}: {output[-500:]}"
    resumable = (directory / "config.json").exists()
    resumed = start("resume", str(directory)) if resumable else start("run", *run, "--run-dir", str(directory))
    output, _ = resumed.communicate()
    return in_time, "" if resumed.returncode == 0 else f"resuming gave exit code {resumed.returncode}: {output[-500:]}"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="rounds with SIGKILL")
    parser.add_argument("--terms", type=int, default=30, help="rounds with SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("run", nargs="+", help="after --: the experiment and its options")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    options = parse_arguments(arguments)
    rng, failures = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference"
        start("run", *options.run, "--run-dir", str(Path(scratch) / "warm-up")).communicate()  # fills the compilation cache
        started = time.time()
        process = start("run", *options.run, "--run-dir", str(reference))
        output, _ = process.communicate()
        longest = time.time() - started
        if process.returncode != 0:
            print(output)
            return 1
        numbers = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
        for i, number in enumerate(numbers):
            in_time, attempts = False, 0
            while not in_time:  # a run that ended before the signal proves nothing
                directory = Path(scratch) / f"{i}-{attempts}"
                in_time, error = interrupted_run(options.run, directory, number, rng.uniform(0.3, longest), i % 2 == 1)
                attempts += 1
            differing = [] if error else differences(directory, reference)
            step = None if error else json.loads((directory / "summary.json").read_text())["resumed_from"]
            print(f"{i + 1}/{len(numbers)} {number.name}: resumed from step {step}: {error or differing or 'equal'}", flush=True)
            failures += bool(error or differing)
    print(f"{len(numbers) - failures} of {len(numbers)} equal to the last bit")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

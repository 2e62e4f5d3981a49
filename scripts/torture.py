"""Kills a run at random moments, again and again, and compares what comes of it with a run left alone.

    torture.py --kills 30 --terms 30 --seed 0 -- digits --epochs 60 --checkpoint-every 50

Each round starts a run, sends SIGKILL or SIGTERM after a random time, resumes it, and so on until it finishes; then its last
checkpoint must equal, bit for bit, that of the undisturbed run, its metrics.jsonl byte for byte, and its summary's metrics. Exits
with 1 where one does not.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """A process of this project's commands, its words kept."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def leaves(directory: Path) -> dict[str, np.ndarray]:
    """The last checkpoint's arrays by name."""
    import orbax.checkpoint as ocp

    (path,) = sorted((directory / "checkpoints").glob("[0-9]*"))[-1:]
    names = [name for name, _, _ in json.loads((path / "manifest.json").read_text())["leaves"]]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore = ocp.RestoreArgs(restore_type=np.ndarray)
        keys = [f"{i:05d}" for i in range(len(names))]
        item = dict.fromkeys(keys, 0)
        found = checkpointer.restore(
            path.absolute() / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=dict.fromkeys(keys, restore))
        )
    return {f"{i} {name}": np.asarray(found[key]) for i, (key, name) in enumerate(zip(keys, names, strict=True))}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, clock readings apart."""
    ours, theirs = leaves(one), leaves(other)
    found = [name for name in ours if name not in theirs or not np.array_equal(ours[name], theirs[name])]
    if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    found += [key for key in ("metrics", "steps", "epochs", "status", "parameters") if summaries[0][key] != summaries[1][key]]
    return found


def disturbed(run: list[str], directory: Path, kind: signal.Signals, longest: float, rng: random.Random) -> tuple[bool, str]:
    """A run that gets one signal at a random moment, then goes on undisturbed: whether it was hit in time, and what is wrong."""
    process = start("run.py", *run, "--run-dir", str(directory))
    time.sleep(rng.uniform(0.3, longest))
    hit = process.poll() is None
    process.send_signal(kind)
    said, _ = process.communicate()
    wanted = {0} if not hit else {-signal.SIGKILL} if kind == signal.SIGKILL else {0, 75}
    if process.returncode not in wanted:
        return hit, f"{kind.name} gave exit code {process.returncode}: {said[-500:]}"
    again = (
        start("resume.py", str(directory))
        if (directory / "config.json").exists()
        else start("run.py", *run, "--run-dir", str(directory))
    )
    said, _ = again.communicate()
    return hit, "" if again.returncode == 0 else f"going on gave exit code {again.returncode}: {said[-500:]}"


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="rounds with SIGKILL")
    parser.add_argument("--terms", type=int, default=30, help="rounds with SIGTERM")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("run", nargs="+", help="behind --: the experiment and its options")
    options = parser.parse_args(arguments)
    rng, bad = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        alone = Path(scratch) / "alone"
        start("run.py", *options.run, "--run-dir", str(Path(scratch) / "warm")).communicate()  # fills the compilation cache
        began = time.time()
        process = start("run.py", *options.run, "--run-dir", str(alone))
        said, _ = process.communicate()
        longest = time.time() - began
        if process.returncode != 0:
            print(said)
            return 1
        kinds = [signal.SIGKILL] * options.kills + [signal.SIGTERM] * options.terms
        for i, kind in enumerate(kinds):
            hit, tries = False, 0
            while not hit:  # a run that had ended before the signal proves nothing
                directory = Path(scratch) / f"{i}-{tries}"
                hit, wrong = disturbed(options.run, directory, kind, longest, rng)
                tries += 1
            differing = [] if wrong else differences(directory, alone)
            resumed = None if wrong else json.loads((directory / "summary.json").read_text())["resumed_from"]
            print(f"{i + 1}/{len(kinds)} {kind.name}: resumed from step {resumed}: {wrong or differing or 'equal'}", flush=True)
            bad += bool(wrong or differing)
    print(f"{len(kinds) - bad} of {len(kinds)} equal to the last bit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

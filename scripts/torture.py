"""Does to runs what clusters do to them, resumes them, and compares the results with an undisturbed run, bit for bit.

just torture                                             # each fault once, on digits: some minutes
just torture --trials 20 --faults kill,term -- gan --epochs 3
just torture --processes 2 --trials 10 -- digits --epochs 40 --checkpoint-every 50 --mesh data=-1

After each trial the last checkpoint, metrics.jsonl and the metrics in summary.json must equal those of the undisturbed run to the
last bit, and the report must be there. Prints a table of the faults; exits with 1 if a trial differs.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import numpy as np
from kinds import FAULTS, OF_PROCESSES, Fault, Trial, launch
from rich.console import Console
from rich.table import Table

DIGITS = ["digits", "--epochs", "40", "--checkpoint-every", "50", "--log-every", "7"]


class Outcome(NamedTuple):
    """What became of a trial: whether the fault came before the end, what went wrong, and the steps that were trained twice."""

    in_time: bool
    error: str
    lost: int = 0


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
    names += [key for key in keys if summaries[0][key] != summaries[1][key]]
    return names + [path.name for path in first.glob(".*.partial")] + ["report.html"] * (not (first / "report.html").is_file())


def attempt(fault: Fault, trial: Trial) -> Outcome:
    """Runs with a fault, then, if that ended the run, to the end. Compares the results."""
    process = launch(trial, "run", *trial.arguments, "--run-dir", str(trial.directory), fault=fault.arm(trial))
    fault.act(trial, process)
    output, _ = process.communicate()
    if process.returncode not in {0, *fault.codes}:
        return Outcome(True, f"exit code {process.returncode}: {output[-500:]}")
    if process.returncode == 0 and fault.ends:
        return Outcome(False, "")
    logged, trained = last_logged_step(trial.directory), is_finished(trial.directory)
    error = fault.between(trial)
    if error:
        return Outcome(True, error)
    if fault.ends:
        started = (trial.directory / "config.json").exists()
        again = ("resume", str(trial.directory)) if started else ("run", *trial.arguments, "--run-dir", str(trial.directory))
        process = launch(trial, *again)
        output, _ = process.communicate()
        if process.returncode != 0:
            return Outcome(True, f"resuming gave exit code {process.returncode}: {output[-500:]}")
    resumed_from = json.loads((trial.directory / "summary.json").read_text())["resumed_from"] or 0
    differing = differences(trial.directory, trial.reference)
    lost = max(0, logged - resumed_from) if fault.ends and not trained else 0
    return Outcome(True, f"differing: {', '.join(differing)}" if differing else "", lost)


def is_finished(directory: Path) -> bool:
    """Returns whether a run is trained to the end: only its report may be missing."""
    path = directory / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def last_logged_step(directory: Path) -> int:
    """Returns the last step in metrics.jsonl; 0 if there is none."""
    try:
        lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except FileNotFoundError:
        return 0


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Returns the options of the command line.

    >>> parse_arguments(["--faults", "kill,term"]).faults
    ['kill', 'term']
    """
    parser = argparse.ArgumentParser(
        prog="just torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=lambda text: text.split(","), help=f"some of {', '.join(FAULTS)}; by default all")
    parser.add_argument("--trials", type=int, default=1, help="of each fault")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument(
        "--processes", type=int, default=1, help=f"that train together; faults are then {', '.join(OF_PROCESSES)}"
    )
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument("run", nargs="*", default=DIGITS, help="after --: the experiment and its options")
    options = parser.parse_args(arguments)
    known = FAULTS if options.processes == 1 else OF_PROCESSES
    options.faults = options.faults or list(known)
    for name in options.faults:
        if name not in known:
            parser.error(f"no fault {name!r}; expected some of {', '.join(known)}")
    return options


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    options = parse_arguments(arguments)
    rng = random.Random(options.seed)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in options.faults}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        trial = Trial(options.run, scratch / "reference", scratch, rng, 0.0, scratch / "reference", options.processes)
        for name in ("warm-up", "reference"):  # the first fills the compilation cache
            started = time.monotonic()
            process = launch(trial, "run", *options.run, "--run-dir", str(scratch / name))
            output, _ = process.communicate()
            if process.returncode != 0:
                print(output)
                return 1
        trial = trial._replace(seconds=time.monotonic() - started)
        for i in range(options.trials):
            for name in options.faults:
                outcome, attempts = Outcome(False, ""), 0
                while not outcome.in_time:  # a run that ended before the fault proves nothing
                    home = scratch / f"{name}-{i}-{attempts}"
                    home.mkdir()
                    outcome = attempt(FAULTS[name], trial._replace(directory=home / "run", home=home))
                    attempts += 1
                    shutil.rmtree(home, ignore_errors=True)
                    if attempts == 10 and not outcome.in_time:
                        outcome = Outcome(True, "the run ended ten times before the fault came")
                outcomes[name].append(outcome)
                print(
                    f"{i + 1}/{options.trials} {name}: {outcome.error or f'equal, {outcome.lost} steps trained twice'}",
                    flush=True,
                )
    show(outcomes)
    if options.json is not None:
        contents = {"run": options.run, "processes": options.processes, "seed": options.seed, "seconds": trial.seconds}
        faults = {name: [outcome._asdict() for outcome in each] for name, each in outcomes.items()}
        options.json.write_text(json.dumps({**contents, "faults": faults}, indent=1))
    every = [outcome for each in outcomes.values() for outcome in each]
    equal = sum(not outcome.error for outcome in every)
    print(f"{equal} of {len(every)} equal to the last bit")
    return int(equal < len(every))


def show(outcomes: dict[str, list[Outcome]]) -> None:
    """Prints a table of the faults."""
    table = Table("fault", "what", "trials", "equal", "most steps trained twice", box=None)
    for name, each in outcomes.items():
        equal = sum(not outcome.error for outcome in each)
        table.add_row(name, FAULTS[name].what, str(len(each)), str(equal), str(max(outcome.lost for outcome in each)))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

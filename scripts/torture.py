"""Does to runs what clusters do to them, resumes them, and compares the results with an undisturbed run, bit for bit.

just torture                                             # each fault once, on digits: some minutes
just torture --trials 20 --faults kill,term -- gan --epochs 3
just torture --processes 2 --trials 10 -- digits --epochs 40 --checkpoint-every 50 --mesh data=-1
just torture --trials 200 --faults kill --json kills.jsonl      # the same command again goes on after an interruption
just torture --table kills.jsonl others.jsonl

After each trial the last checkpoint, the names of all checkpoints, metrics.jsonl and the metrics in summary.json must equal those
of the undisturbed run to the last bit, and the report must be there. With `--checkpoint-every STEPS`, no more than two such
intervals may be trained twice, and from a damaged checkpoint on those before it. Prints a table; exits with 1 if a trial fails.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import numpy as np
from counts import Count, Outcome, append, outcome_of, read, table
from kinds import FAULTS, OF_ONE, OF_PROCESSES, Fault, Trial, launch

DIGITS = ["digits", "--epochs", "40", "--checkpoint-every", "50", "--log-every", "7"]


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
    if checkpoint_steps(first) != checkpoint_steps(second):
        names.append(f"checkpoints {checkpoint_steps(first)} in place of {checkpoint_steps(second)}")
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
    codes = (process.returncode,)
    if process.returncode not in {0, *fault.codes}:
        return Outcome(True, f"exit code {process.returncode}: {output[-500:]}", codes=codes)
    if process.returncode == 0 and fault.ends:
        return Outcome(False, codes=codes)
    logged, trained, promised = last_logged_step(trial.directory), is_finished(trial.directory), promise(fault, trial)
    phase = "start" if logged == 0 else "training" if logged < last_logged_step(trial.reference) else "end"
    error = fault.between(trial)
    if error:
        return Outcome(True, error, codes=codes)
    if fault.ends:
        started = (trial.directory / "config.json").exists()
        again = ("resume", str(trial.directory)) if started else ("run", *trial.arguments, "--run-dir", str(trial.directory))
        process = launch(trial, *again)
        output, _ = process.communicate()
        codes += (process.returncode,)
        if process.returncode != 0:
            return Outcome(True, f"resuming gave exit code {process.returncode}: {output[-500:]}", codes=codes)
    resumed_from = json.loads((trial.directory / "summary.json").read_text())["resumed_from"] or 0
    differing = differences(trial.directory, trial.reference)
    lost = max(0, logged - resumed_from) if fault.ends and not trained else 0
    error = f"differing: {', '.join(differing)}" if differing else ""
    outcome = Outcome(True, error, not differing, codes, lost, promised, phase, resumed_from)
    if outcome.lost_more and not differing:
        outcome = outcome._replace(error=f"{lost} steps were trained twice, expected at most {promised}")
    return outcome


def promise(fault: Fault, trial: Trial) -> int | None:
    """Returns how many steps may be trained twice. None if checkpoints are not due by steps.

    A checkpoint is written while training continues until the next one, so that there may be two intervals between that before it
    and the last log. If the newest one is damaged, those from the one before are added.
    """
    values = [value for name, value in zip(trial.arguments, trial.arguments[1:], strict=False) if name == "--checkpoint-every"]
    if not values or not values[-1].isdigit() or values[-1] == "0":
        return None
    saved = checkpoint_steps(trial.directory)
    return 2 * int(values[-1]) + (saved[-1] - saved[-2] if fault.damages and len(saved) > 1 else 0)


def checkpoint_steps(directory: Path) -> list[int]:
    """Returns the steps of a run's checkpoints, in ascending order."""
    return sorted(int(path.name) for path in directory.glob("checkpoints/[0-9]*"))


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
    parser.add_argument("--devices", type=int, help="simulated CPU devices in each of several processes; by default eight in all")
    parser.add_argument("--json", type=Path, help="file to append each outcome to, as a JSON line, and to go on from")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the table of such files; runs nothing")
    parser.add_argument("run", nargs="*", default=DIGITS, help="after --: the experiment and its options")
    options = parser.parse_args(arguments)
    if options.trials < 1 or options.processes < 1 or (options.devices or 1) < 1:
        parser.error("--trials, --processes and --devices: expected at least 1")
    for path in options.table or ():
        if not path.is_file():
            parser.error(f"--table {path}: there is no such file; expected one that --json wrote")
    known = OF_ONE if options.processes == 1 else OF_PROCESSES
    options.faults = options.faults or list(known)
    for name in options.faults:
        if name not in known:
            parser.error(f"no fault {name!r}; expected some of {', '.join(known)}")
    return options


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    options = parse_arguments(arguments)
    what = {name: fault.what for name, fault in FAULTS.items()}
    if options.table:
        print(table([line for path in options.table for line in read(path)], what))
        return 0
    count = Count(tuple(options.run), options.processes, options.devices, options.seed)
    lines = read(options.json) if options.json is not None else []
    done = count.done(lines)
    trials = [(name, i) for i in range(options.trials) for name in options.faults]
    lines = [line for line in lines if (line["fault"], line["trial"]) in trials and count.done([line])]
    if set(trials) - done:
        with tempfile.TemporaryDirectory() as folder:
            undisturbed = run_undisturbed(options, Path(folder))
            if undisturbed is None:
                return 1
            for name, i in trials:
                if (name, i) not in done:
                    started = time.monotonic()
                    outcome = repeat_until_in_time(name, i, undisturbed, options.seed)
                    lines.append(count.line(name, i, outcome, time.monotonic() - started))
                    if options.json is not None:
                        append(options.json, lines[-1])
                    said = outcome.error or f"equal, {outcome.lost} steps trained twice"
                    print(f"{i + 1}/{options.trials} {name}: {said}", flush=True)
    print(table(lines, what))
    good = sum(not outcome_of(line).error for line in lines)
    print(f"{good} of {len(lines)} equal to the last bit")
    return int(good < len(lines))


def run_undisturbed(options: argparse.Namespace, scratch: Path) -> Trial | None:
    """Runs to the end without a fault. Returns what the trials are made of; None, with the run's output printed, if it fails."""
    reference, rng = scratch / "reference", random.Random(options.seed)
    trial = Trial(options.run, reference, scratch, rng, 0.0, reference, options.processes, options.devices)
    for name in ("warm-up", "reference"):  # the first fills the compilation cache
        started = time.monotonic()
        process = launch(trial, "run", *options.run, "--run-dir", str(scratch / name))
        output, _ = process.communicate()
        if process.returncode != 0:
            print(output)
            return None
    differing = differences(scratch / "warm-up", reference)
    if differing:
        print(f"two undisturbed runs differ, so that a comparison shows nothing: {', '.join(differing)}")
        return None
    return trial._replace(seconds=time.monotonic() - started)


def repeat_until_in_time(name: str, number: int, undisturbed: Trial, seed: int) -> Outcome:
    """Tries a fault until it comes before the end of the run: a run that has ended proves nothing."""
    rng = random.Random(f"{seed} {name} {number}")  # its own, so that an interrupted count goes on with the same moments
    for i in range(10):
        home = undisturbed.home / f"{name}-{number}-{i}"
        home.mkdir()
        started = time.monotonic()
        outcome = attempt(FAULTS[name], undisturbed._replace(directory=home / "run", home=home, rng=rng))
        shutil.rmtree(home, ignore_errors=True)
        if outcome.in_time:
            return outcome
        undisturbed = undisturbed._replace(seconds=time.monotonic() - started)  # the machine may have got faster
    return outcome._replace(error="the run ended ten times before the fault came")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

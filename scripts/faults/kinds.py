"""The faults: how each is brought about, and what is done to the run directory before the run is resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from inside import after_power_cut

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
Process = subprocess.Popen[str]


class Trial(NamedTuple):
    """One run to be disturbed: its arguments, its directory in the folder `home`, and the undisturbed run to compare with."""

    arguments: list[str]
    directory: Path
    home: Path
    rng: random.Random
    seconds: float  # that the undisturbed run takes
    reference: Path
    processes: int

    @property
    def moment(self) -> float:
        """A random time, in seconds after the start."""
        return self.rng.uniform(0.3, self.seconds)


class Fault(NamedTuple):
    """A fault: what happens, what is armed inside of the process, what is done to it and between its end and its next start.

    `codes` are the exit codes that it may give. A fault that does not end the run has `ends=False`.
    """

    what: str
    arm: Callable[[Trial], dict[str, Any]] = lambda trial: {}
    act: Callable[[Trial, Process], None] = lambda trial, process: None
    between: Callable[[Trial], str] = lambda trial: ""
    codes: tuple[int, ...] = (-signal.SIGKILL,)
    ends: bool = True


def launch(trial: Trial, *arguments: str, fault: dict[str, Any] | None = None) -> Process:
    """Starts a `research` command with its output captured: as several processes, or with a fault inside, if there is one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if trial.processes > 1:
        arguments = ("processes", str(trial.processes), *arguments)
    start = [str(INSIDE), json.dumps(fault)] if fault else ["-m", "research"]
    command = [sys.executable, "-P", *start, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def send(process: Process, number: signal.Signals, rng: random.Random, several: bool) -> None:
    """Sends a signal to a run; SIGKILL to one of its processes, if there are several."""
    target = process.pid
    if several and number == signal.SIGKILL:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if process.poll() is None else []
        target = int(rng.choice(children)) if children else target
    if process.poll() is None:
        os.kill(target, number)


def after_a_time(number: signal.Signals) -> Callable[[Trial, Process], None]:
    """Returns what sends a signal at a random moment."""

    def act(trial: Trial, process: Process) -> None:
        time.sleep(trial.moment)
        send(process, number, trial.rng, trial.processes > 1)

    return act


def after_checkpoint(count: int, number: signal.Signals) -> Callable[[Trial, Process], None]:
    """Returns what sends a signal right after `count` checkpoints were written since a random moment."""

    def act(trial: Trial, process: Process) -> None:
        time.sleep(trial.moment)
        for _ in range(count):
            wait_for_checkpoint(process, trial.directory)
        send(process, number, trial.rng, trial.processes > 1)

    return act


def wait_for_checkpoint(process: Process, directory: Path) -> None:
    """Waits until a run writes its next checkpoint, or ends; a minute at most."""
    before, deadline = set(directory.glob("checkpoints/[0-9]*")), time.monotonic() + 60
    while process.poll() is None and set(directory.glob("checkpoints/[0-9]*")) <= before and time.monotonic() < deadline:
        time.sleep(0.0005)


def kill_in(module: str, function: str, calls: int = 1, seconds: float = 0.02) -> Callable[[Trial], dict[str, Any]]:
    """Returns what arms a SIGKILL some time after a random one of the first `calls` calls of a function."""
    return lambda trial: {
        "kill_in": [module, function],
        "call": trial.rng.randint(1, calls),
        "delay": trial.rng.uniform(0, seconds),
    }


def pause(trial: Trial, process: Process) -> None:
    """Stops the process for a second or two, and lets it go on."""
    time.sleep(trial.moment)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(trial.rng.uniform(0.5, 2))
        os.kill(process.pid, signal.SIGCONT)


def cut_power(trial: Trial) -> str:
    """Leaves of the run what was flushed to the disk."""
    left = trial.home.with_name(f"{trial.home.name}-left")
    after_power_cut(journal_of(trial), trial.home, left)
    shutil.rmtree(journal_of(trial))
    shutil.rmtree(trial.home)
    left.rename(trial.home)
    return ""


def journal_of(trial: Trial) -> Path:
    """Returns where the flushed contents of a trial are."""
    return trial.home.with_name(f"{trial.home.name}-journal")


def newest_checkpoint(trial: Trial) -> Path | None:
    """Returns the newest checkpoint of a run that has an earlier one too."""
    saved = sorted(trial.directory.glob("checkpoints/[0-9]*"))
    return saved[-1] if len(saved) > 1 else None


def damage(trial: Trial) -> str:
    """Flips a bit of, truncates, empties or removes a file of the newest checkpoint."""
    newest = newest_checkpoint(trial)
    if newest is None:
        return ""
    path = trial.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    way = trial.rng.choice(("flip", "truncate", "empty", "remove"))
    if way == "remove" or not content:
        path.unlink()
        return ""
    if way == "flip":
        content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    path.write_bytes(content if way == "flip" else content[: trial.rng.randrange(len(content))] if way == "truncate" else b"")
    return ""


def replace_by_foreign(trial: Trial) -> str:
    """Puts the last checkpoint of another run in as the newest one."""
    if newest_checkpoint(trial) is not None:
        (last,) = sorted(trial.reference.glob("checkpoints/[0-9]*"))[-1:]
        shutil.copytree(last, trial.directory / "checkpoints" / last.name, dirs_exist_ok=True)
    return ""


def change_config(trial: Trial) -> str:
    """Changes config.json, looks whether the run goes on, and puts it back."""
    path = trial.directory / "config.json"
    if newest_checkpoint(trial) is None:
        return ""
    text = path.read_text()
    contents = json.loads(text)
    contents["config"]["seed"] += 1
    path.write_text(json.dumps(contents))
    process = launch(trial, "resume", str(trial.directory))
    output, _ = process.communicate()
    path.write_text(text)
    said = process.returncode == 1 and output.count("\n") == 1 and "--allow-changed" in output
    return "" if said else f"resumed with another config, exit code {process.returncode}: {output[-500:]}"


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
FAULTS = {
    "kill": Fault("SIGKILL at a random moment", act=after_a_time(KILL), codes=(-KILL, 75)),
    "kill-checkpoint": Fault("SIGKILL right after a checkpoint", act=after_checkpoint(1, KILL), codes=(-KILL, 75)),
    "kill-save": Fault("SIGKILL while a checkpoint is written", arm=kill_in("research.training.checkpoint", "_save", 8)),
    "kill-evaluation": Fault("SIGKILL in the evaluation of test data", arm=kill_in("research.training.loop", "evaluate")),
    "kill-outputs": Fault(
        "SIGKILL while results, pictures and models are written", arm=kill_in("research.cli.training", "write_outputs", 1, 1.0)
    ),
    "kill-report": Fault("SIGKILL while the report is written", arm=kill_in("research.cli.training", "write_report", 1, 0.2)),
    "term": Fault("SIGTERM at a random moment", act=after_a_time(TERM), codes=(75,)),
    "term-checkpoint": Fault("SIGTERM right after a checkpoint", act=after_checkpoint(1, TERM), codes=(75,)),
    "interrupt": Fault("SIGINT, as by Ctrl-C, at a random moment", act=after_a_time(INT), codes=(75,)),
    "pause": Fault("SIGSTOP, and SIGCONT a second or two later", act=pause, codes=(), ends=False),
    "clock": Fault(
        "the clock jumps by up to four months, forth and back",
        arm=lambda trial: {"clock_seed": trial.rng.randrange(2**31)},
        codes=(),
        ends=False,
    ),
    "full-disk": Fault(
        "no file may grow beyond 1 to 100 kB, in place of a full disk",
        arm=lambda trial: {"largest_file": int(10 ** trial.rng.uniform(3, 5))},
        codes=(1,),
    ),
    "power-cut": Fault(
        "SIGKILL, and all that was not flushed by os.fsync is gone",
        arm=lambda trial: {"journal": str(journal_of(trial)), "root": str(trial.home)},
        act=after_a_time(KILL),
        between=cut_power,
    ),
    "damage": Fault("SIGKILL, and the newest checkpoint is damaged", act=after_checkpoint(2, KILL), between=damage),
    "foreign": Fault(
        "SIGKILL, and the newest checkpoint is another run's", act=after_checkpoint(2, KILL), between=replace_by_foreign
    ),
    "config": Fault("SIGKILL, and another config: it must not go on", act=after_checkpoint(2, KILL), between=change_config),
}
OF_PROCESSES = ("kill", "kill-checkpoint", "term", "term-checkpoint")

"""The faults: how each is brought about, and what is done to the run directory before the run is resumed."""

import contextlib
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
    processes: int = 1
    devices: int | None = None  # simulated in each of several processes

    @property
    def moment(self) -> float:
        """A random time, in seconds after the start."""
        return self.rng.uniform(0.3, self.seconds)


class Fault(NamedTuple):
    """A fault: what happens, what is armed inside of the process, what is done to it and between its end and its next start.

    `codes` are the exit codes that it may give. A fault that does not end the run has `ends=False`, one after which the newest
    checkpoint can't be restored `damages=True`.
    """

    what: str
    arm: Callable[[Trial], dict[str, Any]] = lambda trial: {}
    act: Callable[[Trial, Process], None] = lambda trial, process: None
    between: Callable[[Trial], str] = lambda trial: ""
    codes: tuple[int, ...] = (-signal.SIGKILL,)
    ends: bool = True
    damages: bool = False


def launch(trial: Trial, *arguments: str, fault: dict[str, Any] | None = None) -> Process:
    """Starts a `research` command with its output captured: as several processes, or with a fault inside, if there is one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if trial.processes > 1:
        devices = () if trial.devices is None else ("--devices", str(trial.devices))
        arguments = ("processes", str(trial.processes), *devices, *arguments)
    start = [str(INSIDE), json.dumps(fault)] if fault else ["-m", "research"]
    command = [sys.executable, "-P", *start, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def workers(process: Process, several: bool) -> list[int]:
    """Returns the ids of a run's processes, waiting until they are there; none once it has ended."""
    if not several:
        return [process.pid] * (process.poll() is None)
    children: list[str] = []
    while process.poll() is None and not children:
        time.sleep(0.01)
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def send_to(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def send(process: Process, number: signal.Signals, trial: Trial) -> None:
    """Sends a signal to a run; SIGKILL to a random one of its processes, if there are several."""
    if trial.processes > 1 and number == signal.SIGKILL:
        for pid in trial.rng.sample(workers(process, True), 1) if process.poll() is None else []:
            send_to(pid, number)
    elif process.poll() is None:
        send_to(process.pid, number)


def after_a_time(number: signal.Signals) -> Callable[[Trial, Process], None]:
    """Returns what sends a signal at a random moment."""

    def act(trial: Trial, process: Process) -> None:
        time.sleep(trial.moment)
        send(process, number, trial)

    return act


def after_checkpoint(count: int, number: signal.Signals) -> Callable[[Trial, Process], None]:
    """Returns what sends a signal right after `count` checkpoints were written since a random moment."""

    def act(trial: Trial, process: Process) -> None:
        time.sleep(trial.moment)
        for _ in range(count):
            wait_for_checkpoint(process, trial.directory)
        send(process, number, trial)

    return act


def wait_for_checkpoint(process: Process, directory: Path) -> None:
    """Waits until a run writes its next checkpoint, or ends; a minute at most."""
    before, deadline = set(directory.glob("checkpoints/[0-9]*")), time.monotonic() + 60
    while process.poll() is None and set(directory.glob("checkpoints/[0-9]*")) <= before and time.monotonic() < deadline:
        time.sleep(0.0005)


def kill_in(module: str, function: str, calls: int = 1, seconds: float = 0.02) -> Callable[[Trial], dict[str, Any]]:
    """Returns what arms a SIGKILL, of one of the processes, some time after a random one of the first calls of a function."""
    return lambda trial: {
        "kill_in": [module, function],
        "call": trial.rng.randint(1, calls),
        "delay": trial.rng.uniform(0, seconds),
        "process": trial.rng.randrange(trial.processes),
    }


def pause(trial: Trial, process: Process) -> None:
    """Stops the process, or one of several, for a second or two, and lets it go on."""
    time.sleep(trial.moment)
    running = workers(process, trial.processes > 1)
    if running:
        pid = trial.rng.choice(running)
        send_to(pid, signal.SIGSTOP)
        time.sleep(trial.rng.uniform(0.5, 2))
        send_to(pid, signal.SIGCONT)


def kill_all(trial: Trial, process: Process) -> None:
    """Kills all processes at a random moment."""
    time.sleep(trial.moment)
    for pid in workers(process, True):
        send_to(pid, signal.SIGKILL)


def pause_and_kill(trial: Trial, process: Process) -> None:
    """Stops one process, and kills another some time later."""
    time.sleep(trial.moment)
    running = workers(process, True)
    if len(running) > 1:
        stopped, killed = trial.rng.sample(running, 2)
        send_to(stopped, signal.SIGSTOP)
        time.sleep(trial.rng.uniform(0, 2))
        send_to(killed, signal.SIGKILL)


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
    "kill-save": Fault(
        "SIGKILL while a checkpoint is written", arm=kill_in("research.training.checkpoint", "_save", 8), codes=(-KILL, 75)
    ),
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
    "damage": Fault("SIGKILL, and the newest checkpoint is damaged", act=after_checkpoint(2, KILL), between=damage, damages=True),
    "foreign": Fault(
        "SIGKILL, and the newest checkpoint is another run's", act=after_checkpoint(2, KILL), between=replace_by_foreign
    ),
    "config": Fault("SIGKILL, and another config: it must not go on", act=after_checkpoint(2, KILL), between=change_config),
    "kill-all": Fault("SIGKILL of all processes at a random moment", act=kill_all, codes=(75,)),
    "pause-kill": Fault("SIGSTOP of one process, and SIGKILL of another", act=pause_and_kill, codes=(75,)),
}
ONLY_OF_PROCESSES = ("kill-all", "pause-kill")
OF_ONE = tuple(name for name in FAULTS if name not in ONLY_OF_PROCESSES)
OF_PROCESSES = ("kill", "kill-checkpoint", "kill-save", "term", "term-checkpoint", "pause", *ONLY_OF_PROCESSES)

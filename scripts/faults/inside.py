"""Starts the `research` command with a fault inside its process: `inside.py JSON COMMAND ...`.

inside.py '{"kill_in": ["research.training.checkpoint", "_save"], "call": 2, "delay": 0.004}' run digits
inside.py '{"journal": "scratch/journal", "root": "scratch"}' run digits
inside.py '{"clock_seed": 7}' run digits
inside.py '{"largest_file": 20000}' run digits
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def kill_in(module: str, function: str, call: int, delay: float) -> None:
    """Kills the process some seconds after a function was called for the so-manieth time, counted from 1."""
    owner: Any = importlib.import_module(module)
    original, calls = getattr(owner, function), itertools.count(1)

    @functools.wraps(original)
    def armed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return original(*args, **kwargs)

    setattr(owner, function, armed)


def keep_journal(journal: Path, root: Path) -> None:
    """Keeps a copy of all that is flushed to the disk below `root`: what a power cut would leave, see `after_power_cut`.

    Only `os.fsync` is seen, not what libraries of C++ flush by themselves: that is a stricter disk than a real one.
    """
    flush = os.fsync
    for name in ("files", "folders", "inodes"):
        (journal / name).mkdir(parents=True, exist_ok=True)

    def fsync(file: Any) -> None:
        flush(file)
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(root) and not path.is_relative_to(journal) and path.exists():
            _record(journal, path)

    os.fsync = fsync


def _record(journal: Path, path: Path) -> None:
    inode = str(path.stat().st_ino)
    partial = journal / f"{inode}.{threading.get_ident()}"
    if path.is_dir():
        entries = {entry.name: [entry.inode(), entry.is_dir()] for entry in os.scandir(path) if not entry.is_symlink()}
        partial.write_text(json.dumps(entries))
        partial.replace(journal / "folders" / inode)
        return
    with contextlib.suppress(FileExistsError):
        os.link(path, journal / "inodes" / inode)  # while it is linked, no other file gets this number
    shutil.copyfile(path, partial)
    partial.replace(journal / "files" / inode)


def after_power_cut(journal: Path, folder: Path, target: Path) -> None:
    """Writes what is left of a folder after a power cut: flushed entries of flushed folders, with the flushed contents.

    A file whose entry was flushed and its content not is empty.
    """
    listing = journal / "folders" / str(folder.stat().st_ino)
    _restore(journal, listing, target)


def _restore(journal: Path, listing: Path, target: Path) -> None:
    target.mkdir(parents=True)
    entries = json.loads(listing.read_text()) if listing.exists() else {}
    for name, (inode, is_folder) in entries.items():
        if is_folder:
            _restore(journal, journal / "folders" / str(inode), target / name)
        elif (journal / "files" / str(inode)).exists():
            shutil.copyfile(journal / "files" / str(inode), target / name)
        else:
            (target / name).touch()


def jump_clock(seed: int) -> None:
    """Makes the clock jump forth and back, by up to four months, at every fifth look at it on average."""
    rng, now = random.Random(seed), time.time
    offset = 0.0

    def jumping() -> float:
        nonlocal offset
        if rng.random() < 0.2:
            offset = rng.uniform(-1e7, 1e7)
        return now() + offset

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)


def pass_on(fault: dict[str, Any]) -> None:
    """Arms the fault not here, but in one of the processes that `research processes` starts."""
    from research.cli import processes

    run_together = processes.run_together

    def armed(commands: list[list[str]], devices: int) -> int:
        commands = [list(command) for command in commands]
        disturbed = commands[fault["process"]]
        module = disturbed.index("-m")  # -m research run ...
        disturbed[module : module + 2] = [__file__, json.dumps(fault)]
        return run_together(commands, devices)

    processes.run_together = armed


def main(fault: dict[str, Any], arguments: list[str]) -> None:
    """Arms the fault and runs the command line."""
    if arguments[0] == "processes":
        pass_on(fault)
        fault = {}
    if "largest_file" in fault:  # in place of a full disk: a write beyond it fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest_file"], fault["largest_file"]))
    if "journal" in fault:
        keep_journal(Path(fault["journal"]), Path(fault["root"]))
    if "clock_seed" in fault:
        jump_clock(fault["clock_seed"])
    from research.cli.main import command

    if "kill_in" in fault:
        kill_in(*fault["kill_in"], fault["call"], fault["delay"])
    sys.argv[:] = ["research", *arguments]
    command()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])

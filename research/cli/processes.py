"""Runs a command as several processes of this machine, joined as on a pod: `processes.py N run NAME --option value ...`.

just processes 2 run digits --mesh data=-1               # eight fake CPU devices, four in each
just processes 4 --devices 1 run gan --mesh fsdp=-1
just processes 2 resume runs/digits/... --mesh data=8

Shows what the first process shows, and the others' complaints. Where one fails, it is named, the others are ended, and the exit
code is its own: 1, 2, or 75 where it can be gone on with, which is also what one that was killed means.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import run as runner

SCRIPTS = Path(__file__).resolve().parent
COMMANDS = ("run", "resume")
RESUMABLE = 75
PATIENCE = 5.0  # seconds that the others get to end by themselves once one has failed


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = runner.Parser("just processes", __doc__)
    parser.add_argument("processes", type=int, help="how many")
    parser.add_argument("--devices", type=int, help="fake CPU devices in each; by default eight in all")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="what the command takes")
    try:
        asked = parser.parse_args(arguments)
    except runner.Wrong as wrong:
        return runner.refuse(f"just processes N run NAME --option value ...: {wrong}", 2)
    if asked.processes < 1 or (asked.devices or 1) < 1:
        return runner.refuse(f"just processes {asked.processes}: expected at least one process, with at least one device.", 2)
    devices = asked.devices or max(1, 8 // asked.processes)
    command = [sys.executable, str(SCRIPTS / f"{asked.command}.py"), *asked.rest]
    return watched([command] * asked.processes, devices)


def watched(commands: list[list[str]], devices: int) -> int:
    """Runs commands as the processes of one training, to the end of all; returns the exit code for the whole."""
    # A port that is free now; the first process takes it a moment later.
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []

    def pass_on(number: int, _: Any) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    # A group of their own: what the terminal sends to this one is passed on, once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory() as scratch:
        for i, command in enumerate(commands):
            joining = ["--coordinator", address, "--processes", str(len(commands)), "--process", str(i)]
            process = subprocess.Popen(
                [*command, *joining],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,
            )
            assert process.stderr is not None
            readers.append(threading.Thread(target=tell, args=(i, process.stderr, Path(scratch) / str(i)), daemon=True))
            readers[-1].start()
            running.append(process)
        failed = first_to_fail(running)
        if failed is not None:
            end(running)
        for reader in readers:
            reader.join(PATIENCE)
        if failed is None:
            return 0
        code = running[failed].returncode
        if code == RESUMABLE:
            return RESUMABLE
        said = Path(scratch, str(failed)).read_text().strip().splitlines()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        last = "" if not said else f": {said[-1].removeprefix('error: ')}"
        return runner.refuse(f"process {failed} of {len(commands)} {how}{last}", RESUMABLE if code < 0 else code)


def first_to_fail(running: list[subprocess.Popen[str]]) -> int | None:
    """Waits until all processes have ended well, or one has not: which."""
    while True:
        codes = [process.poll() for process in running]
        bad = [i for i, code in enumerate(codes) if code]
        if bad:
            # One that fails takes others with it, which abort or say that somebody is gone: the cause did neither, if it is here.
            time.sleep(0.5)
            codes = [process.poll() for process in running]
            consequences = (RESUMABLE, -signal.SIGABRT)
            bad = [i for i, code in enumerate(codes) if code]
            return min(bad, key=lambda i: (consequences.index(codes[i]) + 1 if codes[i] in consequences else 0, i))
        if None not in codes:
            return None
        time.sleep(0.05)


def end(running: list[subprocess.Popen[str]]) -> None:
    """Ends processes that wait for one that is gone, kindly and then not."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def tell(number: int, stream: IO[str], copy: Path) -> None:
    """Passes on what a process complains of, with its number, those of the first as they are."""
    with copy.open("w") as file:
        for line in stream:
            file.write(line)
            file.flush()
            print(line if number == 0 else f"[process {number}] {line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

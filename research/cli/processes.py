"""Runs a command as several processes of this machine, joined as on a pod: `processes N run NAME --option value ...`.

just processes 2 run digits --mesh data=-1               # eight simulated CPU devices, four in each
just processes 4 --devices 1 run gan --mesh fsdp=-1
just processes 2 resume runs/digits/... --mesh data=8

Shows the output of the first process, and the errors of the others. If a process fails, it is named and the others are ended. The
exit code is its own: 1, 2, or 75 if the run can be resumed, which a process that was killed counts as too.
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

from research.cli.arguments import Parser, UsageError, fail
from research.training.signals import RESUMABLE

COMMANDS = ("run", "resume")
GRACE_SECONDS = 5.0  # that the other processes get to end by themselves once one has failed


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code.

    >>> main(["0", "run", "digits"])
    2
    """
    parser = Parser("just processes", __doc__)
    parser.add_argument("processes", type=int, help="how many")
    parser.add_argument("--devices", type=int, help="simulated CPU devices in each; by default eight in all")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    try:
        parsed = parser.parse_args(arguments)
    except UsageError as error:
        return fail(f"just processes N run NAME --option value ...: {error}", 2)
    if parsed.processes < 1 or (parsed.devices or 1) < 1:
        return fail(f"just processes {parsed.processes}: expected at least one process, with at least one device.", 2)
    devices = parsed.devices or max(1, 8 // parsed.processes)
    # -P: a folder named research where the user stands is not the package.
    command = [sys.executable, "-P", "-m", "research", parsed.command, *parsed.arguments]
    return run_together([command] * parsed.processes, devices)


def run_together(commands: list[list[str]], devices: int) -> int:
    """Runs commands as the processes of one training, until all have ended. Returns the exit code of the training."""
    environment = _environment(devices)
    joining = ["--coordinator", _free_address(), "--processes", str(len(commands)), "--process"]
    running: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []

    def forward(number: int, _: Any) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    with tempfile.TemporaryDirectory() as scratch:
        for i, command in enumerate(commands):
            process = subprocess.Popen(
                [*command, *joining, str(i)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=None if i == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                process_group=0,  # a signal from the terminal reaches this process only, which forwards it once
            )
            assert process.stderr is not None
            readers.append(threading.Thread(target=_copy_errors, args=(i, process.stderr, Path(scratch, str(i))), daemon=True))
            readers[-1].start()
            running.append(process)
        failed = _wait_for_failure(running)
        if failed is not None:
            _end(running)
        for reader in readers:
            reader.join(GRACE_SECONDS)
        if failed is None:
            return 0
        return _fail(failed, running, Path(scratch, str(failed)).read_text().strip().splitlines())


def _environment(devices: int) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def _free_address() -> str:
    """Returns an address whose port is free now; the first process listens there a moment later."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def _fail(failed: int, running: list[subprocess.Popen[str]], errors: list[str]) -> int:
    """Prints which process failed, and how. Returns the exit code of the training."""
    code = running[failed].returncode
    if code == RESUMABLE:
        return RESUMABLE
    reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    last = f": {errors[-1].removeprefix('error: ')}" if errors else ""
    return fail(f"process {failed} of {len(running)} {reason}{last}", RESUMABLE if code < 0 else code)


def _wait_for_failure(running: list[subprocess.Popen[str]]) -> int | None:
    """Waits until a process has failed, and returns its index; None if all have ended well."""
    while True:
        codes = [process.poll() for process in running]
        if any(codes):
            # A process that fails takes others with it, which abort or report a lost peer. The cause, if it is here, did neither.
            time.sleep(0.5)
            codes = [process.poll() for process in running]
            consequences = (RESUMABLE, -signal.SIGABRT)
            failed = [i for i, code in enumerate(codes) if code]
            return min(failed, key=lambda i: (consequences.index(codes[i]) + 1 if codes[i] in consequences else 0, i))
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(running: list[subprocess.Popen[str]]) -> None:
    """Waits a while for processes whose peer is gone, then kills them."""
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def _copy_errors(number: int, stream: IO[str], copy: Path) -> None:
    """Copies the errors of a process to a file and to stderr, with its number unless it is the first."""
    with copy.open("w") as file:
        for line in stream:
            file.write(line)
            file.flush()
            print(line if number == 0 else f"[process {number}] {line}", end="", file=sys.stderr, flush=True)

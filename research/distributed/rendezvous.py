"""Who of several processes is there: asked before they are joined, because JAX only says that somebody is not."""

import contextlib
import socket
import time

from research.state import Refused

GRACE = 60  # seconds for those who came to hear that others did not
WRONG = "wrong: "  # how an answer begins that is about what was started, not about who is missing


class Left(Refused):
    """The other processes did not come, or went: nothing is wrong with this one, and it may be run again."""


def call(coordinator: str, processes: int, process: int, timeout: int) -> None:
    """Returns when all processes are here, at the address where JAX will have them a moment later.

    `coordinator` is the first one's host:port, `process` which this one is, from 0. Raises `Left`, in all that are here, where
    some have not come within `timeout` seconds: it names them. Raises `Refused` for an address that is none or is taken, and
    where two have the same number or they do not expect the same number of processes.

    >>> call("localhost", processes=1, process=0, timeout=1)
    Traceback (most recent call last):
    research.state.Refused: processes: the coordinator is 'localhost'; expected host:port, such as 10.0.0.1:1234.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise Refused(f"processes: the coordinator is {coordinator!r}; expected host:port, such as 10.0.0.1:1234.")
    until = time.monotonic() + timeout
    if process == 0:
        told = _hear(host if is_here(host) else "", int(port), processes, until)
    else:
        told = _answer(host.strip("[]"), int(port), process, processes, until)
    if told.startswith(WRONG):
        raise Refused(f"processes: {told.removeprefix(WRONG)}; give each its own number and all the same count.")
    if told != "all":
        raise Left(f"processes: within {timeout} s {told}; look whether each was started, then run the same again.")


def is_here(host: str) -> bool:
    """Whether an address is this machine's own, which no other reaches: then nobody else is listened to.

    >>> is_here("127.0.0.1"), is_here("10.0.0.1")
    (True, False)
    """
    return host in ("localhost", "127.0.0.1")


def _hear(host: str, port: int, processes: int, until: float) -> str:
    """The first process' part: hears the others, and tells them how it ended."""
    heard: dict[int, socket.socket] = {}
    told = "all"
    try:
        listening = socket.create_server((host, port), backlog=min(processes, 4096))
    except OSError as error:
        raise Refused(f"processes: port {port} can't be listened at ({error.strerror}); choose another for all.") from error
    with listening:
        while len(heard) < processes - 1:
            listening.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection, _ = listening.accept()
                connection.settimeout(5)
                number, expected = map(int, connection.makefile().readline().split())
            except TimeoutError:
                if time.monotonic() < until:
                    continue  # somebody who connected and said nothing
                missing = ", ".join(str(i) for i in range(1, processes) if i not in heard)
                told = f"process {missing} of {processes} did not come"
                break
            except (OSError, ValueError):
                continue  # somebody else
            if expected != processes or number in heard:
                what = "came twice" if number in heard else f"expected {expected} of them, not {processes}"
                told = f"{WRONG}process {number} {what}"
                heard[-1] = connection
                break
            heard[number] = connection
        for connection in heard.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{told}\n".encode())
        for connection in heard.values():
            with connection, contextlib.suppress(OSError):
                connection.recv(1)  # the other side closes first: the port is free at once
    return told


def _answer(host: str, port: int, process: int, processes: int, until: float) -> str:
    """The part of every other process."""
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=max(until - time.monotonic(), 0.01)) as connection:
                connection.sendall(f"{process} {processes}\n".encode())
                connection.settimeout(max(until + GRACE - time.monotonic(), 0.01))
                told = connection.makefile().readline().strip()
                if told:
                    return told
        except OSError:
            pass  # it is not there yet
        time.sleep(0.1)
    return f"process 0 of {processes} did not answer at {host}:{port}"

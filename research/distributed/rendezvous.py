"""Waits for all processes before `jax.distributed` connects them: JAX reports that one is missing, but not which."""

import contextlib
import ipaddress
import socket
import time

from research.core.state import InvalidArgument

GRACE_SECONDS = 60  # seconds in which processes that are present learn that others are missing
WRONG_USAGE = "wrong: "  # prefix of an answer about how processes were started, not about missing ones
MAX_GREETING = 40  # bytes that a process sends
COMPLETE = "all"  # the answer when all are present


class PeerLost(InvalidArgument):
    """Raised where other processes are missing or gone: this one is fine and may be run again.

    >>> issubclass(PeerLost, InvalidArgument)
    True
    """


def wait_for_peers(coordinator: str, processes: int, process: int, timeout: int) -> None:
    """Returns when all processes are present, at the address that JAX uses a moment later.

    `coordinator` is the host:port of the first process, `process` the number of this one, from 0. Raises `PeerLost` in every
    process that is present if others do not connect within `timeout` seconds, and names them. Raises `InvalidArgument` for an
    address that is malformed or in use, and if two processes have the same number or disagree on the number of processes.

    >>> wait_for_peers("localhost", processes=1, process=0, timeout=1)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: processes: the coordinator is 'localhost'; expected host:port, such as 10.0.0.1:1234.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument(f"processes: the coordinator is {coordinator!r}; expected host:port, such as 10.0.0.1:1234.")
    deadline = time.monotonic() + timeout
    if process == 0:
        answer = _serve(host.strip("[]") if is_loopback(host) else "", int(port), processes, deadline)
    else:
        answer = _connect(host.strip("[]"), int(port), process, processes, deadline)
    if answer.startswith(WRONG_USAGE):
        raise InvalidArgument(
            f"processes: {answer.removeprefix(WRONG_USAGE)}; give each process its own number and all the same count."
        )
    if answer != COMPLETE:
        raise PeerLost(f"processes: within {timeout} s {answer}; check that each was started, then run the same again.")


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine's own loopback address, which other machines can't reach.

    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("10.0.0.1")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return False


def _serve(host: str, port: int, processes: int, deadline: float) -> str:
    """Waits for the other processes, in the first one, and returns the answer that all of them get."""
    connections: dict[int, socket.socket] = {}
    answer = COMPLETE
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, port), family=family, backlog=min(processes, 4096))
    except OSError as error:
        raise InvalidArgument(
            f"processes: can't listen on port {port} ({error.strerror}); choose another one for all processes."
        ) from error
    with server:
        while len(connections) < processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, number, expected = _accept(server, processes)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # a client that connected and sent nothing
                missing = ", ".join(str(i) for i in range(1, processes) if i not in connections)
                answer = f"process {missing} of {processes} did not connect"
                break
            except (OSError, ValueError):
                continue  # a client that is not one of the processes
            if expected != processes or number in connections:
                problem = "connected twice" if number in connections else f"expects {expected} processes, process 0 {processes}"
                answer = f"{WRONG_USAGE}process {number} {problem}"
                connections[-1] = connection
                break
            connections[number] = connection
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
        for connection in connections.values():
            with connection, contextlib.suppress(OSError):
                connection.recv(1)  # the client closes first, so that the port is free at once
    return answer


def _accept(server: socket.socket, processes: int) -> tuple[socket.socket, int, int]:
    """Returns the connection of another process, its number, and how many it expects.

    Anyone may connect who reaches the port: no more is read, and no longer waited, than a process needs. Raises `OSError` or
    `ValueError` for others, and `TimeoutError` if nobody comes in time.
    """
    connection, _ = server.accept()
    line, until = b"", time.monotonic() + 5
    try:
        while not line.endswith(b"\n"):
            connection.settimeout(max(until - time.monotonic(), 0.01))
            part = connection.recv(MAX_GREETING - len(line))
            if not part:
                raise ValueError("no line")
            line += part
        number, expected = map(int, line.decode("ascii").split())
        if not 0 < number < max(processes, expected):
            raise ValueError("no process")
        connection.settimeout(5)
        return connection, number, expected
    except BaseException:
        connection.close()
        raise


def _connect(host: str, port: int, process: int, processes: int, deadline: float) -> str:
    """Connects to the first process and returns its answer."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01)) as connection:
                connection.sendall(f"{process} {processes}\n".encode())
                connection.settimeout(max(deadline + GRACE_SECONDS - time.monotonic(), 0.01))
                answer = connection.makefile().readline().strip()
                if answer:
                    return answer
        except OSError:
            pass  # process 0 does not listen yet
        time.sleep(0.1)
    return f"process 0 of {processes} did not answer at {host}:{port}"

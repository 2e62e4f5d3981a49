"""Whoever reaches the port at which processes meet can't hang, crash or deceive them; on one machine nobody else reaches it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from research.distributed import rendezvous


@contextlib.contextmanager
def first_process(host: str = "127.0.0.1", processes: int = 2, timeout: int = 6) -> Iterator[tuple[int, "Future[None]"]]:
    """Yields the port at which the first of several processes waits for the others, and its result."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(rendezvous.wait_for_peers, f"{host}:{port}", processes, 0, timeout)
        time.sleep(0.2)
        yield port, waiting


def drip(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"1")
            time.sleep(0.1)


GREETINGS = {
    "nothing at all": b"",
    "an empty line": b"\n",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": b"\xff\xfe\x00\n",
    "a number that no process has": b"7 2\n",
    "the first process' own number": b"0 2\n",
    "a negative number": b"-1 2\n",
    "a huge number": b"1" * 5000 + b" 2\n",
    "a megabyte without an end": b"1" * 1_000_000,
}


@pytest.mark.parametrize("greeting", GREETINGS)
def test_a_stranger_is_not_taken_for_a_process(greeting: str) -> None:
    with first_process() as (port, waiting):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            with contextlib.suppress(OSError):
                stranger.sendall(GREETINGS[greeting])
                stranger.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
            assert not waiting.done()
            rendezvous.wait_for_peers(f"127.0.0.1:{port}", 2, 1, timeout=5)
        assert waiting.result(5) is None


@pytest.mark.slow
def test_a_stranger_who_sends_a_byte_now_and_then_does_not_hold_the_processes_up() -> None:
    with first_process(timeout=20) as (port, waiting), socket.create_connection(("127.0.0.1", port)) as stranger:
        threading.Thread(target=drip, args=(stranger,), daemon=True).start()
        rendezvous.wait_for_peers(f"127.0.0.1:{port}", 2, 1, timeout=20)
        assert waiting.result(1) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_on_one_machine_it_listens_at_loopback_only(host: str) -> None:
    with first_process(host, timeout=1) as (port, waiting):
        elsewhere = "127.0.0.3"  # an address that only a server at all addresses answers
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((elsewhere, port), timeout=1).close()
        with pytest.raises(rendezvous.PeerLost):
            waiting.result(5)

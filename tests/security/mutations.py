"""Strategies for damaged files: a good one with values, keys and bytes changed; and what a reader did to the system."""

import contextlib
import copy
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# `FUZZ_EXAMPLES=20000 python -m pytest tests/security/test_fuzz.py` runs that many of each, and others each time.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SECONDS, MEGABYTES = 10, 1000  # of a processor and of memory, that a reader may take for a file of some kilobytes

NASTY = (
    "../../../etc/passwd", "/dev/zero", "\0", "\x1b[2J\n", "\ud800", "<script>alert(1)</script>", '"><img src=x onerror=f()>',
    "$\\frac{", "%s%n", "{0}", "O", "key<fry>", "bfloat16", "F4", "__class__", "nan", "1e999", "x" * 3000,
)  # fmt: skip
INSERTED = (b"[" * 30_000, b"9" * 6000, b"\xff\xfe", b"\n", b"NaN")
NUMBERS = (0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**400), 1e308, -1e308, 5e-324, float("nan"), float("inf"))
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
leaves = st.none() | st.booleans() | numbers | st.sampled_from(NASTY) | st.text(max_size=9)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=9
)


def fuzzed(default: int) -> Any:
    """Returns the decorator of a test that is given this many examples, the same each time; or more, see `EXAMPLES`."""
    return settings(
        max_examples=EXAMPLES or default,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def _containers(node: Any) -> Iterator[Any]:
    if isinstance(node, dict | list):
        yield node
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _containers(inner)


@st.composite
def documents(draw: Any, good: Any) -> Any:
    """A JSON value with one to three values replaced, removed, added, swapped or nested."""
    root = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(list(_containers(root))))
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        action = draw(st.sampled_from(("replace", "replace", "remove", "add", "swap", "nest")))
        if action == "add" or not keys:
            if isinstance(node, dict):
                node[draw(st.sampled_from(NASTY) | st.text(max_size=9))] = draw(values)
            else:
                node.append(draw(values))
            continue
        key = draw(st.sampled_from(keys))
        if action == "replace":
            node[key] = draw(values)
        elif action == "remove" and node is not root:
            del node[key]
        elif action == "swap":
            other = draw(st.sampled_from(keys))
            node[key], node[other] = node[other], node[key]
        elif action == "nest":
            for _ in range(draw(st.sampled_from((1, 3, 60, 300)))):
                node[key] = [node[key]] if draw(st.booleans()) else {"a": node[key]}
    return root[0] if root else None


@st.composite
def damaged(draw: Any, good: bytes) -> bytes:
    """Bytes with one to four flips, cuts, insertions or repetitions."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        action = draw(st.sampled_from(("flip", "flip", "cut", "truncate", "insert", "repeat", "zeros")))
        if action == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[start : min(stop, start + 40)]
        elif action == "truncate":
            del data[start:]
        elif action == "insert":
            data[start:start] = draw(st.binary(max_size=12) | st.sampled_from(INSERTED))
        elif action == "repeat":
            data[start:start] = data[start : min(stop, start + 200)]
        elif action == "zeros":
            data[start:stop] = bytes(stop - start)
    return bytes(data)


def texts(good: Any) -> Any:
    """Files that should hold this JSON value: other values, or other bytes."""
    encoded = documents(good).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    return encoded | damaged(json.dumps(good).encode())


_watched: list[tuple[str, str]] | None = None
_STARTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind", "pickle.find_class",
)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if writes or event in _STARTS or event in _CHANGES:
        _watched.append((event, str(arguments[0] if arguments else "")))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(directory: Path | None = None) -> Iterator[None]:
    """Fails if what is done takes too long or too much memory, starts something, or writes anywhere but into `directory`."""
    global _watched
    before, started, _watched = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), []
    try:
        yield
        events = _watched
    finally:
        _watched = None
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024 * MEGABYTES
    inside = [] if directory is None else [e for e in events if e[0] not in _STARTS and e[1].startswith(str(directory))]
    assert [event for event in events if event not in inside] == []

"""Several processes that train as one: joined by `jax.distributed`, refused where they differ, kept in step.

With one process everything here is what it would be without it, and costs nothing.
"""

import contextlib
import glob
import importlib.util
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from research.rollcall import GRACE, call, is_here
from research.state import Refused

# What XLA says, in several places and spellings, where a connection to another process ends.
_GONE = re.compile(
    r"gloo.*failed|connection (reset|closed|refused)|socket closed|broken pipe|heartbeat|coordination", re.I | re.S
)


def manager(environ: Mapping[str, str]) -> str | None:
    """Whose environment says that this process is one of several: a cluster manager's name, or None.

    JAX knows these managers and asks them for the rest: where the first process is, how many there are, which one this is.

    >>> manager({"OMPI_COMM_WORLD_SIZE": "4"}), manager({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"})
    ('Open MPI', None)
    """
    if environ.get("JAX_PLATFORMS", "").startswith("tpu") or "JAX_PLATFORMS" not in environ:
        on_tpu = importlib.util.find_spec("libtpu") is not None and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*"))
        if on_tpu and "TPU_SKIP_MDS_QUERY" not in environ:
            return "Cloud TPU"
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return "Cloud TPU"
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return "SLURM"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return None


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300) -> None:
    """Joins the other processes of a training, before JAX is used for anything.

    Where the first process listens (`host:port`), how many there are and which one this is come from the cluster's manager where
    none of them is given; with neither, this is a process on its own. Waits `timeout` seconds for the others. Raises `Refused`
    where only some are given and where they make no sense, `Left` where not all processes have come.

    >>> join(processes=2)
    Traceback (most recent call last):
    research.state.Refused: processes: coordinator is missing; expected coordinator, processes and process, ...
    """
    told = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in told.items() if value is None]
    found = manager(os.environ) if len(missing) == len(told) else None
    if jax.distributed.is_initialized() or (len(missing) == len(told) and found is None):
        return
    if missing and found is None:
        raise Refused(f"processes: {missing[0]} is missing; expected coordinator, processes and process, or none of them.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise Refused(f"processes: this one is number {process} of {processes}; expected a number from 0 to {processes - 1}.")
    if coordinator is not None and processes is not None and process is not None:
        call(coordinator, processes, process, timeout)
    # CPU programs that do not depend on one another would run in any order, another in each process: their messages would mix.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # JAX, too, gives up where somebody is missing, by aborting the process without a word on what to do.
    where = f"at {coordinator}" if found is None else f"as {found} tells"
    alarm = threading.Timer(timeout, _give_up, [f"not all of them came together {where} within {timeout} s"])
    alarm.daemon = True
    alarm.start()
    try:
        detection = "deactivate" if found is None else None
        options = {"initialization_timeout": timeout + GRACE, "cluster_detection_method": detection}
        if coordinator is not None and is_here(coordinator.rpartition(":")[0]):
            options["coordinator_bind_address"] = coordinator
        jax.distributed.initialize(coordinator, processes, process, **options)  # type: ignore[arg-type]
    except Exception as error:  # JAX raises whatever its parts do
        raise Refused(f"processes: they can't be joined ({' '.join(str(error).split())[:300]}).") from error
    finally:
        alarm.cancel()


def _give_up(reason: str) -> None:
    sys.stderr.write(f"error: processes: {reason}; look whether each was started, then run the same again.\n")
    sys.stderr.flush()
    os._exit(75)


def lost(error: Exception) -> bool:
    """Whether an error says that another process is gone.

    >>> lost(ValueError("Gloo all-reduce failed: Connection reset by peer"))  # this process is alone: nobody can be lost
    False
    """
    return jax.process_count() > 1 and _GONE.search(str(error)) is not None


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def gathered(text: str) -> list[str]:
    """What each process hands in, in their order. All have to call it, at the same place.

    >>> gathered("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]


def shared(function: Callable[[], Any]) -> Any:
    """What a function gives in the first process, for all of them: plain values, as in JSON. Others do not run it.

    Where it raises `Refused`, all processes do.

    >>> shared(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return function()
    found: dict[str, Any] = {}
    if is_first():
        try:
            found = {"value": function()}
        except Refused as refusal:
            found = {"refused": str(refusal)}
    found = json.loads(gathered(json.dumps(found))[0])
    if "refused" in found:
        raise Refused(found["refused"])
    return found["value"]


def alike(facts: Mapping[str, Any]) -> None:
    """Raises `Refused` in every process where one was started with other facts than the first: named, with what differs.

    >>> alike({"revision": "abc", "batch_size": 32})
    """
    everyones = [json.loads(text) for text in gathered(json.dumps(facts, default=str, sort_keys=True))]
    for process, theirs in enumerate(everyones):
        ours = everyones[0]
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            told = ", ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differing)
            raise Refused(f"process {process} is not like process 0: {told}; start all of them with the same code and options.")


def lowest(first: int) -> Callable[[int], int]:
    """A function that gives the least of what all processes handed to it the call before, and `first` at the first call.

    One call late, so that nobody waits for the device: what it needs was done while the steps between were. All have to call it,
    as often and at the same places; alone, the answer is what is handed in.

    >>> least = lowest(7)
    >>> least(3), least(5)
    (3, 5)
    """
    count = jax.process_count()
    if count == 1:
        return lambda value: value
    mesh = Mesh(np.array(jax.devices()), ("device",))
    least = jax.jit(jnp.min, out_shardings=NamedSharding(mesh, P()))
    before: list[Any] = [first]

    def call(value: int) -> int:
        said = NamedSharding(mesh, P("device"))
        before.append(least(jax.make_array_from_callback((mesh.size,), said, lambda _: np.array([value], np.int32))))
        return int(before.pop(0))

    return call


def agreed(ask: Callable[[], bool]) -> Callable[[], bool]:
    """The question whether to stop, put to all processes: yes where one of them says so, for all at the same place.

    >>> agreed(lambda: True)()
    True
    """
    least = lowest(1)
    return lambda: not least(int(not ask()))


def whole(tree: PyTree) -> PyTree:
    """The same arrays with every number in every process, as NumPy arrays: for what looks at them outside of programs.

    With one process they are handed back as they are. All processes have to call it.

    >>> whole({"weight": jnp.ones(2)})
    {'weight': Array([1., 1.], dtype=float32)}
    """
    if jax.process_count() == 1:
        return tree

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # keys are whole everywhere
            return leaf
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            assert isinstance(leaf.sharding, NamedSharding)
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


@contextlib.contextmanager
def own(directory: Path) -> Iterator[Path]:
    """Where a process writes what only one is to write: the directory, and in all but the first one that is thrown away."""
    if is_first():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="process-") as scratch:
        yield Path(scratch)

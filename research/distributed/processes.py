"""Several processes that train as one, connected by `jax.distributed`: checked for differences and kept in step.

In a single process every function here returns its input, or runs the given function, at no cost.
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

from research.core.state import InvalidArgument
from research.distributed.rendezvous import GRACE_SECONDS, is_loopback, wait_for_peers

# XLA's messages, which differ from place to place, when the connection to another process ends.
_CONNECTION_LOST = re.compile(
    r"gloo.*failed|connection (reset|closed|refused)|socket closed|broken pipe|heartbeat|coordination", re.I | re.S
)


def cluster_manager(environ: Mapping[str, str]) -> str | None:
    """Returns the name of the cluster manager whose environment variables make this one of several processes, or None.

    JAX reads the rest from the same variables: the coordinator's address, the number of processes and the number of this one.

    >>> cluster_manager({"OMPI_COMM_WORLD_SIZE": "4"}), cluster_manager({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"})
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
    """Connects this process with the others of a training. Call it before anything else uses JAX.

    `coordinator` is the first process' address (`host:port`), `processes` their number and `process` the number of this one,
    from 0. If none is given they come from the cluster manager; without one this is a single process. Waits up to `timeout`
    seconds for the others. Raises `InvalidArgument` if only some are given or they contradict each other, and `PeerLost` if
    processes are missing.

    >>> join(processes=2)
    Traceback (most recent call last):
    research.core.state.InvalidArgument: processes: coordinator is missing; expected coordinator, processes and process, ...
    """
    arguments = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in arguments.items() if value is None]
    manager = cluster_manager(os.environ) if len(missing) == len(arguments) else None
    if jax.distributed.is_initialized() or (len(missing) == len(arguments) and manager is None):
        return
    if missing and manager is None:
        raise InvalidArgument(
            f"processes: {missing[0]} is missing; expected coordinator, processes and process, or none of them."
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InvalidArgument(f"processes: process is {process} of {processes}; expected a number from 0 to {processes - 1}.")
    if coordinator is not None and processes is not None and process is not None:
        wait_for_peers(coordinator, processes, process, timeout)
    # Independent CPU programs would run in any order, in each process another one, and their messages would mix.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # If a process is missing JAX aborts this one without advice on what to do: the timer ends it first.
    where = f"at {coordinator}" if manager is None else f"as {manager} announced"
    alarm = threading.Timer(timeout, _give_up, [f"not all processes connected {where} within {timeout} s"])
    alarm.daemon = True
    alarm.start()
    try:
        detection = "deactivate" if manager is None else None
        options = {"initialization_timeout": timeout + GRACE_SECONDS, "cluster_detection_method": detection}
        if coordinator is not None and is_loopback(coordinator.rpartition(":")[0]):
            options["coordinator_bind_address"] = coordinator
        jax.distributed.initialize(coordinator, processes, process, **options)  # type: ignore[arg-type]
    except Exception as error:  # JAX raises whatever its parts raise
        reason = " ".join(str(error).split())[:300]
        raise InvalidArgument(f"processes: they can't be connected ({reason}); check address, count and numbers.") from error
    finally:
        alarm.cancel()


def _give_up(reason: str) -> None:
    sys.stderr.write(f"error: processes: {reason}; check that each was started, then run the same again.\n")
    sys.stderr.flush()
    os._exit(75)


def is_peer_failure(error: Exception) -> bool:
    """Returns whether an error means that another process is gone.

    >>> is_peer_failure(ValueError("Gloo all-reduce failed: Connection reset by peer"))  # False in a single process
    False
    """
    return jax.process_count() > 1 and _CONNECTION_LOST.search(str(error)) is not None


def is_first() -> bool:
    """Returns whether this is process 0, which writes files and prints for all.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def allgather_text(text: str) -> list[str]:
    """Returns the text of every process, in their order. All processes must call it at the same point.

    >>> allgather_text("alone")
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


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and returns its result, a JSON value, in all processes.

    If it raises `InvalidArgument`, all processes do.

    >>> broadcast_from_first(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return function()
    result: dict[str, Any] = {}
    if is_first():
        try:
            result = {"value": function()}
        except InvalidArgument as error:
            result = {"error": str(error)}
    result = json.loads(allgather_text(json.dumps(result))[0])
    if "error" in result:
        raise InvalidArgument(result["error"])
    return result["value"]


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises `InvalidArgument` in every process if the facts of one differ from those of process 0; names what differs.

    >>> check_same({"revision": "abc", "batch_size": 32})
    """
    first, *others = [json.loads(text) for text in allgather_text(json.dumps(facts, default=str, sort_keys=True))]
    for process, remote in enumerate(others, 1):
        differing = [name for name in {**first, **remote} if first.get(name) != remote.get(name)]
        if differing:
            differences = ", ".join(f"{name} is {remote.get(name)!r}, not {first.get(name)!r}" for name in differing)
            raise InvalidArgument(
                f"process {process} differs from process 0: {differences}; start all of them with the same code and options."
            )


def lagged_min(first: int) -> Callable[[int], int]:
    """Returns a function that gives the minimum of all processes' arguments of the previous call, and `first` at the first call.

    It lags one call so that no process waits for the device: the reduction runs while the host goes on. All processes must call
    it equally often and at the same points. In a single process it returns its argument, without a lag.

    >>> minimum = lagged_min(7)
    >>> minimum(3), minimum(5)
    (3, 5)
    """
    if jax.process_count() == 1:
        return lambda value: value
    mesh = Mesh(np.array(jax.devices()), ("device",))
    minimum = jax.jit(jnp.min, out_shardings=NamedSharding(mesh, P()))
    pending: list[Any] = [first]

    def call(value: int) -> int:
        sharding = NamedSharding(mesh, P("device"))
        local = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([value], np.int32))
        pending.append(minimum(local))
        return int(pending.pop(0))

    return call


def any_process(condition: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function that returns whether the condition held in any process, at the same point in all of them.

    It lags one call, see `lagged_min`.

    >>> any_process(lambda: True)()
    True
    """
    minimum = lagged_min(1)
    return lambda: not minimum(int(not condition()))


def to_host(tree: PyTree) -> PyTree:
    """Returns the arrays with all their elements in every process, as NumPy arrays, for use outside of compiled programs.

    A single process gets them back unchanged. Of several processes each gets typed keys as arrays of its own device, since NumPy
    has none. All processes must call it.

    >>> to_host({"weight": jnp.ones(2)})
    {'weight': Array([1., 1.], dtype=float32)}
    """
    if jax.process_count() == 1:
        return tree

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(gather(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        if isinstance(leaf.sharding, NamedSharding):
            return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(gather, tree)


@contextlib.contextmanager
def process_directory(directory: Path) -> Iterator[Path]:
    """Yields the directory in process 0, and in the others a temporary one: for files that only one process should write.

    >>> with process_directory(Path("runs/1")) as directory:
    ...     directory.as_posix()
    'runs/1'
    """
    if is_first():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="process-") as temporary:
        yield Path(temporary)

"""libtpu, the compiler for TPUs, used without a TPU: configuration, devices to compile for, out-of-memory messages."""

import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import keras  # noqa: F401  (for the examples in docstrings)
from jax.experimental import topologies

from research import distributed
from research.core.state import InvalidArgument
from research.planning.chips import CHIPS, GIB, parse_topology


class OutOfMemory(NamedTuple):
    """What the compiler reports where the HBM does not suffice: GiB used and available, and the largest arrays.

    `used` includes the arguments of the program if `includes_arguments`.

    >>> OutOfMemory(used=20.5, limit=15.75, includes_arguments=True, largest=[]).used
    20.5
    """

    used: float
    limit: float
    includes_arguments: bool
    largest: list[dict[str, Any]]


def configure_libtpu(topology: str) -> None:
    """Prepares this process to compile for `topology`. Call it before JAX first uses a backend.

    JAX runs on the CPU, libtpu is also looked up in the `libtpu` folder of the Python environment, and does not ask Google's
    metadata servers what machine this is. Compiled programs are not cached: one for absent chips can't be read back. Child
    processes inherit the environment variables.

    >>> configure_libtpu("v5e:2x4")  # doctest: +SKIP
    """
    folder = str(Path(sys.prefix) / "libtpu")
    if folder not in sys.path:
        sys.path.append(folder)
    chip = CHIPS.get(topology.partition(":")[0], CHIPS["v5e"])
    variables = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    os.environ.update(variables)
    jax.config.update("jax_platforms", "cpu")  # JAX reads its environment variable only when it is imported
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of a topology such as `v5e:16x16`, to compile for.

    Raises `InvalidArgument` for an unknown topology and where libtpu is missing. Outside Google's cloud, call
    `configure_libtpu` first: otherwise libtpu waits for a metadata server.

    >>> topology_devices("v5e:2x5")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: topology 'v5e:2x5': unknown, did you mean 'v5e:2x4'? There are ...
    """
    chip, _ = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InvalidArgument(
            f"topology {topology}: libtpu, the compiler for TPUs, is not installed; expected `import libtpu` to find it: "
            "use `just plan`, which installs it, or install the extra `plan`."
        )
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", chip_config_name=chip.config).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InvalidArgument(
            f"topology {topology}: this libtpu can't compile for it ({_one_line(error)}); choose another."
        ) from error


def topology_mesh(devices: Sequence[Any], topology: str, axes: Mapping[str, int]) -> jax.sharding.Mesh:
    """Returns a mesh of a topology's devices that follows their physical links. Raises `InvalidArgument` where there is none.

    >>> dict(topology_mesh(jax.devices()[:1], "v5e:2x2", {"fsdp": 1}).shape)
    {'fsdp': 1}
    """
    try:
        return distributed.mesh(devices, **axes)
    except NotImplementedError as error:
        sizes = ",".join(f"{axis}={size}" for axis, size in axes.items())
        sides = topology.partition(":")[2]
        raise InvalidArgument(
            f"mesh: {sizes} can't be laid over {topology}; expected sizes that are products of the sides {sides}: choose others."
        ) from error


def compile_lowered(lowered: jax.stages.Lowered, topology: str) -> jax.stages.Compiled | OutOfMemory:
    """Compiles a lowered function. Returns `OutOfMemory` where the compiler gives up for lack of HBM.

    Raises `InvalidArgument` where the compiler fails for another reason; `topology` stands for the target in that message.

    >>> lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), "float32"))
    >>> compile_lowered(lowered, "v5e:2x2").as_text().startswith("HloModule")
    True
    """
    try:
        with warnings.catch_warnings():  # with a compilation cache, a program for absent chips can't be read back
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        failure = parse_out_of_memory(str(error))
        if failure is None:
            raise InvalidArgument(f"{topology}: the compiler fails ({_one_line(error)}); try another mesh or layout.") from error
        return failure


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Parses a compiler's error message; returns None if the error is not about HBM.

    >>> parse_out_of_memory("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.")
    OutOfMemory(used=20.5, limit=15.75, includes_arguments=True, largest=[])
    """
    total = re.search(r"Used ([\d.]+[KMGTP]?)B? of ([\d.]+[KMGTP]?)B? hbm", message)
    temporaries = re.search(r"temporaries \(([\d.]+[KMGTP]?)B?\) exceeds available HBM \(([\d.]+[KMGTP]?)B?\)", message)
    sizes = total or temporaries
    if sizes is None:
        return None
    largest = []
    for size, block in re.findall(r"\d+\. Size: ([\d.]+[KMGTP]?)B?\s*\n(.*?)(?:={5,}|\Z)", message, re.DOTALL):
        lines = dict(re.findall(r"^\s*(Operator|Shape|XLA label|Allocation type): (.*)$", block, re.MULTILINE))
        operator = re.search(r'op_name="([^"]*)"', lines.get("Operator", ""))
        label = str(lines.get("XLA label", lines.get("Allocation type", "")))
        what = operator[1] if operator else label.partition(" = ")[0]
        largest.append({"gib": _parse_gib(size), "shape": lines.get("Shape", "").partition("{")[0], "what": what})
    return OutOfMemory(_parse_gib(sizes[1]), _parse_gib(sizes[2]), total is not None, largest)


def _parse_gib(size: str) -> float:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
    return float(size.rstrip("".join(units))) * units.get(size[-1], 1) / GIB


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."

"""What the compilers are told by default, as those who make the chips advise or as measured; in one place."""

from collections.abc import Mapping, MutableMapping

# Of every platform at once: each compiler reads its own.
ADVISED: Mapping[str, tuple[str, ...]] = {
    "XLA_FLAGS": (
        # Computation goes on while devices talk (JAX: "GPU performance tips"; NVIDIA's JAX images have it on).
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
    "LIBTPU_INIT_ARGS": (
        # The same on TPUs, which have it off for collectives (MaxText and MaxDiffusion train with these).
        "--xla_enable_async_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
    ),
}


def advise(environment: MutableMapping[str, str]) -> None:
    """Adds the advised flags to an environment, before those that it has: of a flag given twice the last counts.

    Compilers read them when JAX first looks for devices, so this comes before.

    >>> environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    >>> advise(environment)
    >>> environment["XLA_FLAGS"].split()[-1], len(environment["LIBTPU_INIT_ARGS"].split())
    ('--xla_gpu_enable_latency_hiding_scheduler=false', 5)
    """
    for name, flags in ADVISED.items():
        environment[name] = " ".join([*flags, *environment.get(name, "").split()])

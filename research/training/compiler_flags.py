"""The compiler flags that are set by default: recommended by the hardware vendors, or measured here."""

from collections.abc import Mapping, MutableMapping

# For all platforms at once: each compiler reads only its own flags. None for TPUs: what MaxText and MaxDiffusion pass for
# asynchronous collectives is the default of libtpu (0.0.42 compiles the same program with and without).
RECOMMENDED_FLAGS: Mapping[str, tuple[str, ...]] = {
    "XLA_FLAGS": (
        # Computation continues while devices communicate (JAX: "GPU performance tips"; NVIDIA's JAX images enable it).
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
}


def add_recommended_flags(environment: MutableMapping[str, str]) -> None:
    """Adds the recommended flags to an environment, before its existing ones, which win: the last of repeated flags counts.

    Call it before JAX first looks for devices, when compilers read their flags.

    >>> environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    >>> add_recommended_flags(environment)
    >>> environment["XLA_FLAGS"].split()[-1]
    '--xla_gpu_enable_latency_hiding_scheduler=false'
    """
    for name, flags in RECOMMENDED_FLAGS.items():
        environment[name] = " ".join([*flags, *environment.get(name, "").split()])

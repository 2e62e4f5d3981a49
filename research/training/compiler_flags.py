"""What the compilers are told by default, as those who make the chips advise or as measured; in one place."""

from collections.abc import Mapping, MutableMapping

# Of every platform at once: each compiler reads its own. None for TPUs: what MaxText and MaxDiffusion pass for asynchronous
# collectives is libtpu's default by now (0.0.42 compiles the same program with and without).
ADVISED: Mapping[str, tuple[str, ...]] = {
    "XLA_FLAGS": (
        # Computation goes on while devices talk (JAX: "GPU performance tips"; NVIDIA's JAX images have it on).
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
}


def advise(environment: MutableMapping[str, str]) -> None:
    """Adds the advised flags to an environment, before those that it has: of a flag given twice the last counts.

    Compilers read them when JAX first looks for devices, so this comes before.

    >>> environment = {"XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=false"}
    >>> advise(environment)
    >>> environment["XLA_FLAGS"].split()[-1]
    '--xla_gpu_enable_latency_hiding_scheduler=false'
    """
    for name, flags in ADVISED.items():
        environment[name] = " ".join([*flags, *environment.get(name, "").split()])

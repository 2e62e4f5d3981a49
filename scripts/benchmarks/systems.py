"""The systems that the benchmark compares: how each is called, which module builds it and which package it needs."""

from typing import NamedTuple


class System(NamedTuple):
    """How the benchmark runs a system."""

    title: str
    """Its name in tables and in the figure."""
    module: str
    """The file beside this one whose `build(system, workload, data)` returns its `train(epochs)`."""
    package: str
    """What has to be installed."""
    keras_backend: str | None = None
    """Set before Keras is imported; None: the module chooses, or does not use Keras."""
    peer: bool = False
    """Whether it is somebody else's: `fastest_peer` is chosen among these."""


SYSTEMS = {
    "research": System("research", "with_research", "jax"),
    "research-unfused": System("research, a hook at each step", "with_research", "jax"),
    "research-reordered": System("research, fast sums", "with_research", "jax"),
    "research-fit": System("research.fit", "with_research", "jax"),
    "jax-scan": System("JAX by hand, scan (the floor)", "with_jax", "jax"),
    "jax-loop": System("JAX by hand, loop", "with_jax", "jax"),
    "keras-jax": System("Keras fit, JAX", "with_keras", "jax", "jax", peer=True),
    "keras-jax-32": System("Keras fit, JAX, 32 steps per execution", "with_keras", "jax", "jax", peer=True),
    "keras-tensorflow": System(
        "Keras fit, TensorFlow, 32 steps per execution", "with_keras", "tensorflow", "tensorflow", peer=True
    ),
    "keras-torch": System("Keras fit, PyTorch", "with_keras", "torch", "torch", peer=True),
    "torch": System("PyTorch", "with_torch", "torch", peer=True),
    "flax-nnx": System("Flax NNX", "with_flax", "flax", peer=True),
}

"""What performance.jsonl holds about a session's devices: their memory, and how fast they could be at best."""

from typing import Any

import jax

from research.core.learner import Learner
from research.data.batches import Batches
from research.planning.chips import CHIPS
from research.planning.flops import model_flops

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def device_memory() -> dict[str, float]:
    """Returns the bytes in use on the first device of this process, and their peak, if the backend tells them.

    >>> device_memory()  # a CPU does not
    {}
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_peak_bytes"}
    return {name: float(stats[key]) for key, name in names.items() if key in stats}


def best_step_seconds(learner: Learner, state: Any, data: Batches) -> float | None:
    """Returns the seconds of a training step at the peak of all chips, from its model FLOPs; None if their peak is not known.

    >>> import keras, numpy as np, research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse")
    >>> best_step_seconds(learner, learner.init(), research.from_arrays(np.ones((32, 1)), np.ones((32, 1))))
    """
    chip = CHIPS.get(KINDS.get(jax.devices()[0].device_kind, ""))
    if chip is None:
        return None
    return model_flops(learner.train, state, data.shapes) / (chip.flops * jax.device_count())

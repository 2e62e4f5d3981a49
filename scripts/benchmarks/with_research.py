"""Our own loop as `just run` uses it, the same with a hook at each step or sums reordered, and our `fit` on a compiled model."""

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import research  # isort: skip  (before keras: it chooses Keras' backend)
import jax
import keras
import networks
import with_keras
from workloads import GPT_RATE, RATE, WORKLOADS, augmented, order

from experiments import gan
from research import record, reordering


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """A learner and the loop, or a compiled model and `fit`."""
    if system == "research-fit":
        return with_keras.trainer(research.fit, with_keras.compiled(workload, 1), workload, data)
    gc.freeze()  # as `just run` does
    made, batches = learner(workload), stream(data) if workload == "stream" else resident(workload, data)
    made = made._replace(train=reordering.reordered(made.train)) if system == "research-reordered" else made
    run = record.Run(Path(tempfile.mkdtemp()), workload, {})
    hooks = [(1, lambda step, state, logs: None)] if system == "research-unfused" else []
    state, done, waited = made.init(), 0, 0.0

    def progress(step: int, seconds: float) -> None:
        nonlocal waited
        waited = seconds

    def train(epochs: int) -> dict[str, float]:
        nonlocal state, done
        total = done + epochs * batches.steps_per_epoch
        options = {"log_every": 50, "log": lambda entry: record.append(run, entry), "progress": progress}
        state, logs = research.train(made, batches, steps=total, start=done, state=state, hooks=hooks, **options)
        done = total
        return logs | {"seconds_waiting_for_data": waited}

    return train


def learner(workload: str) -> research.Learner:
    """A workload's network with its loss, optimizer and metrics; the GAN is that of the experiments."""
    if workload == "gan-64":
        return gan.build(gan.Config(batch_size=64))
    keras.utils.set_random_seed(0)
    network = networks.network(workload)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if workload == "gpt-16":
        return research.supervised(network, loss=crossentropy, optimizer=keras.optimizers.Adam(GPT_RATE))
    if workload == "tickets-128":
        return research.supervised(
            network,
            loss={"priority": keras.losses.BinaryCrossentropy(from_logits=True), "department": crossentropy},
            loss_weights={"priority": 0.5, "department": 1.0},
            metrics={"priority": [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)], "department": ["accuracy"]},
            optimizer=keras.optimizers.Adam(RATE),
        )
    return research.supervised(network, loss=crossentropy, optimizer=keras.optimizers.Adam(RATE), metrics=["accuracy"])


def resident(workload: str, data: dict[str, Any]) -> research.Batches:
    """Arrays that are kept on the device."""
    size = WORKLOADS[workload].batch_size
    if workload == "gan-64":
        return research.arrays(data["x"].reshape(-1, 8, 8), batch_size=size)
    if workload == "tickets-128":
        x, y = ({name: data[name] for name in names} for names in (("title", "body", "tags"), ("priority", "department")))
        return research.arrays(x, y, batch_size=size)
    return research.arrays(data["x"], data["y"], batch_size=size)


def stream(data: dict[str, Any]) -> research.Batches:
    """Batches of a file that a step's number addresses, made on the host."""
    work = WORKLOADS["stream"]

    def batch(step: int) -> research.Batch:
        epoch, position = divmod(step, work.steps)
        rows = order(work.examples, epoch)[position * work.batch_size : (position + 1) * work.batch_size]
        return research.Batch(augmented(data["x"][rows], seed=step), data["y"][rows])

    first = batch(0)
    shapes = research.Batch(*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in first[:2]))
    return research.Batches(batch, shapes, work.steps, work.examples)

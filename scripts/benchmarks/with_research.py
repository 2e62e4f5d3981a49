"""The loop of `just run`, the same with a hook at each step or with fast sums, and `research.fit` on a compiled model."""

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
from workloads import GPT_LEARNING_RATE, LEARNING_RATE, WORKLOADS, augment, order

from experiments import gan
from research.cpu import sums
from research.reporting import record


def build(system: str, workload: str, data: dict[str, Any]) -> Callable[[int], dict[str, float]]:
    """Returns a function that trains some epochs and returns the last one's logs."""
    if system == "research-fit":
        return with_keras.train_with(research.fit, with_keras.compiled(workload, 1), workload, data)
    gc.freeze()  # as `just run` does
    learner = build_learner(workload)
    batches = stream(data) if workload == "stream" else from_memory(workload, data)
    if system == "research-reordered":
        learner = learner._replace(train=sums.fast_sums(learner.train))
    run = record.Run(Path(tempfile.mkdtemp()), workload, {})
    hooks = [(1, lambda step, state, logs: None)] if system == "research-unfused" else []
    state, step, seconds_waiting = learner.init(), 0, 0.0

    def progress(step: int, seconds: float) -> None:
        nonlocal seconds_waiting
        seconds_waiting = seconds

    def train(epochs: int) -> dict[str, float]:
        nonlocal state, step
        last_step = step + epochs * batches.steps_per_epoch
        options = {"log_every": 50, "log": lambda entry: record.append_entry(run, entry), "progress": progress}
        state, logs = research.train(learner, batches, steps=last_step, start=step, state=state, hooks=hooks, **options)
        step = last_step
        return logs | {"seconds_waiting_for_data": seconds_waiting}

    return train


def build_learner(workload: str) -> research.Learner:
    """Returns the learner of a workload; the GAN is experiments/gan.py."""
    if workload == "gan-64":
        return gan.build(gan.Config(batch_size=64))
    keras.utils.set_random_seed(0)
    network = networks.network(workload)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if workload == "gpt-16":
        return research.supervised(network, loss=crossentropy, optimizer=keras.optimizers.Adam(GPT_LEARNING_RATE))
    if workload == "tickets-128":
        return research.supervised(
            network,
            loss={"priority": keras.losses.BinaryCrossentropy(from_logits=True), "department": crossentropy},
            loss_weights={"priority": 0.5, "department": 1.0},
            metrics={"priority": [keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0)], "department": ["accuracy"]},
            optimizer=keras.optimizers.Adam(LEARNING_RATE),
        )
    return research.supervised(network, loss=crossentropy, optimizer=keras.optimizers.Adam(LEARNING_RATE), metrics=["accuracy"])


def from_memory(workload: str, data: dict[str, Any]) -> research.Batches:
    """Returns batches of arrays that stay on the device."""
    size = WORKLOADS[workload].batch_size
    if workload == "gan-64":
        return research.from_arrays(data["x"].reshape(-1, 8, 8), batch_size=size)
    if workload == "tickets-128":
        x, y = ({name: data[name] for name in names} for names in (("title", "body", "tags"), ("priority", "department")))
        return research.from_arrays(x, y, batch_size=size)
    return research.from_arrays(data["x"], data["y"], batch_size=size)


def stream(data: dict[str, Any]) -> research.Batches:
    """Returns batches that are read from a file and augmented on the host; a batch depends on its step only."""
    work = WORKLOADS["stream"]

    def batch(step: int) -> research.Batch:
        epoch, position = divmod(step, work.steps)
        rows = order(work.examples, epoch)[position * work.batch_size : (position + 1) * work.batch_size]
        return research.Batch(augment(data["x"][rows], seed=step), data["y"][rows])

    first = batch(0)
    shapes = research.Batch(*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in first[:2]))
    return research.Batches(batch, shapes, work.steps, work.examples)

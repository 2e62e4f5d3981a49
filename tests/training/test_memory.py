"""Memory and threads stay flat over many epochs, evaluations and models in one process."""

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from small_training import X, Y, data, learner

import research


class Use(NamedTuple):
    """What this process holds: JAX's arrays, threads, and resident memory in KiB."""

    arrays: int
    threads: int
    memory: int


def use() -> Use:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Use(len(jax.live_arrays()), len(os.listdir("/proc/self/task")), pages * os.sysconf("SC_PAGE_SIZE") // 1024)


def streamed() -> research.Batches:
    return research.data.from_iterable(lambda: ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)), steps_per_epoch=5)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("source", [data, streamed])
def test_epochs_and_evaluations_leave_nothing_behind(source: Any) -> None:
    classifier, batches = learner(), source()
    uses: dict[int, Use] = {}

    def measure(step: int, state: Any, logs: Any) -> None:
        if step // 5 in (50, 300):
            uses[step // 5] = use()

    state, _ = research.train(classifier, batches, epochs=300, evaluations={"val": batches}, hooks=[(5, measure)])
    assert uses[300].arrays <= uses[50].arrays
    assert uses[300].threads <= uses[50].threads
    assert uses[300].memory - uses[50].memory < 250 * 8  # KiB: less than a batch an epoch
    uses = {}
    for i in range(300):
        research.evaluate(classifier, batches, state)
        if i in (49, 299):
            uses[i] = use()
    assert uses[299].arrays <= uses[49].arrays
    assert uses[299].threads <= uses[49].threads
    assert uses[299].memory - uses[49].memory < 250 * 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' /proc")
def test_models_that_are_gone_leave_nothing_behind() -> None:
    uses = []
    for _ in range(16):
        classifier = learner()
        state, _ = research.train(classifier, data(), steps=5)
        research.evaluate(classifier, data(), state)
        del classifier, state
        uses.append(use())
    first, last = uses[5], uses[-1]
    assert last.arrays <= first.arrays
    assert last.threads <= first.threads
    assert last.memory - first.memory < 10 * 2048  # KiB: compiled programs that stay would be more

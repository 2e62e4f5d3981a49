"""Distillation: who is trained on what, and what the student reaches without a label."""

from typing import Any

import jax
import numpy as np
import pytest

import research
from experiments import distill

pytestmark = pytest.mark.slow


def equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_student_learns_from_the_teacher_alone() -> None:
    config = distill.Config(batch_size=8)
    learner, batch = distill.build(config), distill.data(config)["train"].batch(0)
    state, train = learner.init(), jax.jit(learner.train)
    after, _ = train(state, batch)
    relabelled, _ = train(state, batch._replace(y=(batch.y + 1) % 10))
    assert not equal(after["baseline"].trainable, relabelled["baseline"].trainable)
    # With the same teacher before and after its step, labels make no difference to the student.
    frozen = distill.build(distill.Config(batch_size=8, learning_rate=0.0))
    logs = [jax.jit(frozen.train)(frozen.init(), batch._replace(y=y))[1]["student_loss"] for y in (batch.y, (batch.y + 1) % 10)]
    assert float(logs[0]) == float(logs[1])


def test_after_40_epochs_it_reads_digits_without_having_seen_a_label() -> None:
    config = distill.Config(epochs=40)
    learner, splits = distill.build(config), distill.data(config)
    state, _ = research.train(learner, splits["train"], epochs=config.epochs)
    scores = research.evaluate(learner, splits["test"], state)
    assert scores["teacher_accuracy"] >= 0.97
    assert scores["student_accuracy"] >= 0.92

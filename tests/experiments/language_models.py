"""Training of language models, which the tests of several experiments share."""

from typing import Any

import jax

import research
from research import distributed


def train(experiment: Any, config: Any, steps: int = 1, axes: dict[str, int] | None = None) -> tuple[research.State, list[float]]:
    """The state after so many steps, and the loss of each step, on one device or on a mesh with these axes."""
    if axes is None:
        learner = experiment.build(config)
        state = learner.init()
    else:
        learner, state = distributed.build_sharded(lambda: experiment.build(config), distributed.mesh(**axes))
    data, train_step, losses = experiment.data(config)["train"], jax.jit(learner.train), []
    for step in range(steps):
        state, logs = train_step(learner.reset(state), data.batch(step))
        losses.append(float(logs["loss"]))
    return state, losses

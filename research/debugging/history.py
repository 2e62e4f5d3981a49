"""The state of a run after any of its steps, computed again from a checkpoint; and what the run did about bad steps."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from research.core.state import InvalidArgument
from research.distributed.processes import broadcast_from_first
from research.errors import one_line
from research.reporting.run_files import MAX_STEP, ignore
from research.training import checkpoint, leaves, loop
from research.training.bad_steps import NONFINITE, BadStep
from research.training.checkpoint import Checkpoint
from research.training.logs import LogEntry
from research.training.manifest import ANY, Origin, verify
from research.training.warm_start import restore_start
from research.transforms.skip_nonfinite import loses_finite

DECISIONS = "decisions.jsonl"


class Decision(NamedTuple):
    """What a run did about a bad step: after `step` steps it went on with the state of step `restored`.

    If that is the step before, the bad one was skipped; otherwise the run was rolled back. Either way it went on with the next
    batch. `reason` is "nonfinite" or "spike".

    >>> Decision(37, 36, "nonfinite").restored
    36
    """

    step: int
    restored: int
    reason: str


class History(NamedTuple):
    """What a run's earlier states are computed from: its learner, training data, checkpoints and decisions.

    `initial` returns the initial state, `like` a state with the shapes and shardings of a restored one. `origin` is what the
    checkpoints are of.

    >>> History(None, None, Path("no/run"), lambda: jnp.zeros(()), jnp.zeros(())).decisions
    ()
    """

    learner: Any
    data: Any
    checkpoints: Path
    initial: Callable[[], Any]
    like: Any
    origin: Origin = ANY
    decisions: tuple[Decision, ...] = ()


def read_decisions(directory: Path) -> tuple[Decision, ...]:
    """Returns the decisions of the run in a directory, in the order of their steps.

    Raises `InvalidArgument` for a file that can't be read: without it the run's states can't be computed again.

    >>> read_decisions(Path("no/run"))
    ()
    """
    path = directory / DECISIONS
    if not os.path.lexists(path):
        return ()
    try:
        if not path.is_file():  # reading a pipe might never end
            raise ValueError("it is not a regular file")
        decisions = [_decision(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = one_line(error, 200)
        raise InvalidArgument(f"{path}: it is damaged ({reason}); restore it from a backup, or start a new run.") from error
    return tuple(sorted(decisions))


def _decision(values: dict[str, Any]) -> Decision:
    """Returns a decision of the file. Raises `ValueError` or `TypeError` for what a run does not write."""
    step, restored, reason = decision = Decision(**values)
    if not (type(step) is int and type(restored) is int and 0 <= restored < step <= MAX_STEP and isinstance(reason, str)):
        raise ValueError("a decision goes from a step back to an earlier one")
    return decision


def record_decision(directory: Path, decision: Decision) -> None:
    """Adds a decision to those of the run in a directory.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> record_decision(directory, Decision(37, 36, "nonfinite"))
    >>> read_decisions(directory)
    (Decision(step=37, restored=36, reason='nonfinite'),)
    """
    with (directory / DECISIONS).open("a") as file:
        file.write(json.dumps(decision._asdict()) + "\n")
        file.flush()


def state_after(
    history: History, step: int, log: Callable[[LogEntry], None] | None = None, log_every: int | None = None
) -> Checkpoint:
    """Returns the state of a run after `step` steps, bit for bit, and the logs of that step.

    The run's own program goes on from the newest intact checkpoint up to there, or from the initial state; decisions on the way
    are repeated. `log` is called with a `LogEntry` every `log_every` steps, as in the run. A decision counts as made from its own
    step on: `state_after(history, 36)` is the state before step 37, whatever was done about that.

    >>> import keras, research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse")
    >>> data = research.from_arrays(np.ones((8, 1)), np.ones((8, 1)), batch_size=2)
    >>> history = History(learner, data, Path("no/checkpoints"), learner.init, learner.init())
    >>> first, skipped = state_after(history, 3), state_after(history._replace(decisions=(Decision(3, 2, "spike"),)), 3)
    >>> int(first.state.optimizer[0]), int(skipped.state.optimizer[0])
    (3, 2)
    """
    start = _start(history, last_checkpoint(history, step), log, log_every)
    if start.step == step:
        return start
    last: list[dict[str, Any]] = []
    state, _ = loop.train(
        history.learner,
        history.data,
        steps=step,
        start=start.step,
        state=start.state,
        log=log,
        log_every=log_every,
        hooks=[(step, lambda _, state, logs: last.append(jax.device_get(logs)))],
    )
    return Checkpoint(step, state, {name: np.asarray(value, np.float64) for name, value in last[-1].items()})


def _start(
    history: History, step: int, log: Callable[[LogEntry], None] | None = None, log_every: int | None = None
) -> Checkpoint:
    """Returns a checkpoint, what a decision led to, or the initial state: the one of `step`, which is from `last_checkpoint`."""
    decision = next((each for each in history.decisions if each.step == step), None)
    if broadcast_from_first(lambda: verify(_path(history, step), history.origin) is None):
        return checkpoint.restore(_path(history, step), history.like, history.learner.names, history.origin)
    if decision is None:
        arguments = history.like, history.learner.names, ignore, history.origin
        start = restore_start(history.checkpoints.parent, *arguments)
        return Checkpoint(0, history.initial() if start is None else start, {})
    earlier = history._replace(decisions=tuple(each for each in history.decisions if each.step < step))
    return resumed_after(history, decision, state_after(earlier, decision.restored, log, log_every))


def resumed_after(history: History, decision: Decision, restored: Checkpoint) -> Checkpoint:
    """Returns what a run goes on from after a decision, given the state that it restored.

    Its metrics are reset if the bad step, or one after the restored state, is the first of an epoch.
    """
    epoch_start = (decision.step - 1) // history.data.steps_per_epoch * history.data.steps_per_epoch
    if epoch_start >= restored.step:
        return Checkpoint(decision.step, jax.jit(history.learner.reset)(restored.state), {})
    return Checkpoint(decision.step, restored.state, restored.logs)


def first_bad_step(history: History, seen: int) -> tuple[int, Checkpoint]:
    """Returns the first step that made a finite number of the state NaN or infinite, and the state before it.

    `seen` is the step at which that was noticed, in a loss or in the state: it is returned if no earlier one did it. Steps are
    run again one by one, from the newest checkpoint before whose weights are finite; three states are in memory then.
    """
    start = _start(history, last_checkpoint(history, seen - 1))
    while start.step and _has_nan(start.state):
        start = _start(history, last_checkpoint(history, start.step - 1))
    lost, copy = jax.jit(loses_finite), copier()
    before = Checkpoint(start.step, copy(start.state), start.logs)

    def check(step: int, state: Any, logs: Any) -> None:
        nonlocal before
        if step == seen or bool(lost(before.state, state)):
            raise BadStep(step, NONFINITE, "found")
        logs = {name: np.asarray(value, np.float64) for name, value in jax.device_get(logs).items()}
        before = Checkpoint(step, copy(state), logs)

    try:
        loop.train(history.learner, history.data, steps=seen, start=start.step, state=start.state, hooks=[(1, check)])
    except BadStep as found:
        return found.step, before
    raise AssertionError


def copier() -> Callable[[PyTree], PyTree]:
    """Returns a function that copies a state, each array to where it is.

    >>> copier()({"weight": jnp.ones(2)})
    {'weight': Array([1., 1.], dtype=float32)}
    """
    copy = leaves.copier()

    def copied(state: PyTree) -> PyTree:
        values, structure = jax.tree.flatten(state)
        return jax.tree.unflatten(structure, copy([value if hasattr(value, "dtype") else np.asarray(value) for value in values]))

    return copied


def _has_nan(state: PyTree) -> bool:
    """Returns whether a state has a NaN, which no training starts with; infinities may be meant."""
    arrays = [leaf for leaf in jax.tree.leaves(state) if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return bool(jax.jit(lambda leaves: jnp.any(jnp.stack([jnp.any(jnp.isnan(leaf)) for leaf in leaves])))(arrays))


def last_checkpoint(history: History, step: int, counts: Callable[[int], bool] = lambda step: True) -> int:
    """Returns the step of the newest intact checkpoint that leads to the state after `step` steps, of those that count.

    `counts` is a function of a checkpoint's step. Without one that is the step of the last decision, or 0, the initial state.

    >>> last_checkpoint(History(None, None, Path("no/run"), lambda: jnp.zeros(()), jnp.zeros(())), 100)
    0
    """
    earliest = max((each.step for each in history.decisions if each.step <= step), default=0)

    def find() -> int:
        saved = (each for each in reversed(checkpoint.steps(history.checkpoints)) if earliest <= each <= step and counts(each))
        return next((each for each in saved if verify(_path(history, each), history.origin) is None), earliest)

    found: int = broadcast_from_first(find)
    return found


def _path(history: History, step: int) -> Path:
    return history.checkpoints / f"{step:09d}"

"""A step of a run once more, bit for bit, with everything that happens inside it."""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras  # noqa: F401  (for the example in a docstring)
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.state import InvalidArgument, num_rows
from research.data.batches import Batches
from research.debugging.blame import Blame, blame_of, layer_name
from research.debugging.history import Decision, History, copier, last_checkpoint, read_decisions, state_after
from research.debugging.instrument import Call, instrumented_step
from research.reporting import record, run_files
from research.training import checkpoint, loop
from research.training.bad_steps import is_loss
from research.training.logs import LogEntry
from research.training.manifest import Origin, config_digest, verify

MAX_ROWS = 1024  # for which the loss is computed one by one


class Replay(NamedTuple):
    """A step that was run again.

    `start` is the step of the checkpoint that it was computed from, `compared` the steps whose logs in metrics.jsonl were equal,
    `digest_before` and `digest` the SHA-256 digests of the state before and after the step, and `decision` what the run
    did about the step, if it was a bad one. `layers` has statistics of the outputs of every layer call, and of their gradients,
    `calls` the arrays; `row_losses` is the loss of each row alone, in evaluation, and empty if it can't be computed.

    >>> Replay(3, 0, [1], "", "", None, {}, {}, [], None, [], None).step
    3
    """

    step: int
    start: int
    compared: list[int]
    digest_before: str
    digest: str
    decision: Decision | None
    logs: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    calls: list[Call]
    blame: Blame | None
    row_losses: list[float]
    batch: Any


def replay(learner: Learner, data: Batches, directory: str | Path, step: int) -> Replay:
    """Runs a step, counted from 1, of the run in a directory again. `learner` and `data` are its learner and training data.

    The run's own program computes the state before the step from the newest checkpoint before it, or from `learner.init()`. Every
    log of the run on the way is compared with `==`, and the state with that of a checkpoint of the step, if there is one.
    Raises `InvalidArgument` if one differs, and for a step that the run has not reached.

        learner, data = digits.build(config), digits.data(config)["train"]
        step = research.debugging.replay(learner, data, "runs/digits/1", step=37)
        step.layers["sequential/dense"]["output"]["std"], step.row_losses
    """
    directory = Path(directory)
    run, _ = record.read_run(directory)
    history = History(
        learner,
        data,
        directory / "checkpoints",
        learner.init,
        learner.init(),
        Origin(run.id, config_digest({"experiment": run.experiment, "config": run.config})),
        read_decisions(directory),
    )
    return replay_step(history, directory, step)


def replay_step(history: History, directory: Path, step: int, local: Learner | None = None) -> Replay:
    """Does what `replay` does, for a `History`. If its learner is sharded, `local` is that of one device, to look inside."""
    recorded = {
        entry.step: entry.values for entry in run_files.read_metrics(directory, run_files.ignore) if entry.split == "train"
    }
    saved = checkpoint.steps(history.checkpoints)
    last = max([*recorded, *saved, *(each.step for each in history.decisions), *_failures(directory)], default=0)
    if not 1 <= step <= last:
        raise InvalidArgument(f"--step {step}: the run in {directory} has the steps 1 to {last}; choose one of them.")
    log_every = run_files.read_config(directory).options.get("log_every")
    entries: list[LogEntry] = []
    start = last_checkpoint(history, step - 1)
    before = state_after(history, step - 1, entries.append, log_every)
    copy = copier()
    state = copy(before.state)
    digest_before = state_digest(state)
    after, _ = loop.train(
        history.learner,
        history.data,
        steps=step,
        start=step - 1,
        state=before.state,
        log=entries.append,
        log_every=log_every,
    )
    _check_saved(history, step, after)
    compared = _compare(entries, recorded, history.decisions, directory)
    batch, learner = history.data.batch(step - 1), local or history.learner
    if local is not None:
        state, batch = on_one_device(state), jax.device_get(batch)
    recorded_step = instrumented_step(learner, state, batch)
    return Replay(
        step,
        start,
        compared,
        digest_before,
        state_digest(after),
        next((each for each in history.decisions if each.step == step), None),
        {name: np.asarray(value, float).tolist() for name, value in recorded_step.logs.items()},
        _layer_statistics(learner, recorded_step.calls),
        recorded_step.calls,
        blame_of(learner, state, batch, recorded_step),
        row_losses(learner, state, batch),
        batch,
    )


def on_one_device(state: PyTree) -> PyTree:
    """Returns a state on the first device of this process.

    >>> on_one_device([np.ones(2)])
    [Array([1., 1.], dtype=float32)]
    """
    return jax.device_put(state, jax.local_devices()[0])


def state_digest(state: PyTree) -> str:
    """Returns the SHA-256 digest of the leaves of a state: their shapes, dtypes and bits.

    >>> state_digest([jnp.zeros(2)]) == state_digest([np.zeros(2, np.float32)]), state_digest([0.0]) == state_digest([-0.0])
    (True, False)
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def row_losses(learner: Learner, state: Any, batch: Any) -> list[float]:
    """Returns the loss of each row alone, by the learner's `evaluate`, on a batch of copies of the row.

    Several losses are added. Returns nothing for a batch of more than 1,024 rows, or without a loss.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> learner = research.supervised(model, loss="mse")
    >>> row_losses(learner, learner.init(), research.Batch(np.ones((2, 1), np.float32), np.array([[1.0], [3.0]], np.float32)))
    [1.0, 9.0]
    """
    count = num_rows(batch)

    @jax.jit
    def loss(state: Any, batch: Any, row: Any) -> Any:
        def copies(leaf: Any) -> Any:
            alike = np.ndim(leaf) > 0 and leaf.shape[0] == count
            return jnp.broadcast_to(jnp.take(leaf, row, axis=0), leaf.shape) if alike else leaf

        _, logs = learner.evaluate(learner.reset(state), jax.tree.map(copies, batch))
        return [value for name, value in logs.items() if is_loss(name) and not jnp.ndim(value)]

    losses = [loss(state, batch, np.int32(row)) for row in range(count)] if count <= MAX_ROWS else []
    return [float(sum(map(float, each))) for each in losses if each]


def statistics(arrays: list[np.ndarray]) -> dict[str, Any]:
    """Returns mean, standard deviation, minimum, maximum, norm, share of zeros and number of non-finite elements of arrays.

    The first four and the norm are those of the finite elements, NaN if there is none.

    >>> statistics([np.array([0.0, 3.0, 4.0, np.inf], np.float32)])["norm"]
    5.0
    """
    values = np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays]) if arrays else np.zeros(0)
    finite = values[np.isfinite(values)]
    some = finite if finite.size else np.array([math.nan])
    return {
        "shape": list(arrays[0].shape) if arrays else [],
        "mean": float(some.mean()),
        "std": float(some.std()),
        "min": float(some.min()),
        "max": float(some.max()),
        "norm": float(np.linalg.norm(some)),
        "zeros": float(np.mean(values == 0)) if values.size else math.nan,
        "nonfinite": int(values.size - finite.size),
    }


def _layer_statistics(learner: Learner, calls: list[Call]) -> dict[str, dict[str, Any]]:
    return {
        layer_name(learner, call): {
            "output": statistics(call.outputs),
            "gradient": statistics(call.output_gradients) if call.output_gradients else None,
        }
        for call in calls
    }


def _failures(directory: Path) -> list[int]:
    return [int(path.name) for path in (directory / "failures").glob("[0-9]*")]


def _check_saved(history: History, step: int, after: Any) -> None:
    """Raises `InvalidArgument` unless the state is that of the checkpoint of the step, if the run saved one there."""
    path = history.checkpoints / f"{step:09d}"
    if any(each.step == step for each in history.decisions) or verify(path, history.origin) is not None:
        return
    saved = checkpoint.restore(path, after, history.learner.names, history.origin)
    if state_digest(saved.state) != state_digest(after):
        raise InvalidArgument(f"step {step}: the state differs from that of {path}; {_ADVICE}")


def _compare(
    entries: list[LogEntry], recorded: dict[int, dict[str, float]], decisions: tuple[Decision, ...], directory: Path
) -> list[int]:
    """Returns the steps whose logs were compared. Raises `InvalidArgument` for the first that differs."""
    replaced = {step for each in decisions for step in range(each.restored + 1, each.step + 1)}
    compared = []
    for entry in entries:
        values = recorded.get(entry.step, {})
        if entry.step in replaced or not values:
            continue
        for name, value in entry.values.items():
            before = values.get(name, value)  # "results" of an experiment are in the summary alone
            if value != before and not (math.isnan(before) and not math.isfinite(value)):
                raise InvalidArgument(
                    f"step {entry.step}: {name} is {value!r}, {directory / 'metrics.jsonl'} has {before!r}; {_ADVICE}"
                )
        compared.append(entry.step)
    return compared


_ADVICE = "the run can't be repeated here: its code, package versions, data or devices were others, see its versions.json."

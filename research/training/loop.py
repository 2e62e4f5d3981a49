"""The fold over batches: train, evaluate and predict with any learner."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from research.compiled import Training, evaluation, kept, prediction, sparing, training
from research.data import Batches
from research.feed import IN_FLIGHT, Ahead, Pace, Piece, brought, kind, numbered, pieces, stretches
from research.processes import lowest, whole
from research.state import Refused
from research.step import Learner

# Batches of an evaluation from one wait for the device to the next. Without any, batches would pile up on the device, and of
# several devices on a CPU some would never get a thread, which ends in all waiting for each other.
AWAITED = 8

Hook = Callable[[int, Any, dict[str, Any]], Any]  # (steps done, state, logs) -> state or None


class Entry(NamedTuple):
    """What is known after so many steps, of one split, as plain numbers."""

    step: int
    epoch: int
    split: str
    values: dict[str, float]


class Stopped(Exception):
    """Somebody asked to stop: what to go on from."""

    def __init__(self, step: int = 0, state: Any = None, logs: dict[str, Any] | None = None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.state, self.logs = step, state, logs


def train(
    learner: Learner,
    data: Batches,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    state: Any = None,
    start: int = 0,
    log_every: int | None = None,
    log: Callable[[Entry], None] | None = None,
    evaluations: Mapping[str, Batches] | None = None,
    hooks: Sequence[tuple[int, Hook]] = (),
    logs: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, float], None] = lambda step, waited: None,
) -> tuple[Any, dict[str, float]]:
    """Folds the learner's step over `steps` batches, or over `epochs`. Returns the state and the last values of every split.

    Metrics are reset at the start of each epoch; at its end, every data set of `evaluations` is evaluated. `log` receives an
    `Entry` after the first step, every `log_every` steps and at the end of an epoch, always once the following steps were
    dispatched: the device never waits for it. A hook `(every, hook)` is called after each `every`-th step and the last, before
    the next is dispatched; what it returns (if not None) is the state from there on; the state it sees is gone after that.

    Between two hooks as many steps are dispatched at once as take about a tenth of a second, which changes no bit of the result.
    After each dispatch `progress` is told how many steps are under way or done, and how many seconds were spent waiting for
    batches, and `stop` is asked; where it says so, `Stopped` is raised with the state and the logs to go on from.

    `state` goes on from somewhere else (by default `learner.init()`), `start` is the number of steps it has behind it; `logs`,
    where given, are those of step `start`, and what is due there is logged and evaluated again. The state is donated: use the
    one that is returned. Raises `Refused` where a batch does not fit the learner, before anything is run.

    >>> import jax.numpy as jnp, keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    >>> state, logs = train(learner, research.arrays(x, 2 * x), epochs=600)
    >>> logs["loss"] < 1e-3, round(float(state.trainable[0][0, 0]), 1)
    (True, 2.0)
    """
    total = _total(steps, epochs, data)
    state = learner.init() if state is None else state
    trained = training(learner, data, state)
    evaluators = {split: evaluator(learner, held, state, stop) for split, held in (evaluations or {}).items()}
    last: dict[str, float] = {}
    pending: list[tuple[int, str, dict[str, Any], int | None]] = []

    def read() -> None:
        for step, split, logs, slot in pending:
            values = _numbers(logs, slot)
            last.update({name if split == "train" else f"{split}_{name}": value for name, value in values.items()})
            if log is not None:
                log(Entry(step, (step - 1) // data.steps_per_epoch, split, values))
        pending.clear()

    def ends(step: int) -> bool:
        return step % data.steps_per_epoch == 0 or step == total

    def note(first: int, done: int, state: Any, logs: PyTree, each: PyTree = None) -> None:
        """Puts down what is due after steps `first` to `done`, to be read later: the logs of `done`, and those of each."""
        due = set() if log_every is None else set(range(first + -first % log_every, done + 1, log_every))
        due |= {1} if first == 1 and log is not None else set()
        due |= {done} if ends(done) else set()
        for step in sorted(due):
            pending.append((step, "train", logs, None) if step == done else (step, "train", each, step - first))
        if ends(done):
            pending.extend((done, split, evaluate(state), None) for split, evaluate in evaluators.items())
        for value in [value for _, _, logs, _ in pending for value in logs.values() if isinstance(value, jax.Array)]:
            value.copy_to_host_async()

    done, pace = start, Pace(lowest(1))
    plan = stretches(start, total, [data.steps_per_epoch, *(every for every, _ in hooks)], pace, trained.capacity)
    try:
        if logs is not None and start:
            note(start, start, state, logs)
        with _fed(trained, data, plan) as (run, feed):
            for piece in feed:
                with jax.profiler.StepTraceAnnotation("train", step_num=piece.start):
                    state, logs, each = run(state, piece)
                read()  # the logs of earlier steps, now that these are on their way
                done = piece.start + piece.steps
                for every, hook in hooks:
                    if done % every == 0 or done == total:
                        changed = hook(done, state, logs)
                        state = state if changed is None else changed
                note(piece.start + 1, done, state, logs, each)
                progress(done, feed.waited)
                if stop() and done < total:
                    raise Stopped
                pace.dispatched(logs, piece.steps)
    except Stopped:
        pending[:] = [each for each in pending if each[0] < done]  # going on logs the others
        read()
        raise Stopped(done, state, logs) from None
    read()
    return state, last


def evaluate(learner: Learner, data: Batches, state: Any, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """The logs of one pass over `data`, from empty metrics. The state is neither changed nor donated.

    `stop` is asked between batches; where it says so, `Stopped` is raised.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> learner = research.supervised(model, loss="mse", metrics=["mae"])
    >>> evaluate(learner, research.arrays(np.ones((5, 1)), np.full((5, 1), 3.0), batch_size=2), learner.init())
    {'loss': 9.0, 'mae': 3.0}
    """
    return _numbers(evaluator(learner, data, state, stop)(state))


def predict(learner: Learner, data: Batches, state: Any) -> PyTree:
    """The learner's outputs for every example of `data`, in the order of its batches, as NumPy arrays.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> learner = research.supervised(model, loss="mse")
    >>> predict(learner, research.arrays(np.arange(3.0)[:, None], shuffle=False, batch_size=2), learner.init()).tolist()
    [[0.0], [1.0], [2.0]]
    """
    program = prediction(learner)
    waiting: deque[PyTree] = deque()
    outputs = []
    with _brought(data) as batches:
        for batch in batches:
            waiting.append(whole(program(state, batch)))
            if len(waiting) > IN_FLIGHT:
                outputs.append(jax.device_get(waiting.popleft()))
    outputs += jax.device_get(list(waiting))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def evaluator(
    learner: Learner, data: Batches, state: Any, stop: Callable[[], bool] = lambda: False
) -> Callable[[Any], dict[str, Any]]:
    """A pass over `data` with the learner's `evaluate`, compiled: state -> logs on the device.

    Neither changes nor donates the state. Raises `Refused` where a batch does not fit the learner, and `Stopped` where `stop`,
    asked between batches, says so.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> learner = research.supervised(model, loss="mse")
    >>> state = learner.init()
    >>> run = evaluator(learner, research.arrays(np.ones((4, 1)), np.ones((4, 1)), batch_size=2), state)
    >>> float(run(state)["loss"])
    1.0
    """
    resident = data.resident
    source = None if resident is None else _placed(resident.source)
    batch = data.batch if resident is None else lambda step: resident.rows(step, 1)
    programs = {kind(first): evaluation(learner, state, source, first, data) for first in [batch(0)]}
    reset = sparing(learner.reset, state)

    def run(state: Any) -> dict[str, Any]:
        logs: dict[str, Any] = {}
        before: dict[str, Any] = {}
        state = reset(state)
        with _brought(data) if resident is None else nullcontext(map(batch, range(data.steps_per_epoch))) as batches:
            for step, each in enumerate(batches):
                shape = kind(each)
                if shape not in programs:  # a shorter last batch
                    programs[shape] = evaluation(learner, state, source, each, data)
                state, logs = programs[shape](state, source, each)
                if step % AWAITED == 0:
                    jax.block_until_ready(before)
                    before = logs
                if stop() and step + 1 < data.steps_per_epoch:
                    raise Stopped
        return logs

    return run


class _Kept(Iterator[Piece]):
    """Pieces of data that is on the device: nobody waits for them."""

    waited = 0.0

    def __init__(self, items: Iterator[Piece]) -> None:
        self.items = items

    def __next__(self) -> Piece:
        return next(self.items)


@contextmanager
def _fed(trained: Training, data: Batches, plan: Iterator[tuple[int, int]]) -> Iterator[tuple[Any, Any]]:
    """A function that runs a piece's steps, (state, piece) -> (state, last logs, each step's logs), and the pieces of a plan."""
    program, capacity = trained

    def run(source: PyTree, state: Any, piece: Piece) -> Any:
        anew = np.bool_(piece.start % data.steps_per_epoch == 0)
        return program(state, source, piece.batches, piece.slots, np.int32(piece.steps), anew)

    if data.resident is not None:
        source, size = _placed(data.resident.source), jax.tree.leaves(data.shapes)[0].shape[0]
        found = numbered(plan, data.resident.rows, size, capacity)
        yield functools.partial(run, source), _Kept(found)
        return
    put = (piece._replace(batches=brought(piece.batches)) for piece in pieces(plan, data.batch, data.shapes, capacity))
    with Ahead(put) as ahead:
        yield functools.partial(run, None), ahead


def _brought(data: Batches) -> Ahead[Any]:
    """The batches of one pass, on the device, the next on their way while one is worked on."""
    return Ahead(brought(data.batch(step)) for step in range(data.steps_per_epoch))


def _total(steps: int | None, epochs: int | None, data: Batches) -> int:
    wanted = [] if steps is None else [steps]
    wanted += [] if epochs is None else [epochs * data.steps_per_epoch]
    if not wanted or min(wanted) < 0:
        raise Refused(f"train: steps is {steps} and epochs is {epochs}; expected at least one of them, as a number from 0 on.")
    return min(wanted)


def _numbers(logs: dict[str, Any], slot: int | None = None) -> dict[str, float]:
    """Logs, or those in one slot of many, as plain numbers; a vector becomes a number for each of its entries."""
    numbers: dict[str, float] = {}
    for name, log in logs.items():
        value = np.asarray(log) if slot is None else np.asarray(log)[slot]
        if np.ndim(value) == 0:
            numbers[name] = float(value)
        else:
            numbers.update({f"{name}_{i}": float(each) for i, each in enumerate(np.ravel(value))})
    return numbers


_placed = kept(lambda source: brought(source()))  # what is kept on the device is brought there once

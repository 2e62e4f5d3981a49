"""The training loop: train, evaluate and predict with any learner."""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.data.batches import Batches
from research.data.prefetch import (
    IN_FLIGHT,
    Chunk,
    DispatchPacer,
    Prefetcher,
    batch_chunks,
    chunk_bounds,
    row_chunks,
    signature,
    to_device,
)
from research.distributed.processes import lagged_min, to_host
from research.training.arguments import (
    check_callables,
    check_data,
    check_evaluations,
    check_learner,
    check_schedule,
    check_state,
)
from research.training.bad_steps import BadStep, Watch, Watched
from research.training.errors import naming_shared_leaves
from research.training.labels import checked_labels
from research.training.logs import LogEntry, PendingLogs, split_before_hooks, split_before_observed, to_python
from research.training.programs import (
    TrainProgram,
    evaluate_program,
    jit_without_copies,
    predict_program,
    train_program,
    weak_cache,
)
from research.transforms.observe import Observe

# An evaluation waits for the device after so many batches. Without that, batches would pile up in device memory, and simulated
# CPU devices would deadlock: some would never get a thread, and the others would wait for them in a collective.
MAX_PENDING_BATCHES = 8

Hook = Callable[[int, Any, dict[str, Any]], Any]  # (steps done, state, logs) -> state or None
Every = int | Callable[[int], bool]  # a period in steps, or whether a hook is due after so many steps


class Stopped(Exception):
    """Training was stopped on request. Holds the step, state and logs to resume from, where there are any.

    >>> str(Stopped(7))
    'stopped after step 7'
    """

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
    log: Callable[[LogEntry], None] | None = None,
    evaluations: Mapping[str, Batches] | None = None,
    evaluate_every: int | None = None,
    hooks: Sequence[tuple[Every, Hook]] = (),
    logs: dict[str, Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, float], None] = lambda step, waited: None,
    watch: Watch | None = None,
    observe: tuple[int, Observe] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Trains a learner for a number of steps or epochs, whichever ends first. Returns the state and the last logs of all splits.

    Metrics are reset at the start of each epoch. At its end, and every `evaluate_every` steps, every data set of `evaluations`
    (split -> data) is evaluated. `log` is called with a `LogEntry` after the first step, every `log_every` steps and at the end
    of an epoch, always after the next steps were dispatched, so that the device never waits for it. A hook `(every, hook)` is
    called after every `every`-th step and the last one, before the next dispatch and after the logs of all earlier steps: a
    checkpoint that it writes has them behind it. If it returns a state, training continues with that. The state that it receives
    is donated afterwards; copy what has to outlive the call. `every` may also be a function: it is called with the number of
    steps done after each dispatch, and returns whether the hook is due. With several processes it must return the same in each,
    see `processes.any_process`.

    Between two hooks, one dispatch runs as many steps as take about 0.1 seconds, with bitwise equal results. After each dispatch
    `progress` is called with the number of dispatched steps and the seconds spent waiting for batches, then `stop`. If `stop`
    returns True, `Stopped` is raised with the state and the logs to resume from.

    `watch(first, steps, logs, all_logs)` is called for each dispatch, in order, once the device has computed it, and before logs
    of it are reported or a hook runs on its state: with its first step, counted from 1, its number of steps, the logs of its last
    step, and those of all its steps, stacked, None if it is a single one. It, or a hook, may raise `BadStep`: logs of earlier
    steps are then reported, those of that step and later ones are not, and the error is passed on.

    `observe`, a pair `(every, function)`, adds to the logs of each `every`-th step, if they are due, what the function computes
    from its gradients, updates, weights and learning rate: `(100, research.norms)`, see `transforms.observe`. State and other
    logs keep their bits. It costs about one step each time, and compiling one.

    To resume, pass the `state` (default: `learner.init()`), its number of steps as `start`, and the `logs` of that step to log
    and evaluate again what is due there. `state` is donated: use the returned one. Raises `InvalidArgument` before the first
    step if a batch does not fit the learner or the learner's code fails (see `programs.checked`), and for labels that the
    learner has no class for: before the first step in data on the device, otherwise with the batch (see `labels.checked_labels`).

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    >>> state, logs = train(learner, research.from_arrays(x, 2 * x), epochs=600)
    >>> logs["loss"] < 1e-3, round(float(state.trainable[0][0, 0]), 1)
    (True, 2.0)
    """
    check_learner("train", learner)
    check_data("train", data)
    check_schedule(steps, epochs, start, log_every, hooks, observe, evaluate_every)
    check_evaluations(evaluations or {})
    check_callables("train", log=log, stop=stop, progress=progress, watch=watch)
    total = _total_steps(steps, epochs, data)
    state = learner.init() if state is None else state
    check_state("train", learner, state)
    program = train_program(learner, data, state, None if observe is None else observe[1])
    data = checked_labels(learner, data, "train", _resident_source)
    evaluators = {split: evaluator(learner, batches, state, stop, split) for split, batches in (evaluations or {}).items()}
    observe_every = None if observe is None else observe[0]
    pending = PendingLogs(data.steps_per_epoch, total, log_every, log, evaluators, observe_every, evaluate_every)
    done, pacer = start, DispatchPacer(lagged_min(1))
    watched = Watched(watch)
    periods = [every for every, _ in hooks if not callable(every)]
    stops = [data.steps_per_epoch, *periods, *filter(None, (observe_every, evaluate_every if evaluations else None))]
    bounds = chunk_bounds(start, total, stops, pacer, program.capacity)
    bounds = split_before_observed(split_before_hooks(bounds, periods, total, pending.due), pending.observed)
    try:
        if logs is not None and start:
            pending.schedule(start, start, logs)
            pending.evaluate(start, state)
        with _feed(program, data, bounds, pending.observed) as (run, chunks):
            for chunk in chunks:
                annotation = jax.profiler.StepTraceAnnotation("train", step_num=chunk.start)
                with annotation, naming_shared_leaves(state, learner.names):
                    state, logs, all_logs = run(state, chunk)
                watched.add(chunk.start + 1, chunk.steps, logs, all_logs)
                if pending.entries:
                    watched.check(later=1)
                pending.flush()  # the logs of earlier steps, now that the device is busy again
                done = chunk.start + chunk.steps
                pending.schedule(chunk.start + 1, done, logs, all_logs)
                for every, hook in hooks:
                    due = every(done) if callable(every) else done % every == 0
                    if due or done == total:
                        watched.check(later=0)
                        pending.flush(before=done)
                        new_state = hook(done, state, logs)
                        state = state if new_state is None else new_state
                pending.evaluate(done, state)
                progress(done, chunks.waited)
                if stop() and done < total:
                    watched.check(later=0)
                    raise Stopped
                pacer.dispatched(logs, chunk.steps)
                watched.check(later=IN_FLIGHT)
            watched.check(later=0)
    except BadStep as bad:
        pending.discard(bad.step)
        pending.flush()
        raise
    except Stopped:
        pending.discard(done)  # the resumed training logs that step
        pending.flush()
        raise Stopped(done, state, logs) from None
    pending.flush()
    return state, pending.last


def evaluate(learner: Learner, data: Batches, state: Any, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Returns the logs of one pass over `data`, starting from reset metrics. The state is neither changed nor donated.

    `stop` is called between batches; if it returns True, `Stopped` is raised.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> learner = research.supervised(model, loss="mse", metrics=["mae"])
    >>> evaluate(learner, research.from_arrays(np.ones((5, 1)), np.full((5, 1), 3.0), batch_size=2), learner.init())
    {'loss': 9.0, 'mae': 3.0}
    """
    return to_python(evaluator(learner, data, state, stop)(state))


def predict(learner: Learner, data: Batches, state: Any) -> PyTree:
    """Returns the learner's outputs for every example of `data`, in the order of its batches, as NumPy arrays.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> learner = research.supervised(model, loss="mse")
    >>> predict(learner, research.from_arrays(np.arange(3.0)[:, None], shuffle=False, batch_size=2), learner.init()).tolist()
    [[0.0], [1.0], [2.0]]
    """
    check_learner("predict", learner)
    check_data("predict", data)
    check_state("predict", learner, state)
    program = predict_program(learner)
    pending: deque[PyTree] = deque()
    outputs = []
    with _prefetched(data) as batches:
        for batch in batches:
            pending.append(to_host(program(state, batch)))
            if len(pending) > IN_FLIGHT:
                outputs.append(jax.device_get(pending.popleft()))
    outputs += jax.device_get(list(pending))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def evaluator(
    learner: Learner, data: Batches, state: Any, stop: Callable[[], bool] = lambda: False, split: str = "evaluate"
) -> Callable[[Any], dict[str, Any]]:
    """Returns a compiled pass over `data` with the learner's `evaluate`: state -> logs on the device.

    The pass neither changes nor donates the state. It raises `Stopped` if `stop`, called between batches, returns True. Raises
    `InvalidArgument` if a batch does not fit the learner or the learner's code fails, as `train` does. `split` stands for the
    data in messages about its labels.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> learner = research.supervised(model, loss="mse")
    >>> state = learner.init()
    >>> run = evaluator(learner, research.from_arrays(np.ones((4, 1)), np.ones((4, 1)), batch_size=2), state)
    >>> float(run(state)["loss"])
    1.0
    """
    check_learner("evaluate", learner)
    check_data("evaluate", data)
    check_callables("evaluate", stop=stop)
    check_state("evaluate", learner, state)
    data = checked_labels(learner, data, split, _resident_source)
    resident = data.resident
    source = None if resident is None else _resident_source(resident.source)
    batch = data.batch if resident is None else lambda step: resident.rows(step, 1)
    first = batch(0)
    programs = {signature(first): evaluate_program(learner, state, source, first, data)}
    reset = jit_without_copies(learner.reset, state)

    def run(state: Any) -> dict[str, Any]:
        logs: dict[str, Any] = {}
        previous: dict[str, Any] = {}
        state = reset(state)
        with _prefetched(data) if resident is None else nullcontext(map(batch, range(data.steps_per_epoch))) as batches:
            for step, inputs in enumerate(batches):
                shapes = signature(inputs)
                if shapes not in programs:  # a shorter last batch
                    programs[shapes] = evaluate_program(learner, state, source, inputs, data)
                state, logs = programs[shapes](state, source, inputs)
                if step % MAX_PENDING_BATCHES == 0:
                    jax.block_until_ready(previous)
                    previous = logs
                if stop() and step + 1 < data.steps_per_epoch:
                    raise Stopped
        return logs

    return run


class _ResidentChunks(Iterator[Chunk]):
    """Chunks of data that is on the device: nothing has to be waited for."""

    waited = 0.0

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self.chunks = chunks

    def __next__(self) -> Chunk:
        return next(self.chunks)


@contextmanager
def _feed(
    program: TrainProgram, data: Batches, bounds: Iterator[tuple[int, int]], observed: Callable[[int], bool]
) -> Iterator[tuple[Any, Any]]:
    """Yields the chunks of these bounds and what runs one: (state, chunk) -> (state, last logs, logs of each step).

    What is observed of steps for which `observed` returns True, each a chunk of its own, is added to their logs.
    """

    def run(source: PyTree, state: Any, chunk: Chunk) -> Any:
        scalars = {}
        if program.observe is not None and observed(chunk.start + 1):
            scalars = program.observe(state, source, chunk.batches, chunk.positions)
        at_epoch_start = np.bool_(chunk.start % data.steps_per_epoch == 0)
        args = (chunk.batches, chunk.positions, np.int32(chunk.steps), at_epoch_start)
        state, logs, all_logs = program.program(state, source, *args)
        return state, dict(sorted({**scalars, **logs}.items())), all_logs  # sorted, as a program returns them

    if data.resident is not None:
        source, batch_size = _resident_source(data.resident.source), jax.tree.leaves(data.shapes)[0].shape[0]
        yield (
            functools.partial(run, source),
            _ResidentChunks(row_chunks(bounds, data.resident.rows, batch_size, program.capacity)),
        )
        return
    chunks = batch_chunks(bounds, data.batch, data.shapes, program.capacity)
    with Prefetcher(chunk._replace(batches=to_device(chunk.batches)) for chunk in chunks) as prefetcher:
        yield functools.partial(run, None), prefetcher


def _prefetched(data: Batches) -> Prefetcher[Any]:
    """Returns an iterator over the batches of one pass, on the device, prefetched by a thread."""
    return Prefetcher(to_device(data.batch(step)) for step in range(data.steps_per_epoch))


def _total_steps(steps: int | None, epochs: int | None, data: Batches) -> int:
    limits = [] if steps is None else [steps]
    return min(limits + ([] if epochs is None else [epochs * data.steps_per_epoch]))


_resident_source = weak_cache(lambda source: to_device(source()))  # one copy per data set, however often it is used

"""The fold over batches: train, evaluate and predict with any learner."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend
import numpy as np
from jaxtyping import PyTree

from research.data import Batches, take
from research.state import Refused
from research.step import Learner

T = TypeVar("T")
IN_FLIGHT = 4  # batches that may be waiting for the device when the host brings them

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
) -> tuple[Any, dict[str, float]]:
    """Folds the learner's step over `steps` batches, or over `epochs`. Returns the state and the last values of every split.

    Metrics are reset at the start of each epoch; at its end, every data set of `evaluations` is evaluated. `log` receives an
    `Entry` after the first step, every `log_every` steps and at the end of an epoch, always once the following step was
    dispatched: the device never waits for it. A hook `(every, hook)` is called after each `every`-th step and the last, before
    the next is dispatched; what it returns (if not None) is the state from there on; the state it sees is gone after that.

    `state` goes on from somewhere else (by default `learner.init()`), `start` is the number of steps it has behind it; `logs`,
    where given, are those of step `start`, and what is due there is logged and evaluated again. The state is donated: use the
    one that is returned. `stop` is asked between dispatches; where it says so, `Stopped` is raised with the state and the logs
    to go on from. Raises `Refused` where a batch does not fit the learner, before anything is run.

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
    run = trainer(learner, data, state)
    evaluators = {split: evaluator(learner, held, state, stop) for split, held in (evaluations or {}).items()}
    reset = sparing(learner.reset, state)
    last: dict[str, float] = {}
    pending: list[tuple[int, int, str, PyTree]] = []

    def read() -> None:
        for step, epoch, split, logs in pending:
            values = _numbers(logs)
            last.update({name if split == "train" else f"{split}_{name}": value for name, value in values.items()})
            if log is not None:
                log(Entry(step, epoch, split, values))
        pending.clear()

    def note(done: int, state: Any, logs: PyTree) -> None:
        """Puts down what is due after so many steps, to be read later."""
        epoch = (done - 1) // data.steps_per_epoch
        ends = done % data.steps_per_epoch == 0 or done == total
        first = done == 1 and log is not None
        if ends or first or (log_every is not None and done % log_every == 0):
            pending.append((done, epoch, "train", logs))
        if ends:
            pending.extend((done, epoch, split, evaluate(state)) for split, evaluate in evaluators.items())

    done = start
    try:
        if logs is not None and start:
            note(start, state, logs)
        for step in range(start, total):
            if step % data.steps_per_epoch == 0:
                state = reset(state)
            state, logs = run(state, step)
            read()  # the logs of an earlier step, now that this one is on its way
            done = step + 1
            for every, hook in hooks:
                if done % every == 0 or done == total:
                    changed = hook(done, state, logs)
                    state = state if changed is None else changed
            note(done, state, logs)
            if stop() and done < total:
                raise Stopped
    except Stopped:
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
    program = jax.jit(learner.predict)
    outputs = [program(state, data.batch(step)) for step in range(data.steps_per_epoch)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(outputs))


def trainer(learner: Learner, data: Batches, state: Any) -> Callable[[Any, int], tuple[Any, dict[str, Any]]]:
    """The learner's step, compiled, with its batches brought to it: (state, step) -> (state, logs). The state is donated.

    Small data is put on the device here, once, and each batch gathered inside the program; of larger data the next batch is
    on its way while the device works on one. Raises `Refused` where a batch does not fit the learner.

    >>> import keras, numpy as np, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse")
    >>> data, state = research.arrays(np.ones((4, 1)), np.ones((4, 1)), batch_size=2), learner.init()
    >>> run = trainer(learner, data, state)
    >>> for step in range(4):
    ...     state, logs = run(state, step)
    """

    def train_step(state: Any, source: PyTree, batch: Any) -> tuple[Any, dict[str, Any]]:
        return learner.train(state, batch if source is None else take(source, batch))

    program = jax.jit(train_step, donate_argnums=0)
    if data.resident is not None:
        rows, source = data.resident.rows, jax.device_put(data.resident.source())
        _fits(program.trace, data, state, source, rows(0))
        return lambda state, step: program(state, source, rows(step))
    batches = _ahead(data)
    _fits(program.trace, data, state, None, data.batch(0))
    in_flight: list[PyTree] = []

    def run(state: Any, step: int) -> tuple[Any, dict[str, Any]]:
        state, logs = program(state, None, batches(step))
        in_flight.append(logs)
        if len(in_flight) > IN_FLIGHT:  # without a bound the host would fill memory with batches
            jax.block_until_ready(in_flight.pop(0))
        return state, logs

    return run


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
    source = None if resident is None else jax.device_put(resident.source())
    batches = data.batch if resident is None else resident.rows

    def evaluate_step(state: Any, source: PyTree, batch: Any) -> tuple[Any, dict[str, Any]]:
        return learner.evaluate(state, batch if source is None else take(source, batch))

    def program(batch: Any) -> Callable[..., tuple[Any, dict[str, Any]]]:
        return _fits(functools.partial(sparing, evaluate_step), data, state, source, batch)

    def size(batch: Any) -> tuple[Any, ...]:
        return tuple(leaf.shape for leaf in jax.tree.leaves(batch))

    reset = sparing(learner.reset, state)
    programs = {size(batches(0)): program(batches(0))}

    def run(state: Any) -> dict[str, Any]:
        logs: dict[str, Any] = {}
        state = reset(state)
        for step in range(data.steps_per_epoch):
            batch = batches(step)
            if size(batch) not in programs:  # a shorter last batch
                programs[size(batch)] = program(batch)
            state, logs = programs[size(batch)](state, source, batch)
            if stop() and step + 1 < data.steps_per_epoch:
                raise Stopped
        return logs

    return run


def sparing(function: Callable[..., T], *args: Any) -> Callable[..., T]:
    """Compiles a function for arguments like `args` so that leaves it hands through are not copied.

    A result that is one of the arguments comes back as that very array: evaluating a model returns its weights, and copying
    them would cost more than many a batch.

    >>> import jax.numpy as jnp
    >>> weights, count = jnp.ones(1000), jnp.zeros(())
    >>> program = sparing(lambda weights, count: (weights, count + 1), weights, count)
    >>> same, moved = program(weights, count)
    >>> same is weights, float(moved)
    (True, 1.0)
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    positions = {variable: i for i, variable in enumerate(closed.jaxpr.invars)}
    handed = [positions.get(v) if isinstance(v, jax.extend.core.Var) else None for v in closed.jaxpr.outvars]
    structure = jax.tree.structure(shapes)
    flat = jax.extend.core.jaxpr_as_fun(closed)

    def changing(*leaves: Any) -> list[Any]:
        return [out for out, i in zip(flat(*leaves), handed, strict=True) if i is None]

    changing.__name__ = function.__name__
    program = jax.jit(changing)

    def call(*args: Any) -> T:
        leaves = jax.tree.leaves(args)
        moved = iter(program(*leaves))
        result: T = jax.tree.unflatten(structure, [next(moved) if i is None else leaves[i] for i in handed])
        return result

    return call


def _ahead(data: Batches) -> Callable[[int], Any]:
    """Each step's batch on the device, the next one already being brought there when a step is asked for."""
    held: dict[int, Any] = {}

    def batch(step: int) -> Any:
        found = held.pop(step) if step in held else jax.device_put(data.batch(step))
        held.clear()
        held[step + 1] = jax.device_put(data.batch(step + 1))
        return found

    return batch


def _fits(trace: Callable[..., T], data: Batches, *args: Any) -> T:
    """Traces a program before anything is run: what does not fit shows here, as one line."""
    try:
        return trace(*args)
    except Refused:
        raise
    except (TypeError, ValueError) as error:
        batch = jax.tree_util.tree_leaves_with_path(data.shapes)
        shapes = ", ".join(f"{jax.tree_util.keystr(path).strip('.')} {leaf.dtype}{list(leaf.shape)}" for path, leaf in batch)
        raise Refused(f"a batch does not fit the learner ({shapes}): {' '.join(str(error).split())}") from error


def _total(steps: int | None, epochs: int | None, data: Batches) -> int:
    wanted = [] if steps is None else [steps]
    wanted += [] if epochs is None else [epochs * data.steps_per_epoch]
    if not wanted or min(wanted) < 0:
        raise Refused(f"train: steps is {steps} and epochs is {epochs}; expected at least one of them, as a number from 0 on.")
    return min(wanted)


def _numbers(logs: PyTree) -> dict[str, float]:
    """Logs as plain numbers; a vector becomes a number for each of its entries."""
    numbers: dict[str, float] = {}
    for name, value in jax.device_get(logs).items():
        if np.ndim(value) == 0:
            numbers[name] = float(value)
        else:
            numbers.update({f"{name}_{i}": float(each) for i, each in enumerate(np.ravel(value))})
    return numbers

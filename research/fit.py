"""Keras' `fit`, `evaluate`, `predict` and their kin, with our programs inside.

Keras' own methods stay in charge of data, callbacks, validation and messages. What runs a step is replaced: many steps run as one
program wherever nobody looks at single ones, callbacks get logs that are read off the device only when they look, and the model
is whole after Ctrl-C or an exception.
"""

import contextlib
import itertools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import PyTree

from research.transforms import fuse, loops_well

FUSED_STEPS = 64  # at most so many steps in one program,
FUSED_BYTES = 4 << 20  # so many bytes of batches, which are copied together first,
FUSED_SECONDS = 0.03  # and about so much time, for the progress bar and Ctrl-C
IN_FLIGHT = 2  # dispatches that the device may be behind
SHOW_EVERY = 0.05  # seconds between two looks of the progress bar at the logs, as in Keras

_BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
}
# Keras' callbacks that have batch hooks, and do nothing in them where they save by the epoch.
_SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)


def fit(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Any = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: Any = True,
    class_weight: Any = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: Any = 1,
) -> keras.callbacks.History:
    """Trains a compiled model as `model.fit` does: the same arguments, numbers, callbacks and messages. Returns the `History`.

    A model's own `train_step`, `test_step`, `compute_loss` and the like are used as they are. Steps are fused wherever no
    callback has a batch hook. After an exception or Ctrl-C the model has the weights of the last step that was done.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> history = fit(model, np.ones((64, 1)), np.ones((64, 1)), epochs=3, verbose=0)
    >>> len(history.history["loss"]), int(model.optimizer.iterations)
    (3, 6)
    """
    with _programs(model) as programs:
        return model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=programs.watched(callbacks, verbose, validation_steps),
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )


def evaluate(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    verbose: Any = "auto",
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Any = None,
    return_dict: bool = False,
    **kwargs: Any,
) -> Any:
    """The loss and metrics of a compiled model, as `model.evaluate` gives them.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse", metrics=["mae"])
    >>> evaluate(model, np.ones((5, 1)), np.full((5, 1), 3.0), batch_size=2, verbose=0, return_dict=True)
    {'loss': 9.0, 'mae': 3.0}
    """
    with _programs(model) as programs:
        return model.evaluate(
            x,
            y,
            batch_size=batch_size,
            verbose=verbose,
            sample_weight=sample_weight,
            steps=steps,
            callbacks=programs.watched(callbacks, verbose),
            return_dict=return_dict,
            **kwargs,
        )


def predict(
    model: keras.Model,
    x: Any,
    batch_size: int | None = None,
    verbose: Any = "auto",
    steps: int | None = None,
    callbacks: Any = None,
) -> Any:
    """The outputs of a model for every example, as `model.predict` gives them: NumPy arrays.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict(model, np.arange(3.0)[:, None], verbose=0).tolist()
    [[0.0], [1.0], [2.0]]
    """
    with _programs(model):
        return model.predict(x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks)


def train_on_batch(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    class_weight: Any = None,
    return_dict: bool = False,
) -> Any:
    """One update on one batch, as `model.train_on_batch` does it; returns the batch's loss and metrics.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile("sgd", "mse")
    >>> train_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with _programs(model):
        return model.train_on_batch(x, y, sample_weight=sample_weight, class_weight=class_weight, return_dict=return_dict)


def test_on_batch(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
    """One batch's loss and metrics, as `model.test_on_batch` gives them.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse")
    >>> test_on_batch(model, np.ones((2, 1)), np.ones((2, 1)), return_dict=True)
    {'loss': 1.0}
    """
    with _programs(model):
        return model.test_on_batch(x, y, sample_weight=sample_weight, return_dict=return_dict)


test_on_batch.__test__ = False  # type: ignore[attr-defined]  # or pytest takes it for a test wherever it is imported


def predict_on_batch(model: keras.Model, x: Any) -> Any:
    """One batch's outputs, as `model.predict_on_batch` gives them: NumPy arrays.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> predict_on_batch(model, np.ones((2, 1))).tolist()
    [[1.0], [1.0]]
    """
    with _programs(model):
        return model.predict_on_batch(x)


class _Loop:
    """What a program is told of the loop of Keras that calls it, execution by execution (`steps_per_execution` steps each).

    `fusing`: nobody looks at single executions. `alone`: the first is shown by itself. `left`: executions in the epoch from this
    one on; None where nobody knows. `done`: executions that were run ahead of their call. `shown`: what Keras holds as the logs.
    """

    def __init__(self, fusing: bool, alone: bool) -> None:
        self.fusing, self.alone = fusing, alone
        self.left: int | None = None
        self.first = True
        self.done = 0
        self.logs: Any = {}
        self.shown: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self.capacity = 0
        self.full: Any = None
        self.running: deque[tuple[Any, int]] = deque()
        self.since = 0.0
        self.pace = 1  # steps in the next dispatch

    def begin(self, execution: int, left: int | None) -> None:
        """Another execution is about to be asked for."""
        self.left, self.first = left, execution == 0
        if self.first:
            self.done, self.failure = 0, None

    def ran(self, logs: Any, steps: int) -> None:
        """So many steps were dispatched. Waits for those before the last, and suits the next number to the time they took."""
        self.running.append((logs, steps))
        if len(self.running) > IN_FLIGHT:
            logs, steps = self.running.popleft()
            jax.block_until_ready(logs)
            now = time.perf_counter()
            if self.since:
                self.pace = max(1, min(2 * self.pace, int(FUSED_SECONDS * steps / (now - self.since))))
            self.since = now

    def rest(self) -> None:
        """Time passes in which no step is run."""
        self.running.clear()
        self.since = 0.0


class _Program:
    """What stands in `model.train_function` and its kin: runs the model's step over batches from Keras' iterator.

    To Keras each call is one execution. Where the loop allows it, a call runs several, and the calls for those do nothing.
    """

    def __init__(self, model: keras.Model, name: str) -> None:
        def step(
            state: PyTree, data: Any
        ) -> tuple[PyTree, Any]:  # a new function: JAX would find an older program for a known one
            logs, state = getattr(model, name)(state, data)
            return state, logs

        self.model, self.step = model, step
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.programs: dict[str, Any] = {}
        self.known: set[Any] = set()
        self.fusable: dict[Any, bool] = {}
        self.interrupts = _Interrupts()
        self.loop: _Loop | None = None
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        self.state = state
        self.interrupts.allow()
        watched, self.loop = self.loop, None  # a loop says so before each call: others may use the program in between
        loop = watched or _Loop(fusing=False, alone=False)
        if loop.done:
            loop.done -= 1
        else:
            try:
                batches = self._take(iterator, loop)
                self.state, loop.logs = self._run(state, batches, loop)
            except BaseException:
                _restore(self.model, self.state)
                raise
            loop.done = -(-len(batches) // self.model.steps_per_execution) - 1
        if watched is None:
            return loop.logs, self.state
        # Keras makes floats of what it gets here, which would wait for the device: `_Watch` fills it in after that.
        loop.shown = {}
        return loop.shown, self.state

    def _take(self, iterator: Iterator[Any], loop: _Loop) -> list[Any]:
        """Batches for one dispatch. What the iterator raises after the first waits for its turn."""
        if loop.failure is not None:
            failure, loop.failure = loop.failure, None
            raise failure
        unit = self.model.steps_per_execution
        batches = [next(iterator)]
        if loop.first or not loop.capacity:
            loop.full, loop.capacity = _shapes(batches[0]), self._capacity(batches[0], loop)
        executions = 1
        if loop.fusing and not (loop.alone and loop.first):
            executions = max(1, min(loop.pace, loop.capacity) // unit)
            executions = executions if loop.left is None else min(executions, loop.left)
        try:
            batches.extend(itertools.islice(iterator, executions * unit - 1))
        except BaseException as error:
            loop.failure = error
        return batches

    def _capacity(self, batch: Any, loop: _Loop) -> int:
        """How many steps over such batches one program may run."""
        leaves = jax.tree.leaves(batch)
        arrays = all(isinstance(leaf, np.ndarray | jax.Array) and leaf.dtype.kind in "biufc" for leaf in leaves)
        unit = self.model.steps_per_execution
        if not self.compiled or not arrays or keras.distribution.distribution() is not None:
            return 1
        if unit == 1 and not loop.fusing:
            return 1
        steps = FUSED_STEPS if loop.left is None else min(FUSED_STEPS, loop.left * unit)
        return max(1, min(steps, FUSED_BYTES // max(1, sum(leaf.nbytes for leaf in leaves))))

    def _run(self, state: PyTree, batches: list[Any], loop: _Loop) -> tuple[PyTree, Any]:
        """The state after a step over each batch, and the last logs."""
        logs: Any = {}
        for shapes, alike in itertools.groupby(batches, _shapes):
            group = list(alike)
            while group:
                piece, group = group[: loop.capacity], group[loop.capacity :]
                fused = loop.capacity > 1 and (len(piece) > 1 or shapes == loop.full)
                state, logs = self._fused(state, piece, loop.capacity) if fused else self._single(state, piece)
        loop.ran(logs, len(batches))
        return state, logs

    def _single(self, state: PyTree, batches: list[Any]) -> tuple[PyTree, Any]:
        logs: Any = {}
        for batch in batches:
            if not self.compiled:
                state, logs = self.step(state, batch)
                continue
            if "single" not in self.programs:
                shardings = None
                if keras.distribution.distribution() is not None:
                    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
                self.programs["single"] = jax.jit(self.step, donate_argnums=0, out_shardings=shardings)
            state, logs = self._call("single", (state, batch))
        return state, logs

    def _fused(self, state: PyTree, batches: list[Any], capacity: int) -> tuple[PyTree, Any]:
        """All steps as one program, or one by one where a loop would be slower or can't be."""
        kind = (_shapes(batches[0]), capacity)
        if self.fusable.get(kind) is False:
            return self._single(state, batches)
        arguments = (state, _stacked(batches, capacity), np.int32(len(batches)))
        if kind not in self.fusable:
            program = self.programs.setdefault("fused", jax.jit(fuse(self.step), donate_argnums=0))
            try:
                self.fusable[kind] = loops_well(program.trace(*arguments))
            except TypeError:  # a step that changes its state's types has no loop
                self.fusable[kind] = False
            return self._fused(state, batches, capacity)
        return self._call("fused", arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[PyTree, Any]:
        """Runs a program. From here until Keras has stored the state, Ctrl-C has to wait: the old one is donated."""
        kind = (name, _shapes(arguments[1:]))
        if kind not in self.known:
            self.programs[name].lower(*arguments).compile()  # may take long, and may be interrupted
            self.known.add(kind)
        self.interrupts.defer()
        state, logs = self.programs[name](*arguments)
        self.state = state
        return state, logs


class _Prediction:
    """What stands in `model.predict_function`: as Keras' own, but for the weights, which are not donated."""

    def __init__(self, model: keras.Model) -> None:
        def step(state: PyTree, data: Any) -> tuple[PyTree, PyTree]:
            return model.predict_step(state, data)

        self.model = model
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.step = jax.jit(step) if self.compiled else step
        self.interrupts = _Interrupts()
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        self.state = state
        weights, other = state
        outputs = []
        for data in itertools.chain([next(iterator)], itertools.islice(iterator, self.model.steps_per_execution - 1)):
            output, other = self.step((weights, other), data)
            outputs.append(output)
        if len(outputs) == 1:
            return outputs[0], (weights, other)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), (weights, other)


class _Watch(keras.callbacks.Callback):
    """Stands before a user's callbacks: tells the programs where Keras' loops are, and hands on what Keras calls.

    Batch hooks reach those that have them, with logs that are read when looked at.
    """

    def __init__(self, callbacks: Sequence[Any], programs: "_Programs", bar: bool, validation_steps: int | None) -> None:
        super().__init__()
        self.callbacks, self.programs, self.validation_steps = callbacks, programs, validation_steps
        self.lookers = {split: [c for c in callbacks if _looks(c, hooks)] for split, hooks in _BATCH_HOOKS.items()}
        self.loops = {split: _Loop(fusing=not lookers, alone=bar) for split, lookers in self.lookers.items()}
        self.training = False

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def _tell(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def on_train_begin(self, logs: Any = None) -> None:
        self.training = True
        self._tell("on_train_begin", logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._tell("on_train_end", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._tell("on_epoch_begin", epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.loops["train"].rest()
        self._tell("on_epoch_end", epoch, logs)

    def on_test_begin(self, logs: Any = None) -> None:
        self._tell("on_test_begin", logs)

    def on_test_end(self, logs: Any = None) -> None:
        self.loops["test"].rest()
        self._tell("on_test_end", logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("train", batch, self.params.get("steps"))

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("test", batch, self.validation_steps if self.training else self.params.get("steps"))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("train", batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("test", batch, logs)

    def _begin(self, split: str, batch: int, steps: int | None) -> None:
        for callback in self.lookers[split]:
            getattr(callback, f"on_{split}_batch_begin")(batch, {})
        unit = self.programs.model.steps_per_execution
        left = None if steps is None else -(-(steps - batch) // unit)
        self.loops[split].begin(batch, left)
        if split in self.programs.of:
            self.programs.of[split].loop = self.loops[split]
        self.programs.interrupts.defer()  # Keras may just be taking the weights out of the model

    def _end(self, split: str, batch: int, logs: Any) -> None:
        self.programs.interrupts.allow()
        loop = self.loops[split]
        if split in self.programs.of:
            logs = Logs(loop.logs)
        for callback in self.lookers[split]:
            getattr(callback, f"on_{split}_batch_end")(batch, logs)
        loop.shown.update(loop.logs)


class _Bar(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, always showing the dispatch before the last, which the device has done by then."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        self.before: tuple[int, Any] | None = None
        self.looked = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.before, self.looked = None, 0.0
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look("train", batch, logs, super().on_train_batch_end)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.watch.training:
            self._look("test", batch, logs, super().on_test_batch_end)

    def _look(self, split: str, batch: int, logs: Any, show: Callable[[int, Any], None]) -> None:
        if split not in self.watch.programs.of or self.verbose != 1:
            return show(batch, logs)
        now = time.perf_counter()
        if self.before is not None and now - self.looked >= SHOW_EVERY:
            show(self.before[0], Logs(self.before[1]))
            self.looked = now
        if self.watch.loops[split].done == 0:
            self.before = (batch, self.watch.loops[split].logs)
        self.seen = batch + 1


class Logs(dict[str, Any]):
    """A step's logs as Keras hands them to callbacks: Python numbers by name, read off the device when somebody looks at one.

    >>> logs = Logs({"loss": jnp.ones(()), "mae": jnp.zeros(())})
    >>> "loss" in logs, logs["loss"], dict(logs)
    (True, 1.0, {'loss': 1.0, 'mae': 0.0})
    """

    def __init__(self, values: Any) -> None:
        super().__init__(_flat(values))
        self._waiting = True

    def _read(self) -> None:
        if self._waiting:
            self._waiting = False
            super().update({name: _number(value) for name, value in jax.device_get(dict(super().items())).items()})

    def __iter__(self) -> Iterator[str]:  # of its own: otherwise `dict(logs)` takes the values unread
        return iter(super().keys())

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _reading(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def read(self: Logs, *args: Any, **kwargs: Any) -> Any:
        self._read()
        return method(self, *args, **kwargs)

    return read


for _name in ("__getitem__", "get", "items", "values", "copy", "pop", "popitem", "setdefault", "update", "__setitem__"):
    setattr(Logs, _name, _reading(_name))
for _name in ("__eq__", "__ne__", "__or__", "__ror__", "__ior__", "__repr__"):
    setattr(Logs, _name, _reading(_name))


class _Interrupts:
    """Ctrl-C, put off while the model's weights are neither in the model nor where Keras finds them."""

    def __init__(self) -> None:
        self.deferring = False
        self.asked: tuple[int, Any] | None = None
        self.previous: Any = None

    def defer(self) -> None:
        self.deferring = True

    def allow(self) -> None:
        self.deferring = False
        if self.asked is not None:
            asked, self.asked = self.asked, None
            self.previous(*asked)

    def handle(self, number: int, frame: Any) -> None:
        if self.deferring:
            self.asked = (number, frame)
        else:
            self.previous(number, frame)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(self.previous):
            yield
            return
        signal.signal(signal.SIGINT, self.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self.previous)
        self.allow()


class _Programs:
    """The programs of a model for the time of one call."""

    def __init__(self, model: keras.Model) -> None:
        self.model, self.interrupts = model, _Interrupts()
        self.of: dict[str, Any] = {}
        eager = not model.jit_compile or model.run_eagerly
        for split, make in (
            ("train", lambda: _Program(model, "train_step")),
            ("test", lambda: _Program(model, "test_step")),
            ("predict", lambda: _Prediction(model)),
        ):
            maker = f"make_{split}_function"
            if getattr(type(model), maker) is not getattr(keras.Model, maker):
                continue  # the model makes its own
            program = getattr(model, f"{split}_function")
            if not isinstance(program, _Program | _Prediction) or program.compiled == eager:
                program = make()
                setattr(model, f"{split}_function", program)
            self.of[split] = program

    def watched(self, callbacks: Any, verbose: Any, validation_steps: int | None = None) -> Any:
        """A user's callbacks with ours around them: what to hand to Keras."""
        given = keras.tree.flatten(callbacks) if callbacks else []
        if any(isinstance(c, keras.callbacks.CallbackList | keras.callbacks.ProgbarLogger) for c in given):
            return callbacks  # they get their logs from Keras
        own = [c for c in given if isinstance(c, keras.callbacks.History)]
        watch = _Watch([c for c in given if c not in own], self, verbose != 0, validation_steps)
        return [watch, *own, *([_Bar(watch)] if verbose != 0 else [])]

    @contextlib.contextmanager
    def running(self) -> Iterator["_Programs"]:
        before = {split: program.interrupts for split, program in self.of.items()}
        for program in self.of.values():
            program.interrupts = self.interrupts
        try:
            with self.interrupts.held():
                yield self
        except BaseException:
            for program in self.of.values():
                _restore(self.model, program.state)
            raise
        finally:
            for split, program in self.of.items():
                program.interrupts, program.state = before[split], None


def _programs(model: keras.Model) -> contextlib.AbstractContextManager[_Programs]:
    return _Programs(model).running()


def _restore(model: keras.Model, state: PyTree) -> None:
    """Gives the model those of its weights back that Keras took out of it or that were donated."""
    if state is None:
        return
    parts = [model.trainable_variables, model.non_trainable_variables]
    parts += [[] if model.optimizer is None else model.optimizer.variables] if len(state) == 4 else []
    parts += [model.metrics_variables]
    for variables, arrays in zip(parts, state, strict=False):
        for variable, array in zip(variables, arrays, strict=False):
            if _lost(variable) and not array.is_deleted():
                variable.assign(array)


def _lost(variable: keras.Variable) -> bool:
    try:
        return isinstance(variable.value, jax.Array) and variable.value.is_deleted()
    except TypeError:  # Keras empties the variables of a model that is being trained
        return True


def _looks(callback: Any, hooks: Sequence[str]) -> bool:
    """Whether a callback has one of these hooks."""
    if type(callback) in _SAVING and callback.save_freq == "epoch":
        return False
    return any(
        getattr(type(callback), hook, None) is not getattr(keras.callbacks.Callback, hook) or hook in vars(callback)
        for hook in hooks
    )


def _flat(logs: Any) -> dict[str, Any]:
    """Nested logs as one dictionary, sorted as Keras sorts them."""
    flat: dict[str, Any] = {}
    for name, value in sorted((logs or {}).items()):
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _shapes(tree: PyTree) -> Any:
    """What tells one program's arguments from another's."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def _stacked(batches: list[Any], length: int) -> PyTree:
    """Batches along a new first axis of this length; what is behind the last of them has no meaning."""

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array) and jax.default_backend() != "cpu":
            return _stack([*leaves, *[leaves[-1]] * (length - len(leaves))])
        stacked = np.empty((length, *leaves[0].shape), leaves[0].dtype)
        for i, leaf in enumerate(leaves):
            stacked[i] = leaf
        return stacked

    return jax.tree.map(stack, *batches)


_stack = jax.jit(jnp.stack)

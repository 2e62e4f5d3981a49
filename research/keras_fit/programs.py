"""Functions that run a Keras model's steps under Keras' own loops: several steps per program, and no weights lost on failure."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import PyTree

from research.cpu.loops import runs_well_in_loop, without_hoisting
from research.cpu.rewrite import rewrite
from research.data.prefetch import DispatchPacer, signature, stack_batches
from research.training.programs import STACKED_BYTES, STACKED_STEPS
from research.transforms.fuse import fuse


class LoopState:
    """The position in the Keras loop that calls a `StepFunction`. One execution is `steps_per_execution` steps.

    - `may_fuse`: no callback needs single executions.
    - `first_alone`: the first execution of an epoch runs alone, so that the progress bar has something to show early.
    - `remaining`: executions left in the epoch including this one; None if unknown.
    - `executed_ahead`: executions that already ran, and that Keras has not called for yet.
    - `logs`: the latest logs. `returned_logs`: the dictionary that Keras holds as its logs, filled in later.
    - `pending_error`: what the data raised after some batches that are still to be trained on.
    - `capacity`: steps that one program may run over batches of `full_signature`, the signature of a complete batch.

    >>> loop = LoopState(may_fuse=True, first_alone=False)
    >>> loop.begin_execution(0, remaining=5)
    >>> loop.at_epoch_start, loop.remaining
    (True, 5)
    """

    def __init__(self, may_fuse: bool, first_alone: bool) -> None:
        self.may_fuse, self.first_alone = may_fuse, first_alone
        self.remaining: int | None = None
        self.at_epoch_start = True
        self.executed_ahead = 0
        self.logs: Any = {}
        self.returned_logs: dict[str, Any] = {}
        self.pending_error: Exception | None = None
        self.capacity = 0
        self.full_signature: Any = None
        self.pacer = DispatchPacer()

    def begin_execution(self, execution: int, remaining: int | None) -> None:
        """Records that Keras is about to call for an execution, counted from 0 within the epoch."""
        self.remaining, self.at_epoch_start = remaining, execution == 0
        if self.at_epoch_start:
            self.executed_ahead, self.pending_error = 0, None


class StepFunction:
    """A replacement for `model.train_function` or `model.test_function`: runs a step method over batches of Keras' iterator.

    Keras calls it once per execution. Where the loop allows it, one call runs several executions, and the calls for those only
    return the logs.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> model.compile(loss="mse")
    >>> _ = model.evaluate(np.ones((2, 1)), np.ones((2, 1)), verbose=0)  # builds the metrics
    >>> function = StepFunction(model, "test_step")
    >>> state = [[v.value for v in group] for group in (model.trainable_variables, [], model.metrics_variables)]
    >>> logs, _ = function(tuple(state), iter([(np.ones((2, 1)), np.full((2, 1), 3.0))]))
    >>> sorted(logs)
    ['loss']
    """

    def __init__(self, model: keras.Model, method: str) -> None:
        # A new function object per instance: for one that it knows, JAX would reuse an older program.
        def step(state: PyTree, data: Any) -> tuple[PyTree, Any]:
            logs, state = getattr(model, method)(state, data)
            return state, logs

        self.model, self.step = model, step
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.programs: dict[str, Any] = {}
        self.compiled_signatures: set[Any] = set()
        self.fusable: dict[Any, bool] = {}
        self.interrupts = DeferredInterrupts()
        self.loop: LoopState | None = None
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        """Runs one execution; returns the logs and the state after it."""
        self.state = state
        self.interrupts.allow()
        # A `CallbackDispatcher` sets the loop before each call. Without one, Keras itself calls in between.
        dispatcher_loop, self.loop = self.loop, None
        loop = dispatcher_loop or LoopState(may_fuse=False, first_alone=False)
        if loop.executed_ahead:
            loop.executed_ahead -= 1
        else:
            try:
                batches = self._take_batches(iterator, loop)
                self.state, loop.logs = self._run(state, batches, loop)
            except BaseException:
                _restore_variables(self.model, self.state)
                raise
            loop.executed_ahead = -(-len(batches) // self.model.steps_per_execution) - 1
        if dispatcher_loop is None:
            return loop.logs, self.state
        # Keras converts what it gets here to floats, which would wait for the device: `CallbackDispatcher` fills it in later.
        loop.returned_logs = {}
        return loop.returned_logs, self.state

    def _take_batches(self, iterator: Iterator[Any], loop: LoopState) -> list[Any]:
        """Returns the batches of one dispatch. An error after the first batch is raised by the next call."""
        if loop.pending_error is not None:
            error, loop.pending_error = loop.pending_error, None
            raise error
        unit = self.model.steps_per_execution
        batches = [next(iterator)]
        if loop.at_epoch_start or not loop.capacity:
            loop.full_signature, loop.capacity = signature(batches[0]), self._capacity(batches[0], loop)
        executions = 1
        if loop.may_fuse and not (loop.first_alone and loop.at_epoch_start):
            executions = max(1, min(loop.pacer.steps, loop.capacity) // unit)
            executions = executions if loop.remaining is None else min(executions, loop.remaining)
        try:
            batches.extend(itertools.islice(iterator, executions * unit - 1))
        except Exception as error:
            loop.pending_error = error
        return batches

    def _capacity(self, batch: Any, loop: LoopState) -> int:
        """Returns how many steps over batches like this one a single program may run."""
        leaves = jax.tree.leaves(batch)
        numeric = all(isinstance(leaf, np.ndarray | jax.Array) and leaf.dtype.kind in "biufc" for leaf in leaves)
        unit = self.model.steps_per_execution
        if not self.compiled or not numeric or keras.distribution.distribution() is not None:
            return 1
        if unit == 1 and not loop.may_fuse:
            return 1
        if sum(leaf.nbytes for leaf in leaves) > STACKED_BYTES:
            return 1
        return STACKED_STEPS if loop.remaining is None else min(STACKED_STEPS, loop.remaining * unit)

    def _run(self, state: PyTree, batches: list[Any], loop: LoopState) -> tuple[PyTree, Any]:
        """Runs a step over each batch; returns the last state and the last logs."""
        logs: Any = {}
        for batch_signature, same_signature in itertools.groupby(batches, signature):
            group = list(same_signature)
            while group:
                chunk, group = group[: loop.capacity], group[loop.capacity :]
                use_fused = loop.capacity > 1 and (len(chunk) > 1 or batch_signature == loop.full_signature)
                state, logs = self._run_fused(state, chunk, loop.capacity) if use_fused else self._run_single(state, chunk)
        loop.pacer.dispatched(logs, len(batches))
        return state, logs

    def _run_single(self, state: PyTree, batches: list[Any]) -> tuple[PyTree, Any]:
        """Runs one program per batch; no program at all for an eager model."""
        logs: Any = {}
        for batch in batches:
            if not self.compiled:
                state, logs = self.step(state, batch)
                continue
            if "single" not in self.programs:
                shardings = None
                if keras.distribution.distribution() is not None:
                    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
                self.programs["single"] = jax.jit(rewrite(self.step), donate_argnums=0, out_shardings=shardings)
            state, logs = self._dispatch("single", (state, batch))
        return state, logs

    def _run_fused(self, state: PyTree, batches: list[Any], capacity: int) -> tuple[PyTree, Any]:
        """Runs all steps as one program, or one by one where a compiled loop would be slower or is impossible."""
        key = (signature(batches[0]), capacity)
        if self.fusable.get(key) is False:
            return self._run_single(state, batches)
        arguments = (state, stack_batches(batches, capacity), np.int32(len(batches)))
        if key not in self.fusable:
            program = self.programs.setdefault(
                "fused", jax.jit(_last_logs(fuse(without_hoisting(rewrite(self.step)))), donate_argnums=0)
            )
            try:
                self.fusable[key] = runs_well_in_loop(program.trace(*arguments))
            except TypeError:  # a step that changes its state's dtypes can't be a loop body
                self.fusable[key] = False
            return self._run_fused(state, batches, capacity)
        return self._dispatch("fused", arguments)

    def _dispatch(self, name: str, arguments: tuple[Any, ...]) -> tuple[PyTree, Any]:
        """Runs a program. It donates the old state, so Ctrl-C is deferred until Keras has stored the new one."""
        key = (name, signature(arguments[1:]))
        if key not in self.compiled_signatures:
            self.programs[name].lower(*arguments).compile()  # may take long, so Ctrl-C still works here
            self.compiled_signatures.add(key)
        self.interrupts.defer()
        state, logs = self.programs[name](*arguments)
        self.state = state
        return state, logs


class PredictFunction:
    """A replacement for `model.predict_function`: Keras' own, except that it does not donate the weights.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> weights = [v.value for v in model.trainable_variables]
    >>> outputs, _ = PredictFunction(model)((weights, []), iter([(np.ones((2, 1)),)]))
    >>> outputs.tolist()
    [[1.0], [1.0]]
    """

    def __init__(self, model: keras.Model) -> None:
        def step(state: PyTree, data: Any) -> tuple[PyTree, PyTree]:
            return model.predict_step(state, data)

        self.model = model
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.step = jax.jit(rewrite(step)) if self.compiled else step
        self.interrupts = DeferredInterrupts()
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        """Runs one execution; returns the outputs and the state after it."""
        self.state = state
        trainable, non_trainable = state
        outputs = []
        for data in itertools.chain([next(iterator)], itertools.islice(iterator, self.model.steps_per_execution - 1)):
            output, non_trainable = self.step((trainable, non_trainable), data)
            outputs.append(output)
        if len(outputs) == 1:
            return outputs[0], (trainable, non_trainable)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), (trainable, non_trainable)


class DeferredInterrupts:
    """A SIGINT handler that waits while the weights are in transit: neither in the model nor where Keras stores them.

    >>> interrupts = DeferredInterrupts()
    >>> interrupts.previous_handler = lambda number, frame: print("interrupted")
    >>> interrupts.defer()
    >>> interrupts.handle(signal.SIGINT, None)
    >>> interrupts.allow()
    interrupted
    """

    def __init__(self) -> None:
        self.deferring = False
        self.pending: tuple[int, Any] | None = None
        self.previous_handler: Any = None

    def defer(self) -> None:
        """Makes a later Ctrl-C wait for `allow`."""
        self.deferring = True

    def allow(self) -> None:
        """Runs the previous handler for a Ctrl-C that waited, and for each later one at once."""
        self.deferring = False
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.previous_handler(*pending)

    def handle(self, number: int, frame: Any) -> None:
        """Handles the signal: at once, or later if deferring."""
        if self.deferring:
            self.pending = (number, frame)
        else:
            self.previous_handler(number, frame)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Installs `handle` for SIGINT. Does nothing outside the main thread, where Python allows no handlers."""
        self.previous_handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(self.previous_handler):
            yield
            return
        signal.signal(signal.SIGINT, self.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self.previous_handler)
        self.allow()


class ModelFunctions:
    """The train, test and predict functions of a model for the time of one call of `fit` or the like.

    A function that the model makes itself (it overrides `make_train_function`, say) is left alone.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> sorted(ModelFunctions(model).by_split)
    ['predict', 'test', 'train']
    """

    def __init__(self, model: keras.Model) -> None:
        self.model, self.interrupts = model, DeferredInterrupts()
        self.by_split: dict[str, Any] = {}
        eager = not model.jit_compile or model.run_eagerly
        for split, make_function in (
            ("train", lambda: StepFunction(model, "train_step")),
            ("test", lambda: StepFunction(model, "test_step")),
            ("predict", lambda: PredictFunction(model)),
        ):
            keras_method = f"make_{split}_function"
            if getattr(type(model), keras_method) is not getattr(keras.Model, keras_method):
                continue
            function = getattr(model, f"{split}_function")
            if not isinstance(function, StepFunction | PredictFunction) or function.compiled == eager:
                function = make_function()
                setattr(model, f"{split}_function", function)
            self.by_split[split] = function

    @contextlib.contextmanager
    def installed(self) -> Iterator["ModelFunctions"]:
        """Handles Ctrl-C within the context, and gives the model its weights back whatever is raised."""
        previous = {split: function.interrupts for split, function in self.by_split.items()}
        for function in self.by_split.values():
            function.interrupts = self.interrupts
        try:
            with self.interrupts.installed():
                yield self
        except BaseException:
            for function in self.by_split.values():
                _restore_variables(self.model, function.state)
            raise
        finally:
            for split, function in self.by_split.items():
                function.interrupts, function.state = previous[split], None


def _restore_variables(model: keras.Model, state: PyTree) -> None:
    """Assigns a state's arrays to those variables that Keras emptied, or whose arrays were donated."""
    if state is None:
        return
    groups = [model.trainable_variables, model.non_trainable_variables]
    groups += [[] if model.optimizer is None else model.optimizer.variables] if len(state) == 4 else []
    groups += [model.metrics_variables]
    for variables, arrays in zip(groups, state, strict=False):
        for variable, array in zip(variables, arrays, strict=False):
            if _is_lost(variable) and not array.is_deleted():
                variable.assign(array)


def _is_lost(variable: keras.Variable) -> bool:
    """Returns whether a variable has no array, or a deleted one."""
    try:
        return isinstance(variable.value, jax.Array) and variable.value.is_deleted()
    except TypeError:  # Keras empties the variables of a model while it trains
        return True


def _last_logs(fused: Callable[..., tuple[PyTree, Any]]) -> Callable[..., tuple[PyTree, Any]]:
    """Wraps a fused step so that it returns the logs of its last step only."""

    def step(state: PyTree, batches: PyTree, count: Any) -> tuple[PyTree, Any]:
        state, logs = fused(state, batches, count)
        return state, jax.tree.map(lambda values: values[count - 1], logs)

    return step

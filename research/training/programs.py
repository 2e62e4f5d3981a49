"""What runs a Keras model's steps under Keras' own loops: several as one program, and a model never left without weights."""

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

from research.compiled import STACKED_BYTES, STACKED_STEPS
from research.feed import Pace, kind, stacked
from research.kernels import rewritten
from research.transforms import fuse, loops_well


class Loop:
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
        self.failure: Exception | None = None
        self.capacity = 0
        self.full: Any = None
        self.pace = Pace()

    def begin(self, execution: int, left: int | None) -> None:
        """Another execution is about to be asked for."""
        self.left, self.first = left, execution == 0
        if self.first:
            self.done, self.failure = 0, None


class Program:
    """What stands in `model.train_function` and its kin: runs the model's step over batches from Keras' iterator.

    To Keras each call is one execution. Where the loop allows it, a call runs several, and the calls for those do nothing.
    """

    def __init__(self, model: keras.Model, name: str) -> None:
        # A new function each time: for one that it knows JAX would find an older program.
        def step(state: PyTree, data: Any) -> tuple[PyTree, Any]:
            logs, state = getattr(model, name)(state, data)
            return state, logs

        self.model, self.step = model, step
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.programs: dict[str, Any] = {}
        self.known: set[Any] = set()
        self.fusable: dict[Any, bool] = {}
        self.interrupts = Interrupts()
        self.loop: Loop | None = None
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        """One execution: the logs and the state after it."""
        self.state = state
        self.interrupts.allow()
        watched, self.loop = self.loop, None  # a loop says so before each call: others may use the program in between
        loop = watched or Loop(fusing=False, alone=False)
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
        # Keras makes floats of what it gets here, which would wait for the device: `Watch` fills it in after that.
        loop.shown = {}
        return loop.shown, self.state

    def _take(self, iterator: Iterator[Any], loop: Loop) -> list[Any]:
        """Batches for one dispatch. What the iterator raises after the first waits for its turn."""
        if loop.failure is not None:
            failure, loop.failure = loop.failure, None
            raise failure
        unit = self.model.steps_per_execution
        batches = [next(iterator)]
        if loop.first or not loop.capacity:
            loop.full, loop.capacity = kind(batches[0]), self._capacity(batches[0], loop)
        executions = 1
        if loop.fusing and not (loop.alone and loop.first):
            executions = max(1, min(loop.pace.steps, loop.capacity) // unit)
            executions = executions if loop.left is None else min(executions, loop.left)
        try:
            batches.extend(itertools.islice(iterator, executions * unit - 1))
        except Exception as error:
            loop.failure = error
        return batches

    def _capacity(self, batch: Any, loop: Loop) -> int:
        """How many steps over such batches one program may run."""
        leaves = jax.tree.leaves(batch)
        arrays = all(isinstance(leaf, np.ndarray | jax.Array) and leaf.dtype.kind in "biufc" for leaf in leaves)
        unit = self.model.steps_per_execution
        if not self.compiled or not arrays or keras.distribution.distribution() is not None:
            return 1
        if unit == 1 and not loop.fusing:
            return 1
        size = sum(leaf.nbytes for leaf in leaves)
        if size > STACKED_BYTES:
            return 1
        return STACKED_STEPS if loop.left is None else min(STACKED_STEPS, loop.left * unit)

    def _run(self, state: PyTree, batches: list[Any], loop: Loop) -> tuple[PyTree, Any]:
        """The state after a step over each batch, and the last logs."""
        logs: Any = {}
        for shapes, alike in itertools.groupby(batches, kind):
            group = list(alike)
            while group:
                piece, group = group[: loop.capacity], group[loop.capacity :]
                fused = loop.capacity > 1 and (len(piece) > 1 or shapes == loop.full)
                state, logs = self._fused(state, piece, loop.capacity) if fused else self._single(state, piece)
        loop.pace.dispatched(logs, len(batches))
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
                self.programs["single"] = jax.jit(rewritten(self.step), donate_argnums=0, out_shardings=shardings)
            state, logs = self._call("single", (state, batch))
        return state, logs

    def _fused(self, state: PyTree, batches: list[Any], capacity: int) -> tuple[PyTree, Any]:
        """All steps as one program, or one by one where a loop would be slower or can't be."""
        shape = (kind(batches[0]), capacity)
        if self.fusable.get(shape) is False:
            return self._single(state, batches)
        arguments = (state, stacked(batches, capacity), np.int32(len(batches)))
        if shape not in self.fusable:
            program = self.programs.setdefault("fused", jax.jit(_last(fuse(rewritten(self.step))), donate_argnums=0))
            try:
                self.fusable[shape] = loops_well(program.trace(*arguments))
            except TypeError:  # a step that changes its state's types has no loop
                self.fusable[shape] = False
            return self._fused(state, batches, capacity)
        return self._call("fused", arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> tuple[PyTree, Any]:
        """Runs a program. From here until Keras has stored the state, Ctrl-C has to wait: the old one is donated."""
        shape = (name, kind(arguments[1:]))
        if shape not in self.known:
            self.programs[name].lower(*arguments).compile()  # may take long, and may be interrupted
            self.known.add(shape)
        self.interrupts.defer()
        state, logs = self.programs[name](*arguments)
        self.state = state
        return state, logs


class Prediction:
    """What stands in `model.predict_function`: as Keras' own, but for the weights, which are not donated."""

    def __init__(self, model: keras.Model) -> None:
        def step(state: PyTree, data: Any) -> tuple[PyTree, PyTree]:
            return model.predict_step(state, data)

        self.model = model
        self.compiled = bool(model.jit_compile and not model.run_eagerly)
        self.step = jax.jit(rewritten(step)) if self.compiled else step
        self.interrupts = Interrupts()
        self.state: PyTree = None

    def __call__(self, state: PyTree, iterator: Iterator[Any]) -> tuple[Any, PyTree]:
        """One execution: the outputs and the state after it."""
        self.state = state
        weights, other = state
        outputs = []
        for data in itertools.chain([next(iterator)], itertools.islice(iterator, self.model.steps_per_execution - 1)):
            output, other = self.step((weights, other), data)
            outputs.append(output)
        if len(outputs) == 1:
            return outputs[0], (weights, other)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs), (weights, other)


class Interrupts:
    """Ctrl-C, put off while the model's weights are neither in the model nor where Keras finds them."""

    def __init__(self) -> None:
        self.deferring = False
        self.asked: tuple[int, Any] | None = None
        self.previous: Any = None

    def defer(self) -> None:
        """From here on Ctrl-C waits."""
        self.deferring = True

    def allow(self) -> None:
        """From here on Ctrl-C does what it does; so does one that waited."""
        self.deferring = False
        if self.asked is not None:
            asked, self.asked = self.asked, None
            self.previous(*asked)

    def handle(self, number: int, frame: Any) -> None:
        """What the signal calls."""
        if self.deferring:
            self.asked = (number, frame)
        else:
            self.previous(number, frame)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ctrl-C is ours within it, where it can be."""
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


class Programs:
    """The programs of a model for the time of one call."""

    def __init__(self, model: keras.Model) -> None:
        self.model, self.interrupts = model, Interrupts()
        self.of: dict[str, Any] = {}
        eager = not model.jit_compile or model.run_eagerly
        for split, make in (
            ("train", lambda: Program(model, "train_step")),
            ("test", lambda: Program(model, "test_step")),
            ("predict", lambda: Prediction(model)),
        ):
            maker = f"make_{split}_function"
            if getattr(type(model), maker) is not getattr(keras.Model, maker):
                continue  # the model makes its own
            program = getattr(model, f"{split}_function")
            if not isinstance(program, Program | Prediction) or program.compiled == eager:
                program = make()
                setattr(model, f"{split}_function", program)
            self.of[split] = program

    @contextlib.contextmanager
    def running(self) -> Iterator["Programs"]:
        """The model has our programs within it, and weights after it, whatever is raised."""
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


def _last(fused: Callable[..., tuple[PyTree, Any]]) -> Callable[..., tuple[PyTree, Any]]:
    """A fused step with the logs of its last step alone."""

    def last(state: PyTree, batches: PyTree, count: Any) -> tuple[PyTree, Any]:
        state, each = fused(state, batches, count)
        return state, jax.tree.map(lambda logs: logs[count - 1], each)

    return last

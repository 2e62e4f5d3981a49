"""A learner's functions as compiled programs, cached with the learner: each is traced and compiled once."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import InvalidArgument
from research.core.step import Step
from research.cpu.loops import runs_well_in_loop, without_hoisting
from research.cpu.rewrite import rewrite, separate_gathers
from research.data.batches import Batches, take_rows
from research.data.prefetch import is_numeric, signature
from research.errors import one_line, user_frame
from research.transforms.fuse import batch_at, fuse
from research.transforms.observe import Observe, observed_scalars

T = TypeVar("T")

FUSED_STEPS = 512  # at most in one program, for data on the device
STACKED_STEPS = 32  # at most in one program, for batches that are stacked on the host
STACKED_BYTES = 1 << 17  # of the largest batch that is stacked: copying a larger one costs more than fusing gains
LOG_BYTES = 1 << 20  # of the logs of all steps that one program returns


class TrainProgram(NamedTuple):
    """A learner's training program: (state, source, batches, positions, count, at_epoch_start) -> results.

    The results are the state, the logs of the last step and the stacked logs of all steps. If `positions` is None, it runs one
    step on one batch, and the last result is None. Otherwise it runs steps on the first `count` of the stacked `batches`, which
    are as many as `positions` is long (see `Chunk`). `at_epoch_start` (bool) resets the metrics before the first step. `source`
    is the data on the device, or None. `capacity` is the best number of stacked batches.

    `observe` is None, or the program (state, source, batches, positions) -> scalars of what is observed of the first of those
    steps.

    >>> TrainProgram(program=None, capacity=8).capacity
    8
    """

    program: Any
    capacity: int
    observe: Any = None


def train_program(learner: Learner, data: Batches, state: Any, function: Observe | None = None) -> TrainProgram:
    """Returns the program that trains a learner on such data, traced but not compiled. It donates the state.

    With a `function` there is a second program, which computes that of the observations of a step, see `transforms.observe`.

    `state` may be arrays or `jax.ShapeDtypeStruct`s. Steps are fused where that is faster: not if a convolution would run inside
    a loop on the CPU, nor if batches come from the host and are large. Raises `InvalidArgument` if a batch does not fit the
    learner or the learner's code fails.

    >>> import keras, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> train_program(learner, research.from_arrays(np.ones((6, 1)), np.ones((6, 1)), batch_size=2), learner.init()).capacity
    3
    """
    step, program, capacities = _trained(learner.train)(learner.reset)
    source, batch = _source(data), _batch(data)
    key = signature((state, source, batch))
    if key not in capacities:
        capacities[key] = _capacity(checked(functools.partial(step.trace, state, data.shapes), data), state, source, batch)
    observing = None
    if function is not None:
        observing = _observe_program(learner, function)
        checked(functools.partial(jax.eval_shape, observing, state, None, data.shapes, None), data)
    return TrainProgram(program, min(capacities[key], data.steps_per_epoch), observing)


def _capacity(traced: Any, state: Any, source: PyTree, batch: PyTree) -> int:
    """Returns the best number of steps in one program, regardless of the length of an epoch."""
    new_state, logs = traced.out_info
    if not runs_well_in_loop(traced) or signature(new_state) != signature(state) or not is_numeric(batch):
        return 1
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    sharded = any(getattr(leaf, "sharding", None) is not None for leaf in jax.tree.leaves(batch))
    stacked = STACKED_STEPS if size <= STACKED_BYTES and not sharded else 1
    log_size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(logs))
    return max(min(stacked if source is None else FUSED_STEPS, LOG_BYTES // max(log_size, 1)), 1)


def compile_ahead(learner: Learner, data: Batches, state: Any) -> None:
    """Compiles the program that trains a learner on such data from shapes alone, so that `train` finds it in the cache.

    Another thread may load the data meanwhile. Raises `InvalidArgument` as `train_program` does.

    >>> import keras, research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> compile_ahead(learner, research.from_arrays(np.ones((6, 1)), np.ones((6, 1)), batch_size=2), learner.init())
    """
    program, capacity, _ = train_program(learner, data, state)
    source, batch, positions = _source(data), _batch(data), None
    if capacity > 1:
        positions = np.arange(capacity, dtype=np.int32)
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((capacity, *leaf.shape), leaf.dtype), batch)
    program.lower(state, source, batch, positions, np.int32(1), np.True_).compile()


def evaluate_program(learner: Learner, state: Any, source: PyTree, batch: Any, data: Batches) -> Callable[..., tuple[Any, Logs]]:
    """Returns the program that evaluates a learner on such a batch: (state, source, batch) -> (state, logs). Nothing is donated.

    `batch` holds row indices if `source`, the data on the device, is not None. Raises `InvalidArgument` if the batch does not fit
    the learner or the learner's code fails.

    >>> import keras, research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), loss="mse")
    >>> data, state = research.from_arrays(np.ones((4, 1)), np.ones((4, 1)), batch_size=2), learner.init()
    >>> _, logs = evaluate_program(learner, state, None, data.batch(0), data)(state, None, data.batch(0))
    >>> list(logs)
    ['loss']
    """
    return checked(functools.partial(jit_without_copies, _evaluated(learner.evaluate), state, source, batch), data)


def predict_program(learner: Learner) -> Callable[[Any, Any], PyTree]:
    """Returns the program that computes a learner's outputs: (state, batch) -> outputs.

    >>> import keras, research
    >>> learner = research.supervised(keras.Sequential([keras.Input((1,)), keras.layers.Dense(3)]), loss="mse")
    >>> predict_program(learner)(learner.init(), research.Batch(np.ones((2, 1), np.float32))).shape
    (2, 3)
    """
    return _predicted(learner.predict)


def checked(trace: Callable[[], T], data: Batches) -> T:
    """Returns the result of `trace`, which traces a program for batches of `data`.

    Raises `InvalidArgument` in place of a `TypeError` or `ValueError`, which becomes its `__cause__`. If the error comes from the
    user's own code, the message names file and line. Otherwise the batch does not fit the learner. Other errors propagate.

    >>> def trace():
    ...     return jnp.zeros(2) + jnp.zeros(3)
    >>> checked(trace, Batches(lambda step: np.zeros(2), jax.ShapeDtypeStruct((2,), np.float32), 1, 2))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: a batch does not fit the learner (float32[2]): add got incompatible shapes ...
    """
    try:
        return trace()
    except InvalidArgument:
        raise
    except (TypeError, ValueError) as error:
        leaves = jax.tree_util.tree_leaves_with_path(data.shapes)
        named = [(jax.tree_util.keystr(path).strip("."), f"{leaf.dtype}{list(leaf.shape)}") for path, leaf in leaves]
        shapes = ", ".join(f"{name} {shape}".strip() for name, shape in named) or "no arrays"
        frame = user_frame(error)
        if frame is None:
            raise InvalidArgument(f"a batch does not fit the learner ({shapes}): {one_line(error)}") from error
        path, line = frame
        message = f"{path}:{line}: {type(error).__name__}: {one_line(error)} (while tracing a batch of {shapes})"
        raise InvalidArgument(message) from error


def weak_cache(make: Callable[[Callable[..., Any]], T]) -> Callable[[Callable[..., Any]], T]:
    """Returns a cached version of `make`, called once per function, whose entry lives as long as the function.

    The result must not reference the function itself, or it would never be freed: `make` gets a wrapper that calls the function
    through a weak reference.

    >>> jit = weak_cache(lambda function: jax.jit(lambda x: function(x)))
    >>> def double(x):
    ...     return 2 * x
    >>> jit(double) is jit(double), float(jit(double)(2.0))
    (True, 4.0)
    """
    cache: weakref.WeakKeyDictionary[Callable[..., Any], T] = weakref.WeakKeyDictionary()

    def lookup(function: Callable[..., Any]) -> T:
        if function not in cache:
            reference = weakref.ref(function)

            @functools.wraps(function)
            def wrapper(*args: Any) -> Any:
                target = reference()
                assert target is not None
                return target(*args)

            del wrapper.__wrapped__  # a strong reference to the function
            cache[function] = make(wrapper)
        return cache[function]

    return lookup


def jit_without_copies(function: Callable[..., T], *args: Any) -> Callable[..., T]:
    """Compiles a function for arguments like `args` such that outputs which are inputs, unchanged, are not copied.

    Such an output is returned as the very array that was passed: the evaluation of a model returns its weights, and copying them
    would often cost more than the batch. Calls with the same function and arguments of the same shapes return the same program.

    >>> import jax.numpy as jnp
    >>> weights, count = jnp.ones(1000), jnp.zeros(())
    >>> program = jit_without_copies(lambda weights, count: (weights, count + 1), weights, count)
    >>> same, changed = program(weights, count)
    >>> same is weights, float(changed)
    (True, 1.0)
    """
    leaves, structure = jax.tree.flatten(args)
    cached, key = _without_copies(function), (structure, tuple(jax.typeof(leaf) for leaf in leaves))
    if key not in cached.programs:
        cached.programs[key] = _compile_without_copies(cached.function, args)
    return cached.programs[key]


class _FunctionPrograms(NamedTuple):
    function: Callable[..., Any]
    programs: dict[Any, Callable[..., Any]]


def _compile_without_copies(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    positions = {variable: i for i, variable in enumerate(closed.jaxpr.invars)}
    # For each output the position of the input that it is, or None for a computed one.
    sources = [positions.get(v) if isinstance(v, jax.extend.core.Var) else None for v in closed.jaxpr.outvars]
    structure = jax.tree.structure(shapes)
    flat = jax.extend.core.jaxpr_as_fun(closed)

    def computed_outputs(*leaves: Any) -> list[Any]:
        return [output for output, i in zip(flat(*leaves), sources, strict=True) if i is None]

    computed_outputs.__name__ = function.__name__
    program = jax.jit(computed_outputs)

    def call(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        computed = iter(program(*leaves))
        return jax.tree.unflatten(structure, [next(computed) if i is None else leaves[i] for i in sources])

    return call


def _train_programs(train: Callable[..., tuple[Any, Logs]], reset: Callable[[Any], Any]) -> tuple[Any, Any, dict[Any, int]]:
    """Returns one step, a program of several steps that gathers their batches, and an empty cache of capacities by signature."""
    train_step = jax.jit(rewrite(train))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_steps(
        state: Any, source: PyTree, batches: Any, positions: Any, count: Any, at_epoch_start: Any
    ) -> tuple[Any, Logs, Logs | None]:
        state = jax.tree.map(lambda new, old: new if new is old else jnp.where(at_epoch_start, new, old), reset(state), state)
        if positions is None:
            return *train_step(state, batches if source is None else gather_separately(source, batches)), None

        def select(stacked: Any, i: Any) -> Any:
            batch = batch_at(stacked[1], i)
            return batch if source is None else take_rows(source, batch)

        # The positions provide an axis to loop over if a batch has no leaves.
        state, all_logs = fuse(without_hoisting(train_step), select)(state, (positions, batches), count)
        return state, jax.tree.map(lambda logs: logs[count - 1], all_logs), all_logs

    return train_step, train_steps, {}


class _Observing(NamedTuple):
    """A training step, a function of its observations, and their program, once there is one."""

    train: Step[Any]
    function: Observe
    programs: list[Any]


def _observe_program(learner: Learner, function: Observe) -> Any:
    train, function, programs = _observed(learner.train)(function)
    if not programs:
        scalars = rewrite(observed_scalars(train, learner.names, function))

        @jax.jit
        def observe(state: Any, source: PyTree, batches: Any, positions: Any) -> dict[str, Any]:
            batch = batches if positions is None else batch_at(batches, 0)
            return scalars(state, batch if source is None else take_rows(source, batch))

        programs.append(observe)
    return programs[0]


def _evaluate_step(evaluate: Callable[..., tuple[Any, Logs]]) -> Callable[..., tuple[Any, Logs]]:
    evaluate = rewrite(evaluate)

    def evaluate_step(state: Any, source: PyTree, batch: Any) -> tuple[Any, Logs]:
        return evaluate(state, batch if source is None else gather_separately(source, batch))

    return evaluate_step


def _predict_step(predict: Callable[[Any, Any], PyTree]) -> Callable[[Any, Any], PyTree]:
    return jax.jit(rewrite(predict))


# Compiled apart from the step that uses the rows, which then rounds as it does on a batch from the host.
gather_separately = rewrite(take_rows, rule=separate_gathers)


def _source(data: Batches) -> PyTree:
    """Returns the shapes of the data on the device, or None if it stays on the host."""
    if data.resident is None:
        return None
    sharding = data.resident.sharding
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((data.examples, *leaf.shape[1:]), leaf.dtype, sharding=sharding), data.shapes
    )


def _batch(data: Batches) -> PyTree:
    """Returns the shapes of a step's input: row indices if the data is on the device, otherwise the batch."""
    if data.resident is None:
        return data.shapes
    return jax.ShapeDtypeStruct((jax.tree.leaves(data.shapes)[0].shape[0],), np.int32)


_trained = weak_cache(lambda train: weak_cache(lambda reset: _train_programs(train, reset)))
_observed = weak_cache(lambda train: weak_cache(lambda function: _Observing(train, function, [])))
_evaluated = weak_cache(_evaluate_step)
_predicted = weak_cache(_predict_step)
_without_copies = weak_cache(lambda function: _FunctionPrograms(function, {}))

"""A learner's functions as compiled programs: one for each, however often and from wherever it is called."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from research.data import Batches, take
from research.feed import kind, loopable
from research.kernels import rewritten
from research.measures import Logs
from research.state import Refused
from research.step import Learner
from research.transforms import fuse, loops_well

P = ParamSpec("P")
T = TypeVar("T")

FUSED_STEPS = 512  # at most so many steps in one program where their data is on the device,
STACKED_STEPS = 32  # where batches are put side by side on the host,
STACKED_BYTES = 1 << 17  # and only for batches up to this size: copying larger ones would cost more than is gained
LOG_BYTES = 1 << 20  # of all steps' logs that one program may hold


class Training(NamedTuple):
    """A learner's training program: (state, source, batches, slots, count, anew) -> (state, last logs, each step's logs).

    With slots None it is one step, and there are no logs of each. Metrics are reset before it where `anew` says so. `capacity`:
    the number of slots that serve it best.
    """

    program: Any
    capacity: int


def training(learner: Learner, data: Batches, state: Any) -> Training:
    """The program that trains a learner on such data, not compiled yet. It donates the state.

    Steps are fused where it is of use: not where a convolution would run in a loop on the CPU, nor where a batch comes from the
    host and is large. Raises `Refused` where a batch does not fit the learner.
    """
    step, program, known = _trained(learner.train)(learner.reset)
    source, batch = _source(data), _batch(data)
    key = kind((state, source, batch))
    if key not in known:
        known[key] = _most(fitting(functools.partial(step.trace, state, source, batch), data), state, source, batch)
    return Training(program, min(known[key], data.steps_per_epoch))


def _most(traced: Any, state: Any, source: PyTree, batch: PyTree) -> int:
    """How many steps of a kind are best in one program, however long an epoch is."""
    after, logs = traced.out_info
    if not loops_well(traced) or kind(after) != kind(state) or not loopable(batch):
        return 1
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    spread = any(getattr(leaf, "sharding", None) is not None for leaf in jax.tree.leaves(batch))
    stacked = STACKED_STEPS if size <= STACKED_BYTES and not spread else 1
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(logs))
    return max(min(stacked if source is None else FUSED_STEPS, LOG_BYTES // max(held, 1)), 1)


def ahead(learner: Learner, data: Batches, state: Any) -> None:
    """Compiles the program that trains a learner on such data from shapes alone: training will find it done.

    The data may be loaded by another thread meanwhile. Raises `Refused` where a batch does not fit the learner.
    """
    program, capacity = training(learner, data, state)
    source, batch, slots = _source(data), _batch(data), None
    if capacity > 1:
        slots = np.arange(capacity, dtype=np.int32)
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((capacity, *leaf.shape), leaf.dtype), batch)
    program.lower(state, source, batch, slots, np.int32(1), np.True_).compile()


def evaluation(learner: Learner, state: Any, source: PyTree, batch: Any, data: Batches) -> Callable[..., tuple[Any, Logs]]:
    """The program that evaluates a learner on such a batch: (state, source, batch) -> (state, logs). Nothing is donated.

    Raises `Refused` where the batch does not fit the learner.
    """
    return fitting(functools.partial(sparing, _evaluated(learner.evaluate), state, source, batch), data)


def prediction(learner: Learner) -> Callable[[Any, Any], PyTree]:
    """The program that gives a learner's outputs: (state, batch) -> outputs."""
    return _predicted(learner.predict)


def fitting(trace: Callable[[], T], data: Batches) -> T:
    """Traces a program before anything is run: what does not fit shows here, as one line."""
    try:
        return trace()
    except Refused:
        raise
    except (TypeError, ValueError) as error:
        batch = jax.tree_util.tree_leaves_with_path(data.shapes)
        shapes = ", ".join(f"{jax.tree_util.keystr(path).strip('.')} {leaf.dtype}{list(leaf.shape)}" for path, leaf in batch)
        raise Refused(f"a batch does not fit the learner ({shapes}): {' '.join(str(error).split())}") from error


def kept(make: Callable[[Callable[..., Any]], T]) -> Callable[[Callable[..., Any]], T]:
    """Makes something of a function once, and keeps it for as long as the function lives.

    What is made must not hold the function itself: it is handed something that calls it.

    >>> made = kept(lambda function: jax.jit(lambda x: function(x)))
    >>> def double(x):
    ...     return 2 * x
    >>> made(double) is made(double), float(made(double)(2.0))
    (True, 4.0)
    """
    found: weakref.WeakKeyDictionary[Callable[..., Any], T] = weakref.WeakKeyDictionary()

    def of(function: Callable[..., Any]) -> T:
        if function not in found:
            alive = weakref.ref(function)

            @functools.wraps(function)
            def calling(*args: Any) -> Any:
                called = alive()
                assert called is not None
                return called(*args)

            del calling.__wrapped__
            found[function] = make(calling)
        return found[function]

    return of


def sparing(function: Callable[..., T], *args: Any) -> Callable[..., T]:
    """Compiles a function for arguments like `args` so that leaves it hands through are not copied.

    A result that is one of the arguments comes back as that very array: evaluating a model returns its weights, and copying
    them would cost more than many a batch. The same function and arguments of the same shapes give the same program.

    >>> import jax.numpy as jnp
    >>> weights, count = jnp.ones(1000), jnp.zeros(())
    >>> program = sparing(lambda weights, count: (weights, count + 1), weights, count)
    >>> same, moved = program(weights, count)
    >>> same is weights, float(moved)
    (True, 1.0)
    """
    leaves, structure = jax.tree.flatten(args)
    known, kind = _spared(function), (structure, tuple(jax.typeof(leaf) for leaf in leaves))
    if kind not in known.programs:
        known.programs[kind] = _sparing(known.function, args)
    return known.programs[kind]


class _Spared(NamedTuple):
    function: Callable[..., Any]
    programs: dict[Any, Callable[..., Any]]


def _sparing(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    positions = {variable: i for i, variable in enumerate(closed.jaxpr.invars)}
    handed = [positions.get(v) if isinstance(v, jax.extend.core.Var) else None for v in closed.jaxpr.outvars]
    structure = jax.tree.structure(shapes)
    flat = jax.extend.core.jaxpr_as_fun(closed)

    def changing(*leaves: Any) -> list[Any]:
        return [out for out, i in zip(flat(*leaves), handed, strict=True) if i is None]

    changing.__name__ = function.__name__
    program = jax.jit(changing)

    def call(*args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        moved = iter(program(*leaves))
        return jax.tree.unflatten(structure, [next(moved) if i is None else leaves[i] for i in handed])

    return call


def _train_programs(train: Callable[..., tuple[Any, Logs]], reset: Callable[[Any], Any]) -> tuple[Any, Any, dict[Any, int]]:
    """A step with its batch gathered; as many as are asked for in one program; and how many are best, by kinds of arguments."""
    train = rewritten(train)

    @jax.jit
    def train_step(state: Any, source: PyTree, batch: Any) -> tuple[Any, Logs]:
        return train(state, batch if source is None else take(source, batch))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_steps(state: Any, source: PyTree, batches: Any, slots: Any, count: Any, anew: Any) -> tuple[Any, Logs, Logs | None]:
        state = jax.tree.map(lambda new, old: new if new is old else jnp.where(anew, new, old), reset(state), state)
        if slots is None:
            return *train_step(state, source, batches), None
        # Slots come along so that there is an axis to go over where a batch is nothing at all.
        state, each = fuse(lambda s, b: train_step(s, source, b[1]))(state, (slots, batches), count)
        return state, jax.tree.map(lambda logs: logs[count - 1], each), each

    return train_step, train_steps, {}


def _evaluate_step(evaluate: Callable[..., tuple[Any, Logs]]) -> Callable[..., tuple[Any, Logs]]:
    evaluate = rewritten(evaluate)

    def evaluate_step(state: Any, source: PyTree, batch: Any) -> tuple[Any, Logs]:
        return evaluate(state, batch if source is None else take(source, batch))

    return evaluate_step


def _predict_step(predict: Callable[[Any, Any], PyTree]) -> Callable[[Any, Any], PyTree]:
    return jax.jit(rewritten(predict))


def _source(data: Batches) -> PyTree:
    """The shapes of what is kept on the device; None where nothing is."""
    if data.resident is None:
        return None
    kept = data.resident.sharding
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((data.examples, *leaf.shape[1:]), leaf.dtype, sharding=kept), data.shapes
    )


def _batch(data: Batches) -> PyTree:
    """The shapes of what a step is handed: row numbers, or the batch itself."""
    if data.resident is None:
        return data.shapes
    return jax.ShapeDtypeStruct((jax.tree.leaves(data.shapes)[0].shape[0],), np.int32)


_trained = kept(lambda train: kept(lambda reset: _train_programs(train, reset)))
_evaluated = kept(_evaluate_step)
_predicted = kept(_predict_step)
_spared = kept(lambda function: _Spared(function, {}))

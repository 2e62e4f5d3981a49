"""The values that training threads through its programs, how they are born, named, and given back to Keras."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import Array, Bool, PyTree

S = TypeVar("S", covariant=True)


class Refused(ValueError):
    """Something handed in can't work. Its message is one line: what, where, what was expected, what to do."""


class State(NamedTuple):
    """Everything that a step changes: arrays only, lists in Keras' order.

    `optimizer` holds what an `Update` keeps: a list for Keras, `{"iterations", "transform"}` for optax. Counts and learning
    rates live there, random seeds in `non_trainable`.

    >>> State([jnp.ones(2)], [], [], {}).trainable
    [Array([1., 1.], dtype=float32)]
    """

    trainable: PyTree
    non_trainable: PyTree
    optimizer: PyTree
    metrics: dict[str, list[Any]]


class Batch(NamedTuple):
    """What a supervised learner takes: examples along the first axis of every leaf.

    `valid` tells padding (False) from examples; it is absent where there is no padding.

    >>> Batch(x=jnp.zeros((4, 2)), y=jnp.zeros(4)).valid is None
    True
    """

    x: PyTree
    y: PyTree = None
    sample_weight: PyTree = None
    valid: Bool[Array | np.ndarray, " batch"] | None = None


@runtime_checkable
class Initialised(Protocol[S]):
    """Whatever can make its own initial state; every `Learner` can."""

    @property
    def init(self) -> Callable[[], S]:
        """The initial state."""
        ...


L = TypeVar("L", bound=Initialised[Any])


def rows(x: PyTree) -> int:
    """The number of examples in a batch's inputs: the first axis of the first leaf, as Keras counts it.

    >>> rows({"a": None, "b": jnp.zeros((3, 5))})
    3
    """
    return int(jax.tree.leaves(x)[0].shape[0])


def parameters(state: PyTree) -> int:
    """The number of trainable numbers in a state, or in all the `State`s that a larger one holds.

    >>> parameters({"gan": (State([jnp.ones((2, 3))], [], [], {}), State([jnp.ones(4)], [], [], {}))})
    10
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, State))
    held = [leaf for node in nodes if isinstance(node, State) for leaf in jax.tree.leaves(node.trainable)]
    return sum(leaf.size for leaf in held)


def abstract(build: Callable[[], L]) -> tuple[L, PyTree]:
    """Runs a builder for its shapes alone: no array is made, however large the model.

    Returns the learner and its state as `jax.ShapeDtypeStruct`s. The learner is whole: its functions take any state of these
    shapes. The Keras objects behind it hold no values until `write_back`. A model with constants that were computed while it was
    built (`keras.ops.arange(10)` in a functional one) is built anew where one of its functions is traced.

    >>> import research
    >>> def build():
    ...     model = keras.Sequential([keras.Input((1_000_000,)), keras.layers.Dense(10_000)])
    ...     return research.supervised(model, loss="mse", optimizer="adam")
    >>> learner, shapes = abstract(build)
    >>> parameters(shapes)
    10000010000
    """
    learners: list[L] = []

    def init() -> PyTree:
        learners.append(build())
        return learners[0].init()

    shapes = jax.eval_shape(init)
    return _rebuilt(learners[0], build), shapes


def _rebuilt(learner: L, build: Callable[[], L]) -> L:
    """The same learner; its functions are a new one's where constants were lost with the trace that it was built in."""
    fields: dict[str, Any] = cast(Any, learner)._asdict() if isinstance(learner, tuple) else {}
    whole: dict[str, bool] = {}

    def surviving(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name not in whole:
                consts = jax.make_jaxpr(fields[name])(*args).consts
                whole[name] = not any(isinstance(const, jax.core.Tracer) for const in consts)
            return (fields[name] if whole[name] else getattr(build(), name))(*args)

        return call

    changed = {name: surviving(name) for name, held in fields.items() if callable(held)}
    return cast(Any, learner)._replace(**changed) if changed else learner


def born(build: Callable[[], L], shardings: PyTree | Callable[[PyTree], PyTree]) -> tuple[L, PyTree]:
    """Builds a learner whose initial state comes into being where it is to live, never whole in one place.

    `shardings` is a sharding, a tree of them that is a prefix of the state, or a function from the state's shapes to one. The
    builder runs twice (for shapes, then inside `jax.jit(..., out_shardings=...)`), so it must draw its randomness from what it
    sets itself: call `keras.utils.set_random_seed(seed)` in it.

    >>> import research
    >>> def build():
    ...     keras.utils.set_random_seed(0)
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> learner, state = born(build, device)
    >>> state.trainable[0].shape, state.trainable[0].sharding == device
    ((4, 2), True)
    """
    learner, shapes = abstract(build)
    if callable(shardings):
        shardings = shardings(shapes)
    return learner, jax.jit(lambda: build().init(), out_shardings=shardings)()


def values(variables: Iterable[keras.Variable]) -> list[Array]:
    """Copies of what Keras variables hold: a program may then donate them and leave the Keras object whole.

    >>> variable = keras.Variable([1.0, 2.0])
    >>> values([variable])[0] is variable.value
    False
    """
    return _copies([variable.value for variable in variables])


def layer_metrics(model: keras.Model) -> list[keras.Metric]:
    """The metrics that layers of a model own, without those that `model.compile` made.

    >>> layer_metrics(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    []
    """
    return list(keras.Layer.metrics.fget(model))


def unique(names: Iterable[str]) -> list[str]:
    """The same names with `_1`, `_2`, ... behind those that stood before, as Keras numbers repeated metrics.

    >>> unique(["mse", "mae", "mse"])
    ['mse', 'mae', 'mse_1']
    """
    taken: dict[str, int] = {}
    result = []
    for name in names:
        candidate = name
        while candidate in taken:
            taken[name] += 1
            candidate = f"{name}_{taken[name]}"
        taken[candidate] = 0
        result.append(candidate)
    return result


def model_metrics(model: keras.Model) -> dict[str, list[keras.Variable]]:
    """The metrics of a compiled model in `model.metrics`' order: unique name -> variables.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> {name: len(variables) for name, variables in model_metrics(model).items()}
    {'loss': 2}
    """
    metrics = model.metrics
    return dict(zip(unique(m.name for m in metrics), (list(m.variables) for m in metrics), strict=True))


def write_back(state: State, model: keras.Model, optimizer: keras.Optimizer | None = None) -> None:
    """Gives a state's values to the Keras objects they came from: copies, so that training may go on and donate its own.

    Weights and seeds always; the optimizer's variables where one is given; metrics where the model has them under the same name
    (it was compiled, or its layers own them). Raises `Refused` where the state is not this model's.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> write_back(State([jnp.full((1, 1), 7.0)], [], [], {}), model)
    >>> float(model.trainable_variables[0].value[0, 0])
    7.0
    """
    assignments = [
        ("trainable", model.trainable_variables, state.trainable),
        ("non_trainable", model.non_trainable_variables, state.non_trainable),
    ]
    if optimizer is not None:
        assignments.append(("optimizer", optimizer.variables, state.optimizer))
    if state.metrics:
        owned = model_metrics(model)
        assignments += [(f"metric {name}", owned[name], held) for name, held in state.metrics.items() if name in owned]
    for part, variables, arrays in assignments:
        if [tuple(v.shape) for v in variables] != [tuple(a.shape) for a in arrays]:
            raise Refused(
                f"write_back: {part} of the state does not fit {model.name!r}: {len(arrays)} arrays for {len(variables)} "
                "variables, or other shapes; expected the model (and optimizer) that the learner was built from."
            )
    for _, variables, arrays in assignments:
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(jnp.array(array, copy=True))


def variable_names(variables: Sequence[keras.Variable]) -> list[str]:
    """A name for each variable from its position in the model: the same in every process and for every copy of the model.

    `Variable.path` is not: Keras numbers unnamed layers per process (`sequential_1/dense_2`). Here those numbers are counted
    again among siblings, and names that somebody chose stay.

    >>> def build():
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head_7")])
    >>> variable_names(build().variables) == variable_names(build().variables)
    True
    >>> variable_names(build().variables)
    ['sequential/dense/kernel', 'sequential/dense/bias', 'sequential/head_7/kernel', 'sequential/head_7/bias']
    """
    automatic = _automatic_bases()
    children: dict[str, dict[str, str]] = {}  # renamed parent -> original component -> renamed component
    names = []
    for variable in variables:
        parent = ""
        for component in variable.path.split("/"):
            siblings = children.setdefault(parent, {})
            if component not in siblings:
                base = re.sub(r"_\d+$", "", component)
                siblings[component] = unique([*siblings.values(), base if base in automatic else component])[-1]
            parent = f"{parent}/{siblings[component]}" if parent else siblings[component]
        names.append(parent)
    return unique(names)


def slot_names(optimizer: keras.Optimizer, variables: Sequence[keras.Variable]) -> list[str]:
    """A name for each of a Keras optimizer's variables: what it is, and of which trainable variable, by the latter's name.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    >>> optimizer = keras.optimizers.Adam()
    >>> optimizer.build(model.trainable_variables)
    >>> slot_names(optimizer, model.trainable_variables)
    ['iteration', 'learning_rate', 'momentum/sequential/dense/kernel', 'velocity/sequential/dense/kernel']
    """
    # Keras names a slot after its variable's path with "_" for "/"; the longest path that fits is the variable's own.
    owners = sorted(
        zip((v.path.replace("/", "_") for v in variables), variable_names(variables), strict=True),
        key=lambda owner: -len(owner[0]),
    )
    names = []
    for variable in optimizer.variables:
        owner = next((o for o in owners if variable.name.startswith(f"{o[0]}_")), None)
        names.append(variable.name if owner is None else f"{variable.name[len(owner[0]) + 1 :]}/{owner[1]}")
    return unique(names)


def _automatic_bases() -> set[str]:
    """What Keras may have named an unnamed object: every loaded class' own name in snake case."""
    bases: set[str] = set()
    pending: list[type] = [keras.Layer, keras.Metric, keras.Optimizer, keras.random.SeedGenerator, keras.Variable]
    while pending:
        cls = pending.pop()
        name = re.sub(r"\W+", "", cls.__name__)
        name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
        bases.add(re.sub("([a-z])([A-Z])", r"\1_\2", name).lower())
        pending += cls.__subclasses__()
    return bases


def mapped(pairs: Iterable[tuple[Sequence[keras.Variable], Sequence[Array]]]) -> list[tuple[keras.Variable, Array]]:
    """Variables beside the arrays that stand for them: what `keras.StatelessScope` takes.

    >>> mapped([([], [])])
    []
    """
    return [pair for variables, arrays in pairs for pair in zip(variables, arrays, strict=True)]


def current(scope: keras.StatelessScope, variables: Sequence[keras.Variable], before: Sequence[Array]) -> list[Array]:
    """What variables are inside a scope: the array assigned there, or the one from `before`. Never a Keras variable.

    >>> variable = keras.Variable(1.0)
    >>> with keras.StatelessScope() as scope:
    ...     _ = variable.assign(2.0)
    >>> float(current(scope, [variable], [variable.value])[0]), float(variable.value)
    (2.0, 1.0)
    """
    found = [scope.get_current_value(v) for v in variables]
    return [jnp.asarray(a if f is None else f) for f, a in zip(found, before, strict=True)]


def in_order(metrics: Mapping[str, Sequence[Array]], names: Iterable[str]) -> list[Array]:
    """The arrays of a metrics dictionary in the order of `names`: JAX sorts a dictionary's keys, Keras does not.

    >>> [int(array) for array in in_order({"b": [jnp.array(2)], "a": [jnp.array(1)]}, ["b", "a"])]
    [2, 1]
    """
    return [array for name in names for array in metrics[name]]


@jax.jit  # one program for all of them: compiling one for each shape takes longer than all the rest of a start
def _copies(arrays: list[Array]) -> list[Array]:
    return [jnp.array(array, array.dtype, copy=True) for array in arrays]  # a dtype said: a weak type would compile twice

"""The values that training threads through its programs, and how Keras variables map to them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import Array, Bool, PyTree

Mapped = list[tuple[keras.Variable, Any]]  # what `keras.StatelessScope` takes: variables and the arrays that stand for them


SEED_STRIDE = 0x9E3779B9  # between the seeds of two parts of a batch: 2^32 over the golden ratio


class InvalidArgument(ValueError):
    """Raised for an argument that cannot work. Its message is one line: what, where, what was expected, what to do.

    >>> issubclass(InvalidArgument, ValueError)
    True
    """


def check_type(value: Any, kind: Any, what: str, expected: str) -> None:
    """Raises `InvalidArgument` unless a value is of a type, or of one of a tuple of types.

    >>> check_type(3, keras.Layer, "part: the model", "a keras.Model")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: part: the model is an int, expected a keras.Model.
    """
    if not isinstance(value, kind):
        raise InvalidArgument(f"{what} is {type_name(value)}, expected {expected}.")


def type_name(value: Any) -> str:
    """Returns the type of a value with its article, for messages.

    >>> type_name(3), type_name(keras.Sequential()), type_name(np.zeros(2)), type_name(None)
    ('an int', 'a Sequential', 'an array', 'None')
    """
    if value is None:
        return "None"
    name = "array" if hasattr(value, "shape") and hasattr(value, "dtype") else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


class State(NamedTuple):
    """Everything that a training step changes: arrays only, as lists in Keras' order.

    `optimizer` is what `Update.init` returns: a list for a Keras optimizer, `{"iterations", "transform"}` for optax. Step counts
    and learning rates are part of it. Random seeds are part of `non_trainable`.

    >>> State([jnp.ones(2)], [], [], {}).trainable
    [Array([1., 1.], dtype=float32)]
    """

    trainable: PyTree
    non_trainable: PyTree
    optimizer: PyTree
    metrics: dict[str, list[Any]]


class Batch(NamedTuple):
    """The input of a supervised learner. The first axis of every leaf counts examples.

    `valid` is False for padding; None means that every row is an example.

    >>> Batch(x=jnp.zeros((4, 2)), y=jnp.zeros(4)).valid is None
    True
    """

    x: PyTree
    y: PyTree = None
    sample_weight: PyTree = None
    valid: Bool[Array | np.ndarray, " batch"] | None = None


def num_rows(x: PyTree) -> int:
    """Returns the size of the first axis of the first leaf, which is how Keras counts the examples of a batch.

    >>> num_rows({"a": None, "b": jnp.zeros((3, 5))})
    3
    """
    return int(jax.tree.leaves(x)[0].shape[0])


def states_in(tree: PyTree) -> list[State]:
    """Returns every `State` inside a larger state, in tree order.

    >>> states_in({"actor": State([], [], [], {}), "key": jnp.zeros(2)})
    [State(trainable=[], non_trainable=[], optimizer=[], metrics={})]
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, State))
    return [node for node in nodes if isinstance(node, State)]


def count_parameters(state: PyTree) -> int:
    """Returns how many trainable numbers a state holds: the `trainable` part of every `State` in it.

    In a state without any `State` nothing tells weights from optimizer slots, so every floating-point number counts.

    >>> count_parameters({"gan": (State([jnp.ones((2, 3))], [], [], {}), State([jnp.ones(4)], [], [], {}))})
    10
    >>> count_parameters({"kernel": jnp.ones((2, 3)), "step": jnp.zeros((), int)})
    6
    """
    states = states_in(state)
    if states:
        return sum(leaf.size for node in states for leaf in jax.tree.leaves(node.trainable))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))


def copy_values(variables: Iterable[keras.Variable]) -> list[Array]:
    """Returns copies of the values of Keras variables, so that donating them does not delete what the Keras object holds.

    >>> variable = keras.Variable([1.0, 2.0])
    >>> copy_values([variable])[0] is variable.value
    False
    """
    copies: list[Array] = _copies([variable.value for variable in variables])
    return copies


def copy_leaves(tree: PyTree) -> PyTree:
    """Returns a tree of arrays with each leaf copied: no two leaves of the result share a buffer, so that it can be donated.

    >>> array = jnp.ones(2)
    >>> first, second = copy_leaves((array, array))
    >>> first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()
    False
    """
    return _copies(tree)


def as_shapes(tree: PyTree) -> PyTree:
    """Returns arrays as `jax.ShapeDtypeStruct`s, with the dtypes that JAX gives them.

    >>> as_shapes({"x": jnp.ones((2, 3)), "y": None})
    {'x': ShapeDtypeStruct(shape=(2, 3), dtype=float32), 'y': None}
    """
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(a.dtype)), tree)


def is_seed(leaf: Any) -> bool:
    """Returns whether a leaf of `State.non_trainable` has the form of a `keras.random.SeedGenerator`'s state.

    >>> is_seed(keras.random.SeedGenerator(0).state.value)
    True
    """
    return leaf.shape == (2,) and leaf.dtype == jnp.uint32


def seed_of_part(seed: Any, index: Any) -> Array:
    """Returns the seed with which part `index` of a batch draws its own random numbers; part 0 draws those of `seed`.

    >>> seed_of_part(jnp.array([1, 5], jnp.uint32), 0).tolist(), seed_of_part(jnp.array([1, 5], jnp.uint32), 2).tolist()
    ([1, 5], [1013904243, 5])
    """
    return seed.at[0].add(jnp.asarray(index, seed.dtype) * jnp.asarray(SEED_STRIDE, seed.dtype))


def layer_metrics(model: keras.Layer) -> list[keras.Metric]:
    """Returns the metrics that a model's layers own, without those that `model.compile` made.

    >>> layer_metrics(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    []
    """
    return list(keras.Layer.metrics.fget(model))


def scope_mapping(pairs: Iterable[tuple[Sequence[keras.Variable], Sequence[Any]]]) -> Mapped:
    """Returns (variable, array) pairs for `keras.StatelessScope` from (variables, arrays) pairs.

    >>> scope_mapping([([], [])])
    []
    """
    return [pair for variables, arrays in pairs for pair in zip(variables, arrays, strict=True)]


class SharedScope(keras.StatelessScope):
    """A `keras.StatelessScope` inside which variables of the scope around it keep their values there.

    `read` and `written` hold the variables whose values the code inside used or assigned, by id.

    >>> outer, inner = keras.Variable(1.0), keras.Variable(2.0)
    >>> with SharedScope([(outer, jnp.array(10.0))]), SharedScope([(inner, jnp.array(20.0))]) as scope:
    ...     float(outer + inner), id(outer) in scope.read, scope.written
    (30.0, True, {})
    """

    def __init__(self, state_mapping: Any = None, **options: Any) -> None:
        super().__init__(state_mapping, **options)
        self.read: dict[int, keras.Variable] = {}
        self.written: dict[int, keras.Variable] = {}

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Returns the variable's value in this scope, else in the scope around it, else None."""
        self.read[id(variable)] = variable
        value, outer = super().get_current_value(variable), self.original_scope
        return outer.get_current_value(variable) if value is None and outer is not None else value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Records an assignment."""
        self.written[id(update[0])] = update[0]
        super().add_update(update)


def current_values(scope: keras.StatelessScope, variables: Sequence[keras.Variable], before: Sequence[Array]) -> list[Array]:
    """Returns what variables hold inside a scope: the array assigned there, else the one from `before`.

    >>> variable = keras.Variable(1.0)
    >>> with keras.StatelessScope() as scope:
    ...     _ = variable.assign(2.0)
    >>> float(current_values(scope, [variable], [variable.value])[0]), float(variable.value)
    (2.0, 1.0)
    """
    assigned = [scope.get_current_value(variable) for variable in variables]
    return [jnp.asarray(old if new is None else new) for new, old in zip(assigned, before, strict=True)]


def ordered_values(metrics: Mapping[str, Sequence[Array]], names: Iterable[str]) -> list[Array]:
    """Returns the arrays of a metrics dictionary in the order of `names`: JAX sorts a dictionary's keys, Keras does not.

    >>> [int(array) for array in ordered_values({"b": [jnp.array(2)], "a": [jnp.array(1)]}, ["b", "a"])]
    [2, 1]
    """
    return [array for name in names for array in metrics[name]]


@jax.jit  # one program for all arrays: compiling one per shape would dominate the start of a run
def _copies(tree: PyTree) -> PyTree:  # explicit dtype: a weak type would compile twice
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), tree)

"""A training step under experiments: what its state consists of, and what its results depend on."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from research.core.learner import Learner
from research.core.objective import mask_of
from research.core.state import Batch, SharedScope, copy_leaves, states_in
from research.debugging.contexts import adding_losses

# Programs are compiled often and run once or twice here, and are compared with one another only.
_QUICK = {"xla_backend_optimization_level": 0}
GROUPS = ("weights", "seeds", "statistics", "slots", "metrics")


class Outcome(NamedTuple):
    """What a step returns, on the host: the leaves of the next state and the logs.

    >>> Outcome([np.ones(2)], {"loss": np.zeros(())}).logs
    {'loss': array(0.)}
    """

    leaves: list[np.ndarray]
    logs: dict[str, np.ndarray]


class Facts(NamedTuple):
    """What a model does with a batch when it is called on its own.

    `random` and `random_in_inference`: whether its outputs depend on its seeds. `statistics`: the variables that a training call
    changes and that only inference uses, as in BatchNormalization. `regularized`: whether a weight has a regularizer; `adds`:
    whether a layer calls `add_loss`, as activity regularizers do. `masks`: the Keras mask of each output, or None.

    >>> Facts(True, False, [], False, False, [None]).random
    True
    """

    random: bool
    random_in_inference: bool
    statistics: list[keras.Variable]
    regularized: bool
    adds: bool
    masks: list[np.ndarray | None]


class Probe:
    """A learner's step on its first batches, and experiments with it. Nothing is donated; Keras objects get their values back.

    `groups` has the positions of the state's leaves by what they are (`GROUPS`), `outside` the variables of the Keras objects
    that are in no leaf. Both are found by `Learner.state_mapping`, by the fields of each `State`, and otherwise by their values.
    `outcomes` and `states` are those of one step after the other, `traces` is how often that traced a program.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> probe = Probe(learner, learner.init(), [Batch(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))] * 2, [model])
    >>> probe.groups["weights"], probe.depends_on(probe.groups["weights"]), probe.traces
    ([0, 1], True, 1)
    """

    def __init__(self, learner: Learner, state: Any, batches: Sequence[Any], objects: Sequence[Any]) -> None:
        self.learner, self.state, self.batches, self.objects = learner, state, batches, objects
        self.before, self.structure = jax.tree.flatten(state)
        self.paths = [jax.tree_util.keystr(path) or "the state" for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        self.traces = 0
        self.programs = {name: jax.jit(self._counted(name), compiler_options=_QUICK) for name in ("train", "evaluate")}
        self.outside: dict[str, list[keras.Variable]] = {group: [] for group in GROUPS}
        self.groups, self.position = self._find_groups()
        self.states, self.outcomes = self._train()
        self.facts = [fact for fact in map(self._facts, self.models) if fact is not None]
        if not states_in(state):
            self._find_metrics()

    @property
    def models(self) -> list[keras.Layer]:
        """The models and layers among the objects."""
        return [each for each in self.objects if isinstance(each, keras.Layer) and each.built]

    def run(
        self, changes: Mapping[int, Any] | None = None, batch: Any = None, function: str = "train", program: Any = None
    ) -> Outcome:
        """Returns the outcome of a step from the initial state with other values of some leaves."""
        leaves = [(changes or {}).get(i, leaf) for i, leaf in enumerate(self.before)]
        program = program or self.programs[function]
        after, logs = program(jax.tree.unflatten(self.structure, leaves), self.batches[0] if batch is None else batch)
        return Outcome([to_host(leaf) for leaf in jax.tree.leaves(after)], {name: to_host(v) for name, v in logs.items()})

    def depends_on(self, positions: Iterable[int], function: str = "train") -> bool:
        """Returns whether other values of these leaves give other logs, or other values of the rest of the state."""
        changes = {i: changed(self.before[i]) for i in positions}
        return bool(changes) and differs(self.first(function), self.run(changes, function=function), without=changes)

    def first(self, function: str = "train") -> Outcome:
        """Returns the outcome of a step from the initial state on the first batch."""
        return self.outcomes[0] if function == "train" else self.run(function=function)

    def depends_outside(self, variables: Sequence[keras.Variable], function: str = "train") -> bool:
        """Returns whether other values of variables that are not in the state give another outcome: they are constants."""

        @contextlib.contextmanager
        def assigned() -> Iterator[None]:
            values = [np.array(v.value) for v in variables]
            for variable, value in zip(variables, values, strict=True):
                variable.assign(changed(value))
            try:
                yield
            finally:
                for variable, value in zip(variables, values, strict=True):
                    variable.assign(value)

        return bool(variables) and self.depends_in(assigned, function)

    def depends_in(self, context: Callable[[], Any], function: str = "train") -> bool:
        """Returns whether a step that is traced within a context has another outcome."""
        expected, step = self.first(function), getattr(self.learner, function)
        for again in (False, True):
            if again:
                jax.clear_caches()  # parts of it that are compiled already were not traced again
            with context():
                if differs(
                    expected, self.run(program=jax.jit(lambda s, b: step(s, b), compiler_options=_QUICK), function=function)
                ):
                    return True
        jax.clear_caches()
        return False

    def unchanged(self, positions: Iterable[int]) -> bool:
        """Returns whether all steps leave these leaves, if there are any, as they were."""
        found = list(positions)
        first = [to_host(self.before[i]) for i in found]
        same = all(same_bits(a, o.leaves[i]) for o in self.outcomes for a, i in zip(first, found, strict=True))
        return bool(found) and same

    def _counted(self, name: str) -> Callable[..., Any]:
        step = getattr(self.learner, name)

        def count(state: Any, batch: Any) -> Any:
            self.traces += name == "train"
            return step(state, batch)

        return count

    def _train(self) -> tuple[list[Any], list[Outcome]]:
        """Returns the states and outcomes of one step after the other, on the batches that have the first one's shapes."""
        state, states, outcomes = self.state, [], []
        for batch in self.batches:
            state, logs = self.programs["train"](state, batch)
            states.append(state)
            outcomes.append(Outcome([to_host(x) for x in jax.tree.leaves(state)], {k: to_host(v) for k, v in logs.items()}))
        return states, outcomes

    def _find_groups(self) -> tuple[dict[str, list[int]], dict[int, int]]:
        indices = jax.tree.unflatten(self.structure, range(len(self.before)))
        groups: dict[str, list[int]] = {group: [] for group in GROUPS}
        for node in states_in(indices):
            groups["weights"] += jax.tree.leaves(node.trainable)
            for i in jax.tree.leaves(node.non_trainable):
                groups["seeds" if _is_seed(self.before[i]) else "statistics"].append(i)
            groups["slots"] += jax.tree.leaves(node.optimizer)
            groups["metrics"] += jax.tree.leaves(node.metrics)
        position = {id(variable): i for variable, i in self.learner.state_mapping(indices)}
        for group, variables in variables_of(self.objects):
            unknown = [v for v in variables if id(v) not in position]
            free = [i for i in range(len(self.before)) if i not in position.values()]
            position |= match([self.before[i] for i in free], free, unknown)
            self.outside[group] += [v for v in unknown if id(v) not in position]
            known = {i for found in groups.values() for i in found}
            groups[group] += [position[id(v)] for v in variables if id(v) in position and position[id(v)] not in known]
        return groups, position

    def _find_metrics(self) -> None:
        """Finds the metrics among other leaves: floats on which logs depend, but no weights. What is left are slots."""
        known = {i for found in self.groups.values() for i in found}
        weights = {np.shape(self.before[i]) for i in self.groups["weights"]} - {()}
        expected = self.first()
        for i in range(len(self.before)):
            if i in known:
                continue
            is_metric = False
            if np.shape(self.before[i]) not in weights and jnp.issubdtype(jnp.result_type(self.before[i]), jnp.floating):
                actual = self.run({i: changed(self.before[i])})
                others = [j for j in range(len(self.before)) if j != i]
                logs = any(not same_bits(v, actual.logs[name]) for name, v in expected.logs.items())
                is_metric = logs and all(same_bits(expected.leaves[j], actual.leaves[j]) for j in others)
            self.groups["metrics" if is_metric else "slots"].append(i)

    def _facts(self, model: keras.Layer) -> Facts | None:
        """Returns what the model does with the first batch; None if it does not take the batch's inputs."""
        others = list(model.non_trainable_variables)
        values = [v.value for v in [*model.trainable_variables, *others]]
        count = len(values) - len(others)
        added: list[Any] = []

        def noted(loss: Any) -> Any:
            added.append(loss)
            return loss

        def call(values: list[Any], x: Any, training: bool) -> Any:
            mapping = list(zip([*model.trainable_variables, *others], values, strict=True))
            with adding_losses(noted), SharedScope(mapping, collect_losses=True) as scope:
                outputs = jax.tree.leaves(model(x, training=training))
                masks = [mask_of(output) for output in outputs]
                return outputs, [scope.get_current_value(v) for v in others], masks

        program = jax.jit(call, static_argnums=2, compiler_options=_QUICK)
        x = inputs_of(self.batches[0])
        try:
            _, after, masks = program(values, x, True)
        except Exception:  # of a model that takes something else, which the step makes of the batch
            return None

        def matters(positions: Sequence[int], training: bool) -> bool:
            other = [changed(value) if i - count in positions else value for i, value in enumerate(values)]
            pairs = zip(program(values, x, training)[0], program(other, x, training)[0], strict=True)
            return any(not same_bits(to_host(a), to_host(b)) for a, b in pairs)

        seeds = [i for i, v in enumerate(others) if _is_seed(v.value)]
        moved = [i for i, v in enumerate(others) if i not in seeds and not same_bits(to_host(v.value), to_host(after[i]))]
        return Facts(
            matters(seeds, True),
            matters(seeds, False),
            [others[i] for i in moved if not matters([i], True) and matters([i], False)],
            any(v.regularizer is not None for v in model.trainable_variables),
            bool(added),
            [None if mask is None else np.asarray(mask) for mask in masks],
        )


def variables_of(objects: Sequence[Any]) -> list[tuple[str, list[keras.Variable]]]:
    """Returns the variables of Keras objects as (group, variables), in the order in which a state usually has them.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), keras.layers.Dropout(0.5)])
    >>> [(group, len(variables)) for group, variables in variables_of([model])]
    [('weights', 2), ('seeds', 1), ('statistics', 0)]
    """
    found: list[tuple[str, list[keras.Variable]]] = []
    for each in objects:
        if isinstance(each, keras.Layer):
            others = each.non_trainable_variables
            found.append(("weights", list(each.trainable_variables)))
            found.append(("seeds", [v for v in others if v.dtype == "uint32"]))
            found.append(("statistics", [v for v in others if v.dtype != "uint32"]))
        elif isinstance(each, keras.random.SeedGenerator):
            found.append(("seeds", [each.state]))
        elif isinstance(each, keras.Optimizer | keras.Metric):
            found.append(("slots" if isinstance(each, keras.Optimizer) else "metrics", list(each.variables)))
    return found


def match(leaves: Sequence[Any], positions: Sequence[int], variables: Sequence[keras.Variable]) -> dict[int, int]:
    """Returns the position of the leaf that holds each variable's value, by the variable's id.

    That is a run of leaves in the variables' order if there is one, otherwise a leaf whose value no other leaf has.

    >>> a, b = keras.Variable([1.0]), keras.Variable([0.0])
    >>> list(match([jnp.zeros(1), jnp.ones(1), jnp.zeros(1)], [0, 1, 2], [a, b]).values())
    [1, 2]
    """
    host, values = [to_host(leaf) for leaf in leaves], [np.array(v.value) for v in variables]
    for start in range(len(host) - len(values) + 1 if values else 0):
        if all(same_bits(a, b) for a, b in zip(host[start:], values, strict=False)):
            return {id(v): positions[start + i] for i, v in enumerate(variables)}
    found: dict[int, int] = {}
    for variable, value in zip(variables, values, strict=True):
        equal = [position for position, leaf in zip(positions, host, strict=True) if same_bits(leaf, value)]
        if len(equal) == 1 and equal[0] not in found.values():
            found[id(variable)] = equal[0]
    return found


def inputs_of(batch: Any) -> Any:
    """Returns the inputs of a model in a batch: those of a `Batch`, or of Keras' (x, y, sample_weight).

    >>> inputs_of(Batch(3.0)), inputs_of((1.0, 2.0)), inputs_of(5.0)
    (3.0, 1.0, 5.0)
    """
    return batch.x if isinstance(batch, Batch) else keras.utils.unpack_x_y_sample_weight(batch)[0]


def changed(value: Any) -> Any:
    """Returns another value of the same shape and dtype; positive numbers stay positive.

    >>> changed(jnp.ones(2)).tolist(), changed(jnp.zeros((), jnp.int32)).item()
    ([1.375, 1.375], 1)
    """
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.fold_in(value, 1) if not value.ndim else value[::-1]
    array = np.asarray(value)
    if array.dtype == bool:
        return jnp.asarray(~array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(array + np.ones((), array.dtype))
    return jnp.asarray((array.astype(np.float64) * 1.25 + 0.125).astype(array.dtype))


def differs(a: Outcome, b: Outcome, without: Iterable[int] = ()) -> bool:
    """Returns whether two outcomes differ, apart from some leaves.

    >>> differs(Outcome([np.ones(1)], {}), Outcome([np.zeros(1)], {})), differs(Outcome([], {}), Outcome([], {}))
    (True, False)
    """
    skipped = set(without)
    leaves = any(not same_bits(x, y) for i, (x, y) in enumerate(zip(a.leaves, b.leaves, strict=True)) if i not in skipped)
    return leaves or any(not same_bits(value, b.logs[name]) for name, value in a.logs.items())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether arrays have the same shape, dtype and values; NaN equals NaN.

    >>> same_bits(np.array([np.nan]), np.array([np.nan])), same_bits(np.ones(1), np.ones(2))
    (True, False)
    """
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.all((a == b) | ((a != a) & (b != b))))


def to_host(leaf: Any) -> np.ndarray:
    """Returns a leaf as a NumPy array; of a typed key its data.

    >>> to_host(jax.random.key(3)).tolist()
    [0, 3]
    """
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else jnp.asarray(leaf))


def donates(step: Callable[..., Any], state: Any, batch: Any) -> bool:
    """Returns whether a step deletes the state that it is called with.

    >>> step = jax.jit(lambda state, batch: (state + batch, {}), donate_argnums=0)
    >>> donates(step, jnp.ones(2), 1.0), donates(lambda state, batch: (state, {}), jnp.ones(2), 1.0)
    (True, False)
    """
    own = copy_leaves(state)
    step(own, batch)
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(own))


def _is_seed(value: Any) -> bool:
    return np.dtype("uint32") == getattr(value, "dtype", None)

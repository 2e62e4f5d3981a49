"""Names for a state's leaves: the same in every process and for every copy of a model."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import keras
from jaxtyping import PyTree


def unique_names(names: Iterable[str]) -> list[str]:
    """Returns the names with `_1`, `_2`, ... appended to repetitions, as Keras numbers repeated metrics.

    >>> unique_names(["mse", "mae", "mse"])
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


def without_automatic_numbers(names: Iterable[str], metrics: Iterable[str]) -> list[str]:
    """Returns unique names of metrics without the numbers that Keras counts per process, as in `auc_7`.

    `metrics` are the metrics' own names; `names` are those or contain them, as in `score_auc_7` for the output `score`.

    >>> without_automatic_numbers(["loss", "auc_7", "score_auc_8", "auc_9"], ["loss", "auc_7", "auc_8", "auc_9"])
    ['loss', 'auc', 'score_auc', 'auc_1']
    """
    automatic = _automatic_bases()
    renamed = []
    for name, metric in zip(names, metrics, strict=True):
        before, _, after = name.rpartition(metric)
        base = re.sub(r"_\d+$", "", metric)
        renamed.append(f"{before}{base}{after}" if base in automatic else name)
    return unique_names(renamed)


def variable_names(variables: Sequence[keras.Variable]) -> list[str]:
    """Returns a name per variable from its position in the model: the same in every process and for every copy of the model.

    `Variable.path` is different: Keras numbers unnamed layers per process (`sequential_1/dense_2`). Here automatic numbers are
    counted again among siblings; names that the user chose stay.

    >>> def build():
    ...     return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2, name="head_7")])
    >>> variable_names(build().variables) == variable_names(build().variables)
    True
    >>> variable_names(build().variables)
    ['sequential/dense/kernel', 'sequential/dense/bias', 'sequential/head_7/kernel', 'sequential/head_7/bias']
    """
    return unique_names(renumbered_paths([variable.path for variable in variables]))


def renumbered_paths(paths: Iterable[str]) -> list[str]:
    """Returns paths with the automatic numbers of their components counted again, among siblings in order of appearance.

    >>> renumbered_paths(["model/dense_7/kernel", "model/dense_9/kernel", "model/head_9/kernel"])
    ['model/dense/kernel', 'model/dense_1/kernel', 'model/head_9/kernel']
    """
    automatic = _automatic_bases()
    children: dict[str, dict[str, str]] = {}  # renamed parent -> original component -> renamed component
    renamed = []
    for path in paths:
        parent = ""
        for component in path.split("/"):
            siblings = children.setdefault(parent, {})
            if component not in siblings:
                base = re.sub(r"_\d+$", "", component)
                siblings[component] = unique_names([*siblings.values(), base if base in automatic else component])[-1]
            parent = f"{parent}/{siblings[component]}" if parent else siblings[component]
        renamed.append(parent)
    return renamed


def slot_names(optimizer: keras.Optimizer, variables: Sequence[keras.Variable], names: Sequence[str] | None = None) -> list[str]:
    """Returns a name per variable of a Keras optimizer: the slot's own name, then the name of the weight that it belongs to.

    `names` are the names of the weights, by default `variable_names`.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    >>> optimizer = keras.optimizers.Adam()
    >>> optimizer.build(model.trainable_variables)
    >>> slot_names(optimizer, model.trainable_variables)
    ['iteration', 'learning_rate', 'momentum/sequential/dense/kernel', 'velocity/sequential/dense/kernel']
    """
    # Keras names a slot after its weight's path with "_" for "/"; the longest path that fits is the weight's own.
    names = variable_names(variables) if names is None else names
    weights = sorted(zip((v.path.replace("/", "_") for v in variables), names, strict=True), key=lambda weight: -len(weight[0]))
    found = []
    for variable in optimizer.variables:
        prefix, weight = next((w for w in weights if variable.name.startswith(f"{w[0]}_")), ("", None))
        found.append(variable.name if weight is None else f"{variable.name[len(prefix) + 1 :]}/{weight}")
    return unique_names(found)


def transform_names(slots: PyTree, variables: Sequence[keras.Variable], names: Sequence[str] | None = None) -> PyTree:
    """Returns names for the leaves of an `optax_update` state: the path of each, ending in its weight's name if it has one.

    `names` are the names of the weights, by default `variable_names`.

    >>> import optax
    >>> from research.core.update import optax_update
    >>> weights = [keras.Variable([1.0, 2.0], name="kernel")]
    >>> names = transform_names(jax.eval_shape(optax_update(optax.trace(0.9)).init, [v.value for v in weights]), weights)
    >>> names["iterations"], jax.tree.leaves(names["transform"])
    ('iterations', ['trace/kernel'])
    """
    weights = variable_names(variables) if names is None else names

    def name(path: tuple[Any, ...], leaf: Any) -> str:
        last = path[-1] if path else None
        position = last.idx if isinstance(last, jax.tree_util.SequenceKey) else len(weights)
        has_weight = position < len(weights) and leaf.shape == tuple(variables[position].shape)
        parent = jax.tree_util.keystr(path[:-1] if has_weight else path, simple=True, separator="/")
        return f"{parent}/{weights[position]}" if has_weight else parent

    return {"iterations": "iterations", "transform": jax.tree_util.tree_map_with_path(name, slots["transform"])}


def _automatic_bases() -> set[str]:
    """Returns the names that Keras gives to unnamed objects: every loaded class' name in snake case."""
    bases: set[str] = set()
    pending: list[type] = [keras.Layer, keras.Metric, keras.Optimizer, keras.random.SeedGenerator, keras.Variable]
    while pending:
        cls = pending.pop()
        name = re.sub(r"\W+", "", cls.__name__)
        name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
        bases.add(re.sub("([a-z])([A-Z])", r"\1_\2", name).lower())
        pending += cls.__subclasses__()
    return bases

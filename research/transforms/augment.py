"""Augmentation of batches inside of the compiled training step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import keras
from jaxtyping import Array

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.names import variable_names
from research.core.state import (
    Batch,
    InvalidArgument,
    Mapped,
    SharedScope,
    as_shapes,
    check_type,
    copy_values,
    current_values,
    num_rows,
    scope_mapping,
)
from research.transforms.from_loss import check_variables, variables_of


class AugmentedState(NamedTuple):
    """The state of a learner, and the values of the variables of its augmentation: seeds, above all.

    >>> AugmentedState(jnp.zeros(2), [jnp.array([3, 0], jnp.uint32)]).augmentation
    [Array([3, 0], dtype=uint32)]
    """

    state: Any
    augmentation: list[Array]


def augment(
    learner: Learner,
    augmentation: keras.Layer | Callable[..., Any],
    models: Any = (),
    *,
    example: Any,
) -> Learner:
    """Returns a learner whose batches are augmented on the device, inside of the step.

    `augmentation` is a Keras layer that is called on `batch.x`, such as a `keras.Sequential` of `RandomFlip`, `RandomRotation`
    and other preprocessing layers. Or it is a function `(batch, training) -> batch` in plain Keras code, for what changes targets
    too, and for batches of any kind; `models` lists the layers, `keras.random.SeedGenerator`s and `keras.Variable`s that it uses.
    In evaluation and prediction it is called with `training=False`, in which random layers of Keras return their input. Variables
    of the augmentation are not trained. Keras' `RandomCrop` and `RandomElasticTransform` can't be traced (Keras 3.15).

    Seeds are part of the state: a run that is resumed draws what it would have drawn, and each member of a population draws its
    own. Batches are drawn from as a complete batch: what an example gets does not depend on the number of devices. `example` is a
    batch or its `jax.ShapeDtypeStruct`s, for example `data.shapes`. Raises `InvalidArgument` for an augmentation that returns
    another number of examples, and for a variable that it uses but that belongs to nothing in `models`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    >>> shift = keras.Sequential([keras.layers.RandomFlip(seed=1), keras.layers.RandomTranslation(0.1, 0.1, seed=2)])
    >>> batch = research.Batch(jnp.ones((4, 8, 8, 1)), jnp.ones((4, 1)))
    >>> learner = augment(research.supervised(model, loss="mse"), shift, example=batch)
    >>> state = learner.init()
    >>> after, logs = jax.jit(learner.train)(state, batch)
    >>> [bool((a != b).any()) for a, b in zip(state.augmentation, after.augmentation)]
    [True, True]
    """
    check_type(learner, Learner, "augment: the learner", "a research.Learner: research.supervised(model, loss=...)")
    check_type(augmentation, Callable, "augment: the augmentation", "a keras.Layer, or a function (batch, training) -> batch")
    objects = [*models] if isinstance(models, list | tuple) else [models]
    if isinstance(augmentation, keras.Layer):
        objects, apply = [augmentation, *objects], _layer_on_x(augmentation)
    else:
        apply = augmentation
    _check_example(apply, example)
    variables = _variables(objects)

    def augmented(state: AugmentedState, batch: Any, training: bool) -> tuple[Any, list[Array]]:
        with SharedScope(scope_mapping([(variables, state.augmentation)]), collect_losses=True) as scope:
            batch = apply(batch, training=training)
            after = current_values(scope, variables, state.augmentation)
        advice = "add its layer, seed generator or variable to models"
        check_variables(scope, variables, "augment: the augmentation", "nothing in `models`", advice)
        return batch, after

    def train(state: AugmentedState, batch: Any) -> tuple[AugmentedState, Logs]:
        batch, after = augmented(state, batch, True)
        inner, logs = learner.train(state.state, batch)
        return AugmentedState(inner, after), logs

    def evaluate(state: AugmentedState, batch: Any) -> tuple[AugmentedState, Logs]:
        batch, after = augmented(state, batch, False)
        inner, logs = learner.evaluate(state.state, batch)
        return AugmentedState(inner, after), logs

    names: Any = [f"augmentation/{name}" for name in variable_names(variables)]

    def state_mapping(state: AugmentedState) -> Mapped:
        return [*learner.state_mapping(state.state), *scope_mapping([(variables, state.augmentation)])]

    return learner._replace(
        init=lambda: AugmentedState(learner.init(), copy_values(variables)),
        reset=lambda state: state._replace(state=learner.reset(state.state)),
        train=train,
        evaluate=evaluate,
        predict=lambda state, batch: learner.predict(state.state, augmented(state, batch, False)[0]),
        names=AugmentedState(learner.names, names),
        state_mapping=state_mapping,
        compile_args=None,
    )


def _layer_on_x(layer: keras.Layer) -> Callable[..., Batch]:
    def apply(batch: Batch, training: bool) -> Batch:
        check_type(batch, Batch, "augment: with a layer, a batch", "a research.Batch; pass a function (batch, training) -> batch")
        return batch._replace(x=layer(batch.x, training=training))

    return apply


def _check_example(apply: Callable[..., Any], example: Any) -> None:
    """Builds the layers of an augmentation, from shapes alone. Raises `InvalidArgument` if it changes the number of examples."""
    shapes, leaves_with_path = as_shapes(example), jax.tree.leaves_with_path
    for training in (True, False):
        with keras.StatelessScope():  # variables created in it get their values when it closes, outside the trace
            result = jax.eval_shape(lambda batch, training=training: apply(batch, training=training), shapes)
        if [path for path, _ in leaves_with_path(result)] != [path for path, _ in leaves_with_path(shapes)] or num_rows(
            result
        ) != num_rows(shapes):
            raise InvalidArgument(
                f"augment: of a batch {_describe(shapes)} the augmentation returned {_describe(result)}; expected a batch of the "
                "same structure with as many examples."
            )


def _describe(tree: Any) -> str:
    leaves = [str(tuple(leaf.shape)) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return f"{type(tree).__name__} of {', '.join(leaves)}" if leaves else type(tree).__name__


def _variables(objects: Sequence[Any]) -> list[keras.Variable]:
    found: list[keras.Variable] = []
    for item in objects:
        check_type(
            item, (keras.Layer, keras.random.SeedGenerator, keras.Variable), "augment: an entry of models",
            "a layer, a keras.random.SeedGenerator or a keras.Variable",
        )  # fmt: skip
        found += variables_of(item)
    return list({id(variable): variable for variable in found}.values())

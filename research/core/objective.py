"""What is minimised: a Keras model, its losses and its metrics as one pure function of state and batch."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import Array, Float, PyTree

from research.measures import Measures, compiled, flat_variables, measures, pack, shapes, without_padding
from research.state import Batch, Refused, State, current, in_order, mapped, rows


class Aux(NamedTuple):
    """What a forward pass leaves behind. Keras' masks hang on `outputs` only inside the trace that made them.

    `weight` is the denominator of the mean that the loss is: rows, unmasked positions, or the sum of sample weights.
    """

    outputs: PyTree
    non_trainable: PyTree
    metrics: dict[str, list[Array]]
    weight: Float[Array, ""]


@runtime_checkable
class Objective(Protocol):
    """A loss to minimise. Moves every metric on but the loss tracker, which moves once per update (`Measures.track`)."""

    def __call__(self, state: State, batch: Any, *, training: bool) -> tuple[Float[Array, ""], Aux]:
        """The loss of a batch and what computing it left behind."""
        ...


def keras_objective(
    model: keras.Model,
    *,
    loss: Any = None,
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
    example: Batch | None = None,
) -> tuple[Objective, Measures]:
    """The objective of a Keras model with whatever losses and metrics `model.compile` takes, and what measures it.

    The loss is Keras' own: compiled losses times `loss_weights`, plus the sum of regularizers and `add_loss`. `example` (a batch
    of arrays or of `jax.ShapeDtypeStruct`s) builds a model that has no shapes yet, and tells the targets' shapes where they
    are neither those of the outputs nor, under a sparse loss, those of the outputs without the last axis. Masks reach losses and
    metrics. `Batch.valid` masks losses and weights every compiled metric; one that a layer updates sees padding. Raises
    `Refused` for a model without trainable weights and for losses or metrics that Keras can't resolve.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, measures = keras_objective(model, loss="mse", metrics=["mae"])
    >>> state = State([v.value for v in model.trainable_variables], [], [], measures.init())
    >>> loss, aux = objective(state, Batch(jnp.ones((4, 2)), jnp.zeros((4, 1))), training=True)
    >>> float(loss), float(aux.weight), float(measures.result(aux.metrics)["mae"])
    (4.0, 4.0, 2.0)
    """
    built(model, example)
    of = compiled(
        model,
        loss=loss,
        metrics=metrics,
        weighted_metrics=weighted_metrics,
        loss_weights=loss_weights,
        example=example,
    )
    variables = flat_variables(of)
    metrics_without_padding = without_padding(of)

    def objective(state: State, batch: Batch, *, training: bool) -> tuple[Float[Array, ""], Aux]:
        before = in_order(state.metrics, of.variables)
        mapping = mapped(
            [
                (model.trainable_variables, state.trainable),
                (model.non_trainable_variables, state.non_trainable),
                (variables, before),
            ]
        )
        # Not `model.stateless_call`: it runs `call` alone, without what `__call__` adds (autocast, casts, masks, the activity
        # regularizer, a default for `training`), and maps no metric that a layer updates.
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            outputs = _mask_padding(model(batch.x, training=training), batch.valid)
            terms = [] if loss is None else [of.head.compute_loss(batch.x, batch.y, outputs, batch.sample_weight)]
            total = _sum([*terms, *map(_scalar, model.losses)])
            weight = _denominator(loss, outputs, batch)
            if batch.valid is None:
                of.head.compute_metrics(batch.x, batch.y, outputs, batch.sample_weight)
            after = pack(of, current(scope, variables, before))
            non_trainable = current(scope, model.non_trainable_variables, state.non_trainable)
        if batch.valid is not None:
            after = metrics_without_padding(state.metrics, after, batch, outputs)
        return total, Aux(outputs, non_trainable, after, weight)

    return objective, measures(of)


def forward(model: keras.Model, state: State, x: PyTree) -> PyTree:
    """A Keras model's outputs in inference mode, from a state's weights.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> float(forward(model, State([jnp.ones((2, 1)), jnp.ones(1)], [], [], {}), jnp.ones((1, 2)))[0, 0])
    3.0
    """
    weights = [
        (model.trainable_variables, state.trainable),
        (model.non_trainable_variables, state.non_trainable),
    ]
    with keras.StatelessScope(mapped(weights)):
        return model(x, training=False)


def built(model: keras.Model, example: Batch | None) -> None:
    """Gives a model its weights where an example can; raises `Refused` for one without any, or without any to train.

    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> built(model, Batch(jnp.ones((1, 2))))
    >>> model.count_params()
    3
    """
    if not model.built and example is not None:
        with keras.StatelessScope():  # variables made in it get their values when it closes, outside the trace
            jax.eval_shape(lambda x: model(x, training=False), shapes(example.x))
    if not model.built:
        raise Refused(
            f"model {model.name!r} has no weights yet: start it with keras.Input(shape), or pass example=Batch(x, y) "
            "with a batch of your data."
        )
    if not model.trainable_variables:
        raise Refused(
            f"model {model.name!r} has no trainable weights, so there is nothing to train: "
            "set trainable=True on the layers to train, or add layers that have weights."
        )


def _scalar(term: Array) -> Array:
    """A regularizer's or `add_loss`' value as `keras.Model.compute_loss` takes it."""
    return keras.ops.sum(term if jnp.issubdtype(term.dtype, jnp.floating) else keras.ops.cast(term, keras.config.floatx()))


def _sum(terms: list[Array]) -> Float[Array, ""]:
    if len(terms) == 1:
        return terms[0]
    return keras.ops.sum(terms) if terms else keras.ops.zeros(())


class _Masking(keras.Layer):
    """The same tensor, its mask less the rows that are padding: the one public way to read and to set Keras' masks."""

    valid: Array | np.ndarray | None = None
    previous: Array | None = None

    def call(self, inputs: Array) -> Array:
        return keras.ops.copy(inputs)

    def compute_mask(self, inputs: Array, previous_mask: Array | None = None) -> Array | None:
        self.previous = previous_mask
        if self.valid is None:
            return previous_mask
        like = jnp.ones(inputs.shape[: max(inputs.ndim - 1, 1)], bool) if previous_mask is None else previous_mask
        return jnp.asarray(self.valid).reshape(-1, *[1] * (like.ndim - 1)) & like.astype(bool)


def _mask_padding(outputs: PyTree, valid: Array | np.ndarray | None) -> PyTree:
    def masked(output: Array) -> Array:
        layer = _Masking()
        layer.valid = valid
        return layer(output)

    return outputs if valid is None else jax.tree.map(masked, outputs)


def _mask(output: Array) -> Array | None:
    layer = _Masking()
    layer(output)
    return layer.previous


def _denominator(loss: Any, outputs: PyTree, batch: Batch) -> Float[Array, ""]:
    """What the loss' mean is over. Several losses have no one denominator: rows stand for all of them."""
    losses = [each for each in keras.tree.flatten(loss) if each is not None]
    leaves = jax.tree.leaves(outputs)
    count = rows(batch.x) if batch.valid is None else jnp.sum(batch.valid)
    if len(losses) == 1 and len(leaves) == 1:
        mask = _mask(leaves[0])
        weighted = isinstance(losses[0], keras.Loss) and losses[0].reduction == "mean_with_sample_weight"
        if weighted and batch.sample_weight is not None:
            weight = jax.tree.leaves(batch.sample_weight)[0]
            if mask is not None:
                weight = weight.reshape(*weight.shape, *[1] * (mask.ndim - weight.ndim)) * mask.astype(weight.dtype)
            count = jnp.sum(weight)
        elif mask is not None:
            count = jnp.sum(mask)
    return jnp.asarray(count, jnp.float32)

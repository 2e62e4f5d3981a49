"""What training minimises: a Keras model, its losses and its metrics as one pure function of state and batch."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import Array, Float, PyTree

from research.core.metrics import Metrics, compile_metrics, metric_variables, pack_metrics, pure_metrics, skip_padding
from research.core.state import (
    Batch,
    InvalidArgument,
    SharedScope,
    State,
    as_shapes,
    check_type,
    current_values,
    num_rows,
    ordered_values,
    scope_mapping,
)


class Aux(NamedTuple):
    """Everything but the loss that a forward pass computes. Keras' masks are attached to `outputs` only inside their trace.

    `weight` is the denominator of the mean that the loss is: rows, unmasked positions, or the sum of sample weights.

    >>> Aux(None, [], {}, jnp.asarray(32.0)).weight.item()
    32.0
    """

    outputs: PyTree
    non_trainable: PyTree
    metrics: dict[str, list[Array]]
    weight: Float[Array, ""]


@runtime_checkable
class Objective(Protocol):
    """A loss to minimise. It updates every metric except the loss tracker, which counts updates (`Metrics.track_loss`).

    >>> isinstance(lambda state, batch, *, training: (jnp.zeros(()), None), Objective)
    True
    """

    def __call__(self, state: State, batch: Any, *, training: bool) -> tuple[Float[Array, ""], Aux]:
        """Returns the loss of a batch, and what else the forward pass computed."""


def keras_objective(
    model: keras.Model,
    *,
    loss: Any = None,
    metrics: Any = None,
    weighted_metrics: Any = None,
    loss_weights: Any = None,
    example: Batch | None = None,
) -> tuple[Objective, Metrics]:
    """Returns the objective of a Keras model with the losses and metrics that `model.compile` takes, and its metrics.

    The loss is Keras' own: compiled losses times `loss_weights`, plus the sum of regularizers and `add_loss`. `example` (a batch
    of arrays or `jax.ShapeDtypeStruct`s) is needed for a model without declared shapes, or a metric whose variables depend on
    targets; if given, losses and metrics are checked with it. What "accuracy" stands for is decided by the shapes of each batch,
    as in Keras. Masks reach losses and metrics. `Batch.valid` masks losses and weights every compiled metric; a metric
    that a layer updates counts padding too. Raises `InvalidArgument` for a model without trainable weights and for losses or
    metrics that Keras cannot resolve.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> objective, metrics = keras_objective(model, loss="mse", metrics=["mae"])
    >>> state = State([v.value for v in model.trainable_variables], [], [], metrics.init())
    >>> loss, aux = objective(state, Batch(jnp.ones((4, 2)), jnp.zeros((4, 1))), training=True)
    >>> float(loss), float(aux.weight), float(metrics.result(aux.metrics)["mae"])
    (4.0, 4.0, 2.0)
    """
    ensure_built(model, example)
    arguments = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics, "loss_weights": loss_weights}
    compiled = compile_metrics(model, example, **arguments)
    without_padding = skip_padding(compiled)
    in_layers = list(compiled.variables)[len(compiled.variables) - len(compiled.layer_metrics) :]
    layer_variables = metric_variables({name: compiled.variables[name] for name in in_layers})

    def objective(state: State, batch: Batch, *, training: bool) -> tuple[Float[Array, ""], Aux]:
        before = ordered_values(state.metrics, compiled.variables)
        groups = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
        mapping = scope_mapping([*groups, (layer_variables, ordered_values(state.metrics, in_layers))])
        # Not `model.stateless_call`: it runs `call` alone, without what `__call__` adds (autocast, casts, masks, the activity
        # regularizer, a default for `training`), and maps no metric that a layer updates.
        with SharedScope(mapping, collect_losses=True) as scope:
            outputs = _mask_padding(model(batch.x, training=training), batch.valid)
            resolved, tracked = compiled.resolve(batch.y, outputs)
            for variable, value in zip(tracked, before, strict=False):  # what follows belongs to layers, which have used it
                variable.assign(value)
            terms = [] if loss is None else [resolved.compute_loss(batch.x, batch.y, outputs, batch.sample_weight)]
            terms += map(_scalar, model.losses)
            if not terms:
                raise InvalidArgument(f"model {model.name!r} has nothing to minimise: pass loss=, or call add_loss in a layer.")
            total = keras.ops.sum(terms) if len(terms) > 1 else terms[0]
            weight = _denominator(loss, outputs, batch)
            if batch.valid is None:
                resolved.compute_metrics(batch.x, batch.y, outputs, batch.sample_weight)
            after = pack_metrics(compiled.variables, current_values(scope, [*tracked, *layer_variables], before))
            non_trainable = current_values(scope, model.non_trainable_variables, state.non_trainable)
        own = {id(variable) for variable in [*(variable for variable, _ in mapping), *tracked]}
        lost = next((variable.path for key, variable in scope.written.items() if key not in own), None)
        if lost is not None:
            raise InvalidArgument(
                f"model {model.name!r}: a layer or loss assigns to {lost!r}, which the model does not track: the value is lost; "
                "make it an attribute of one of its layers, or use research.learner and list it in models."
            )
        if batch.valid is not None:
            after = without_padding(state.metrics, after, batch, outputs)
        return total, Aux(outputs, non_trainable, after, weight)

    return objective, pure_metrics(compiled)


def forward(model: keras.Model, state: State, x: PyTree) -> PyTree:
    """Returns a Keras model's outputs in inference mode, with the weights of a state.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> float(forward(model, State([jnp.ones((2, 1)), jnp.ones(1)], [], [], {}), jnp.ones((1, 2)))[0, 0])
    3.0
    """
    weights = [(model.trainable_variables, state.trainable), (model.non_trainable_variables, state.non_trainable)]
    with keras.StatelessScope(scope_mapping(weights)):
        return model(x, training=False)


def ensure_built(model: keras.Model, example: Batch | None) -> None:
    """Builds a model from an example. Raises `InvalidArgument` if it is no model, has no weights, or none to train.

    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> ensure_built(model, Batch(jnp.ones((1, 2))))
    >>> model.count_params()
    3
    """
    check_type(model, keras.Layer, "the model", "a keras.Model")
    check_type(example, (Batch, type(None)), "example", "a batch of your data, as arrays or shapes: research.Batch(x, y)")

    def build(x: PyTree) -> None:
        model(x, training=False)  # what it returns is checked later, if it is used

    if not model.built and example is not None:
        with keras.StatelessScope():  # variables created in it get their values when it closes, outside the trace
            jax.eval_shape(build, as_shapes(example.x))
    if not model.built:
        raise InvalidArgument(
            f"model {model.name!r} has no weights yet: start it with keras.Input(shape), or pass example=Batch(x, y) "
            "with a batch of your data."
        )
    if not model.trainable_variables:
        raise InvalidArgument(
            f"model {model.name!r} has no trainable weights, so there is nothing to train: "
            "set trainable=True on the layers to train, or add layers that have weights."
        )


def _scalar(term: Array) -> Array:
    """Returns a regularizer's or `add_loss` value as `keras.Model.compute_loss` treats it."""
    return keras.ops.sum(term if jnp.issubdtype(term.dtype, jnp.floating) else keras.ops.cast(term, keras.config.floatx()))


class _Masking(keras.Layer):
    """Returns its input with padded rows masked out: the one public way to read and to set Keras' masks."""

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


def mask_of(output: Array) -> Array | None:
    """Returns the Keras mask that a layer attached to its output, if any.

    >>> mask_of(keras.layers.Masking()(jnp.array([[[1.0], [0.0]]]))).tolist()
    [[True, False]]
    """
    layer = _Masking()
    layer(output)
    return layer.previous


def _denominator(loss: Any, outputs: PyTree, batch: Batch) -> Float[Array, ""]:
    """Returns the denominator of the loss, a mean. Several losses have no common denominator: then it is the number of rows."""
    losses = [each for each in keras.tree.flatten(loss) if each is not None]
    leaves = jax.tree.leaves(outputs)
    count = num_rows(batch.x) if batch.valid is None else jnp.sum(batch.valid)
    if len(losses) == 1 and len(leaves) == 1:
        mask = mask_of(leaves[0])
        weighted = isinstance(losses[0], keras.Loss) and losses[0].reduction == "mean_with_sample_weight"
        if weighted and batch.sample_weight is not None:
            weight = jax.tree.leaves(batch.sample_weight)[0]
            if mask is not None:
                weight = weight.reshape(*weight.shape, *[1] * (mask.ndim - weight.ndim)) * mask.astype(weight.dtype)
            count = jnp.sum(weight)
        elif mask is not None:
            count = jnp.sum(mask)
    return jnp.asarray(count, jnp.float32)

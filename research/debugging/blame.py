"""Why a training step fails: the first layer with a NaN or an infinity, and the rows of the batch that cause it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.state import num_rows
from research.data.arrays import named_leaves
from research.debugging.instrument import Call, Instrumented, instrumented_step
from research.training.bad_steps import is_loss
from research.transforms.skip_nonfinite import loses_finite


class Blame(NamedTuple):
    """Where the first NaN or infinity of a step comes from.

    `place` is "output" (of the layer, the first in the order of calls), "loss" (no layer; all outputs are finite), "gradient"
    (the layer is the first of the backward pass that gives its inputs or weights one, while that of its outputs is finite), "loss
    gradient" (the layer is the one that gets it), "update" (the first variable that the optimizer spoils), or None if all is
    finite. `rows` are the rows that spoil a batch on their own, `batch` the non-finite arrays in the batch. `norms` has for each
    trainable variable the Euclidean norms of its weights before the step, of the gradient and of the update; NaN if unknown.

    >>> Blame("model/dense", "output", [3], [], {}, {}).describe()
    'the output of model/dense is the first that is not finite; rows that do it on their own: 3'
    """

    layer: str | None
    place: str | None
    rows: list[int]
    batch: list[str]
    norms: dict[str, dict[str, float]]
    logs: dict[str, Any]

    def describe(self) -> str:
        """Returns one line about it."""
        if self.place is None:
            return "all numbers of the step are finite"
        subject = {
            "output": f"the output of {self.layer} is the first that is not finite",
            "loss": "the loss is not finite, though all outputs are",
            "gradient": f"the gradient of {self.layer} is the first of the backward pass that is not finite",
            "loss gradient": f"the gradient of the loss with respect to the output of {self.layer} is not finite",
            "update": f"the optimizer makes {self.layer} not finite",
        }[self.place]
        rows = ", ".join(map(str, self.rows[:8])) + (f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else "")
        batch = f"; not finite in the batch: {', '.join(self.batch)}" if self.batch else ""
        return f"{subject}{batch}; rows that do it on their own: {rows or 'none'}"


def blame(learner: Learner, state: Any, batch: Any) -> Blame:
    """Returns why a step is not finite, given the state before it and its batch. The state is not donated.

    The step runs once more with all its layer calls recorded, and once for each row, with a batch of copies of that row. On a
    mesh, pass the learner and the state of one device.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="linear"), keras.layers.ReLU()], name="model")
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> x = np.ones((4, 2), np.float32)
    >>> x[1, 0] = np.inf
    >>> blame(learner, learner.init(), research.Batch(x, np.ones((4, 3), np.float32))).describe()
    'the output of model/linear is the first that is not finite; not finite in the batch: x; rows ...: 1'
    """
    return blame_of(learner, state, batch, instrumented_step(learner, state, batch))


def blame_of(learner: Learner, state: Any, batch: Any, step: Instrumented) -> Blame:
    """Returns what `blame` does, for a step that was recorded already."""
    layer, place = _first(learner, step)
    spoils = place is not None
    return Blame(
        layer,
        place,
        bad_rows(learner, state, batch) if spoils else [],
        [path for path, leaf in _leaves(batch) if _is_bad([leaf])],
        norms(learner, state, step),
        {name: np.asarray(value, float).tolist() for name, value in step.logs.items()},
    )


def bad_rows(learner: Learner, state: Any, batch: Any) -> list[int]:
    """Returns the rows that spoil the state on their own: in a batch that consists of copies of one of them.

    >>> import research
    >>> learner = research.supervised(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), loss="mse")
    >>> x, y = np.array([[1, 1], [np.nan, 1]], np.float32), np.ones((2, 1), np.float32)
    >>> bad_rows(learner, learner.init(), research.Batch(x, y))
    [1]
    """
    count = num_rows(batch)

    @jax.jit
    def spoils(state: Any, batch: Any, row: Any) -> Any:
        def copies(leaf: Any) -> Any:
            alike = np.ndim(leaf) > 0 and leaf.shape[0] == count
            return jnp.broadcast_to(jnp.take(leaf, row, axis=0), leaf.shape) if alike else leaf

        after, logs = learner.train(state, jax.tree.map(copies, batch))
        losses = [jnp.all(jnp.isfinite(value)) for name, value in logs.items() if is_loss(name)]
        return loses_finite(state, after) | ~jnp.all(jnp.array(losses, bool))

    return [row for row in range(count) if bool(spoils(state, batch, np.int32(row)))]


def norms(learner: Learner, state: Any, step: Instrumented) -> dict[str, dict[str, float]]:
    """Returns the norms of weights, gradient and update of each trainable variable, by its name; see `Blame`."""
    names = {id(variable): name for variable, name in learner.state_mapping(learner.names)}
    after = {id(variable): value for variable, value in learner.state_mapping(step.state)}
    table: dict[str, dict[str, float]] = {}
    for variable, before in learner.state_mapping(state):
        if not variable.trainable:
            continue
        old, new = (np.asarray(value, np.float64) for value in (before, after[id(variable)]))
        gradient = step.gradients.get(variable.path)
        with np.errstate(invalid="ignore", over="ignore"):
            table[names[id(variable)]] = {
                "weights": _norm(old),
                "gradient": np.nan if gradient is None else _norm(gradient),
                "update": _norm(new - old),
            }
    return table


def layer_name(learner: Learner, call: Call) -> str:
    """Returns the name of a layer call, with the automatic numbers of `learner.names` where the layer has variables."""
    path = getattr(call.layer, "path", None)
    names = {variable.path: name for variable, name in learner.state_mapping(learner.names)}
    own = [variable.path for variable in getattr(call.layer, "variables", []) if variable.path in names]
    own = [each for each in own if path and each.startswith(f"{path}/")]
    if not own or path is None:
        return call.name
    depth = own[0].removeprefix(path).count("/")
    return names[own[0]].rsplit("/", depth)[0] + call.name.removeprefix(path)


def _first(learner: Learner, step: Instrumented) -> tuple[str | None, str | None]:
    """Returns the layer to blame, and the place."""
    for call in step.calls:
        if _is_bad(call.outputs):
            return layer_name(learner, call), "output"
    if any(not np.isfinite(np.asarray(value)).all() for name, value in step.logs.items() if is_loss(name)):
        return None, "loss"
    guilty = [call for call in reversed(step.calls) if _spoils_gradient(call, step)]
    if guilty:
        inner = [call for call in guilty if not any(_is_inside(other, call) for other in guilty)]
        return layer_name(learner, (inner or guilty)[0]), "gradient"
    for call in reversed(step.calls):
        if _is_bad(call.output_gradients):
            return layer_name(learner, call), "loss gradient"
    for variable, name in learner.state_mapping(learner.names):
        after = next(value for other, value in learner.state_mapping(step.state) if other is variable)
        if _is_bad([after]):
            return name, "update"
    return None, None


def _spoils_gradient(call: Call, step: Instrumented) -> bool:
    """Returns whether the gradient of a call's outputs is finite, and the one that it passes on or gives its weights is not."""
    if not call.output_gradients or _is_bad(call.output_gradients):
        return False
    own = [step.gradients[v.path] for v in getattr(call.layer, "trainable_variables", []) if v.path in step.gradients]
    return _is_bad([*call.input_gradients, *own])


def _is_inside(inner: Call, outer: Call) -> bool:
    sublayers = getattr(outer.layer, "layers", []) if isinstance(outer.layer, keras.Layer) else []
    path = getattr(outer.layer, "path", None)
    contained = path is not None and str(getattr(inner.layer, "path", "")).startswith(f"{path}/")
    return inner.layer is not outer.layer and (contained or any(inner.layer is layer for layer in sublayers))


def _leaves(batch: PyTree) -> list[tuple[str, Any]]:
    return [(path.lstrip("."), leaf) for path, leaf in named_leaves("", batch)]


def _is_bad(arrays: Iterable[Any]) -> bool:
    floats = (array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating))
    return any(not np.isfinite(np.asarray(array, np.float32)).all() for array in floats)


def _norm(array: Any) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64).ravel()))

"""A training step with what happens inside: the outputs of each layer call, and the gradients that arrive there."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import Array

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import SharedScope


class Call(NamedTuple):
    """A call of a layer, or of an operation in a functional model, in the order in which they return.

    `name` is the layer's path, with a number if it was called before; `layer` the object. `outputs` are all floating-point
    arrays that it returned, on the host; in a loop those of each iteration. `output_gradients` are the gradients of the loss with
    respect to them, `input_gradients` those with respect to what it was called on; empty where none is computed.

    >>> Call("model/dense", None, [np.zeros(2)], [], []).name
    'model/dense'
    """

    name: str
    layer: Any
    outputs: list[np.ndarray]
    output_gradients: list[np.ndarray]
    input_gradients: list[np.ndarray]


class Instrumented(NamedTuple):
    """A step's state and logs, its calls in order, and the gradients of variables by their path, in Keras' loss scale, if any.

    >>> Instrumented(None, {}, [], {}).calls
    []
    """

    state: Any
    logs: Logs
    calls: list[Call]
    gradients: dict[str, np.ndarray]


def instrumented_step(learner: Learner, state: Any, batch: Any) -> Instrumented:
    """Runs a training step, compiled for this call, and records what happens inside. The state is not donated.

    Works for every learner that calls Keras layers: functional, sequential, subclassed and nested models, several models. The
    numbers may differ from those of the plain step in rounding, since nothing is fused across layers. Clears JAX's caches: what
    runs afterwards is compiled again. A sharded learner can't be recorded: pass that of one device.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="linear"), keras.layers.ReLU(name="positive")])
    >>> learner = research.supervised(model, loss="mse", optimizer="sgd")
    >>> step = instrumented_step(learner, learner.init(), research.Batch(jnp.ones((4, 2)), jnp.ones((4, 3))))
    >>> [(call.layer.name, call.outputs[0].shape, call.output_gradients[0].shape) for call in step.calls[:2]]
    [('linear', (4, 3), (4, 3)), ('positive', (4, 3), (4, 3))]
    """
    calls: list[Call] = []
    gradients: dict[str, list[np.ndarray]] = {}
    jax.clear_caches()  # parts that were traced before would be taken without what is recorded in them
    try:
        with _recording(calls, gradients):
            after, logs = jax.jit(lambda state, batch: learner.train(state, batch))(state, batch)
        jax.block_until_ready(after)
        jax.effects_barrier()
    finally:
        jax.clear_caches()  # and later programs would record again
    return Instrumented(after, logs, calls, {path: sum(values[1:], values[0]) for path, values in gradients.items() if values})


@contextlib.contextmanager
def _recording(calls: list[Call], gradients: dict[str, list[np.ndarray]]) -> Iterator[None]:
    """Records every call of a Keras operation, and every variable that is read, in what is traced inside the context."""
    call_operation, read_variable = keras.Operation.__call__, SharedScope.get_current_value
    counts: dict[str, int] = {}
    taps: dict[tuple[int, int], tuple[Any, Any]] = {}

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        own = type(operation).__module__.startswith("research.")  # the layers that handle masks, here and in the objective
        if own or not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((args, kwargs))):
            return call_operation(operation, *args, **kwargs)
        incoming: list[np.ndarray] = []
        args, kwargs = _tapped((args, kwargs), [], incoming)
        outputs = call_operation(operation, *args, **kwargs)
        path = getattr(operation, "path", None) or operation.name
        number = counts.setdefault(path, 0)
        counts[path] += 1
        record = Call(f"{path}/{number}" if number else path, operation, [], [], incoming)
        calls.append(record)
        return _tapped(outputs, record.outputs, record.output_gradients)

    def read(scope: SharedScope, variable: keras.Variable) -> Any:
        value = read_variable(scope, variable)
        if value is None or not _is_float(value):
            return value
        key = (id(scope), id(value))  # once for all reads, so that the gradient arrives complete
        if key not in taps:
            taps[key] = (value, _tap(value, [], gradients.setdefault(variable.path, [])))
        return taps[key][1]

    keras.Operation.__call__, SharedScope.get_current_value = call, read  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        keras.Operation.__call__, SharedScope.get_current_value = call_operation, read_variable  # type: ignore[method-assign]


def _tapped(tree: Any, values: list[np.ndarray], gradients: list[np.ndarray]) -> Any:
    def tap(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or not _is_float(leaf):
            return leaf
        layer = _Tap(name="tap", autocast=False)
        layer.supports_masking = True
        layer.tap = functools.partial(_tap, values=values, gradients=gradients)
        return layer(leaf)

    return jax.tree.map(tap, tree)


class _Tap(keras.Layer):
    """Passes its input on as `_tap` does, with its mask: only a layer can do that with public names."""

    tap: Callable[[Array], Array]

    def call(self, inputs: Array) -> Array:
        """Returns the input."""
        return self.tap(inputs)


def _tap(value: Array, values: list[np.ndarray], gradients: list[np.ndarray]) -> Array:
    """Returns the value; when the program runs, it is appended to `values`, and its gradient to `gradients`."""

    def append(target: list[np.ndarray]) -> Callable[[Any], None]:
        return lambda array: target.append(np.array(array))

    @jax.custom_vjp
    def identity(value: Array) -> Array:
        return value

    def backward(_: None, gradient: Array) -> tuple[Array]:
        jax.debug.callback(append(gradients), gradient)
        return (gradient,)

    identity.defvjp(lambda value: (value, None), backward)
    jax.debug.callback(append(values), value)
    return identity(value)


def _is_float(value: Any) -> bool:
    return hasattr(value, "dtype") and bool(jnp.issubdtype(value.dtype, jnp.floating))

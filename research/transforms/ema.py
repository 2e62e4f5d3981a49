"""Evaluation and prediction with an exponential moving average of the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jaxtyping import PyTree

from research.core.learner import Learner
from research.core.metrics import Logs
from research.core.state import InvalidArgument, Mapped, State, check_type, current_values, scope_mapping, states_in


class AveragedState(NamedTuple):
    """The state of a learner and the moving average of its weights: the `trainable` part of every `State` in it, in order.

    >>> AveragedState(State([jnp.ones(1)], [], [], {}), [[jnp.zeros(1)]]).average
    [[Array([0.], dtype=float32)]]
    """

    state: Any
    average: list[PyTree]


def ema(learner: Learner, decay: float) -> Learner:
    """Returns a learner that evaluates and predicts with an exponential moving average of its weights.

    After each training step `average = decay * average + (1 - decay) * weights`, starting from the initial weights. Training
    itself is unchanged, and evaluation leaves the trained weights as they are. Averages of half-precision weights are kept in
    float32. Non-trainable values such as BatchNormalization's statistics are not averaged. `with_averages` returns a
    state with the averaged weights. Raises `InvalidArgument` for a decay outside [0, 1), and for a state without any `State`.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    >>> learner = ema(research.supervised(model, loss="mse", optimizer=keras.optimizers.SGD(0.5)), 0.75)
    >>> batch = research.Batch(jnp.ones((1, 1)), jnp.ones((1, 1)))
    >>> state, _ = learner.train(learner.init(), batch)
    >>> float(state.state.trainable[0][0, 0]), float(learner.predict(state, batch)[0, 0])
    (1.0, 0.25)
    """
    check_type(learner, Learner, "ema: the learner", "a research.Learner: research.supervised(model, loss=...)")
    check_type(decay, (int, float, np.floating), "ema: the decay", "a number from 0 to less than 1, such as 0.999")
    if not 0 <= decay < 1:
        raise InvalidArgument(f"ema: the decay is {decay}; expected a number from 0 to less than 1, such as 0.999.")
    if not states_in(learner.names):
        raise InvalidArgument("ema: the learner's state holds no research.State, so its weights are unknown; keep them in one.")

    def init() -> AveragedState:
        state = learner.init()
        return AveragedState(state, jax.tree.map(_as_average, _weights(state)))

    def train(state: AveragedState, batch: Any) -> tuple[AveragedState, Logs]:
        after, logs = learner.train(state.state, batch)
        average = jax.tree.map(lambda a, w: a + (1 - decay) * (w.astype(a.dtype) - a), state.average, _weights(after))
        return AveragedState(after, average), logs

    def evaluate(state: AveragedState, batch: Any) -> tuple[AveragedState, Logs]:
        after, logs = learner.evaluate(_averaged(state), batch)
        return AveragedState(_with_weights(after, _weights(state.state)), state.average), logs

    def state_mapping(state: AveragedState) -> Mapped:
        return learner.state_mapping(state.state)

    return learner._replace(
        init=init,
        reset=lambda state: state._replace(state=learner.reset(state.state)),
        train=train,
        evaluate=evaluate,
        predict=lambda state, batch: learner.predict(_averaged(state), batch),
        names=AveragedState(learner.names, jax.tree.map(lambda name: f"ema/{name}", _weights(learner.names))),
        state_mapping=state_mapping,
    )


def with_averages(state: Any) -> Any:
    """Returns a state in which the weights of every `AveragedState` are replaced by their averages, for example to export them.

    >>> trained = State([jnp.ones(1)], [], [], {})
    >>> with_averages({"generator": AveragedState(trained, [[jnp.zeros(1)]])})["generator"].state.trainable
    [Array([0.], dtype=float32)]
    """

    def replace(node: Any) -> Any:
        return node._replace(state=_averaged(node)) if isinstance(node, AveragedState) else node

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, AveragedState))


def with_optimizer_averages(state: State, optimizer: keras.Optimizer, model: keras.Layer) -> State:
    """Returns a state with the averages of the weights that a Keras optimizer with `use_ema=True` keeps, as `fit` ends with them.

    `optimizer` and `model` are those of the learner; for its other uses, such as `write_back`, the state stays as it is. Raises
    `InvalidArgument` for an optimizer without averages.

    >>> import research
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    >>> optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.75)
    >>> learner = research.supervised(model, loss="mse", optimizer=optimizer)
    >>> state, batch = learner.init(), research.Batch(jnp.ones((1, 1)), jnp.array([[3.0]]))
    >>> for _ in range(2):
    ...     state, _ = learner.train(state, batch._replace(y=batch.y + state.trainable[0]))
    >>> float(state.trainable[0][0, 0]), float(with_optimizer_averages(state, optimizer, model).trainable[0][0, 0])
    (6.0, 3.75)
    """
    inner = optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer
    if not inner.use_ema:
        raise InvalidArgument(
            f"with_optimizer_averages: {inner.name!r} keeps no averages; construct it with use_ema=True, or use "
            "research.transforms.ema."
        )
    weights = model.trainable_variables
    with keras.StatelessScope(scope_mapping([(optimizer.variables, state.optimizer), (weights, state.trainable)])) as scope:
        inner.finalize_variable_values(weights)
    return state._replace(trainable=current_values(scope, weights, state.trainable))


def _averaged(state: AveragedState) -> Any:
    """Returns the inner state with the averages as its weights."""
    weights = jax.tree.map(lambda a, w: a.astype(w.dtype), state.average, _weights(state.state))
    return _with_weights(state.state, weights)


def _as_average(weight: Any) -> Any:
    """Returns a copy of a weight, in float32 if it has a lower precision."""
    return jnp.array(weight, jnp.promote_types(weight.dtype, jnp.float32), copy=True)


def _weights(state: Any) -> list[PyTree]:
    return [node.trainable for node in states_in(state)]


def _with_weights(state: Any, weights: list[PyTree]) -> Any:
    remaining = iter(weights)

    def replace(node: Any) -> Any:
        return node._replace(trainable=next(remaining)) if isinstance(node, State) else node

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, State))

"""From a learner's state back to the Keras objects that it was made from."""

from typing import Any

import jax.numpy as jnp
import keras

from research.core.learner import Learner
from research.core.state import InvalidArgument, State, check_type
from research.keras_fit.from_keras import model_metrics


def part(learner: Learner, state: Any, model: keras.Layer) -> State:
    """Returns a model's own weights and non-trainable variables from the state of a learner of several models.

    The result has no optimizer and no metrics: it is what `forward(model, ...)` and `write_back(..., model)` take. Raises
    `InvalidArgument` if the state does not hold the model.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> learner = research.supervised(model, loss="mse")
    >>> [weight.shape for weight in part(learner, learner.init(), model.layers[0]).trainable]
    [(2, 1), (1,)]
    """
    check_type(learner, Learner, "part: the learner", "a research.Learner: part(learner, state, model)")
    check_type(model, keras.Layer, "part: the model", "a keras.Model: part(learner, state, model)")
    values = {id(variable): value for variable, value in learner.state_mapping(state)}
    variables = [*model.trainable_variables, *model.non_trainable_variables]
    missing = next((variable.path for variable in variables if id(variable) not in values), None)
    if missing is not None:
        raise InvalidArgument(f"part: the state does not hold {missing!r} of {model.name!r}; pass a model of the learner.")
    found = [values[id(variable)] for variable in variables]
    count = len(model.trainable_variables)
    return State(found[:count], found[count:], [], {})


def write_back(state: Any, target: Any, optimizer: keras.Optimizer | None = None) -> None:
    """Writes a state's values into the Keras objects that they came from, as copies: training may go on and donate its own.

    `target` is a `Learner` (every Keras variable behind its state), or a model, for a `State` of that model alone: weights and
    seeds, the variables of `optimizer` if given, and metrics that the model has under the same name (compiled ones, or those of
    its layers). Raises `InvalidArgument` if the state is not of this model.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> write_back(State([jnp.full((1, 1), 7.0)], [], [], {}), model)
    >>> float(model.trainable_variables[0].value[0, 0])
    7.0
    """
    check_type(target, (Learner, keras.Layer), "write_back: the target", "a learner or a model: write_back(state, target)")
    if isinstance(target, Learner):
        for variable, array in target.state_mapping(state):
            variable.assign(jnp.array(array, copy=True))
        return
    check_type(state, State, "write_back: the state", "a research.State of that model: research.part(learner, state, model)")
    assignments = [
        ("trainable", target.trainable_variables, state.trainable),
        ("non_trainable", target.non_trainable_variables, state.non_trainable),
    ]
    if optimizer is not None:
        assignments.append(("optimizer", optimizer.variables, state.optimizer))
    if state.metrics:
        metrics = model_metrics(target)
        assignments += [(f"metric {name}", metrics[name], values) for name, values in state.metrics.items() if name in metrics]
    for field, variables, arrays in assignments:
        if [tuple(v.shape) for v in variables] != [tuple(a.shape) for a in arrays]:
            raise InvalidArgument(
                f"write_back: {field} of the state does not fit {target.name!r}: {len(arrays)} arrays for {len(variables)} "
                "variables, or other shapes; expected the model (and optimizer) that the learner was built from."
            )
    for _, variables, arrays in assignments:
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(jnp.array(array, copy=True))

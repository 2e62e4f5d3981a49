"""Differentially private training: DP-SGD of Abadi et al. (2016, arXiv:1607.00133) with any optimizer."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the example in a docstring)
import keras
from jaxtyping import PyTree

from research.core.learner import as_optimizer
from research.core.state import InvalidArgument, State
from research.core.step import Gradient
from research.core.update import Gradients, Update, as_update, update_names
from research.transforms.clip import check_positive
from research.transforms.per_example import clip_per_example


def private(optimizer: Any, *, max_norm: float | int, noise: float | int, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Returns `optimizer` and `gradient_transform` for `supervised` and `learner`, so that training is differentially private.

    Each example's gradient is clipped to the norm `max_norm`, their sum gets Gaussian noise of standard deviation `noise *
    max_norm`, and is divided by `batch_size`, the expected number of examples in a batch: `optimizer` (a name, a Keras optimizer
    or optax') gets that. The noise is drawn from a key in the optimizer's state. Take batches from `research.data.poisson`, which
    draws each example with the same probability, for `epsilon` to hold; give it the same `batch_size`. Metrics and losses that
    are logged are not private. When the step is traced, raises `InvalidArgument` for BatchNormalization and its kin.

    For memory, split batches: `settings["gradient_transform"]` is a function from a gradient to a gradient, around which
    `accumulate` goes.

    >>> import research
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> settings = private("adam", max_norm=1.0, noise=1.1, batch_size=4)
    >>> learner = research.supervised(model, loss="mse", **settings)
    >>> state, logs = jax.jit(learner.train)(learner.init(), research.Batch(jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> sorted(learner.names.optimizer), learner.names.optimizer["noise"]
    (['noise', 'update'], 'noise/key')
    """
    check_positive(max_norm, "private: max_norm")
    check_positive(noise, "private: noise")
    check_positive(batch_size, "private: batch_size")
    inner = as_optimizer(optimizer, [])

    def of_variables(variables: Sequence[keras.Variable]) -> Update:
        return _noisy(as_update(inner, variables), max_norm * noise, batch_size, seed)

    def gradient_transform(gradient: Gradient) -> Gradient:
        return clip_per_example(gradient, max_norm)

    return {"optimizer": of_variables, "gradient_transform": gradient_transform}


def epsilon(*, noise: float | int, batch_size: int, examples: int, steps: int, delta: float | int) -> float:
    """Returns the epsilon of the (epsilon, delta) differential privacy of `steps` steps of `private` with Poisson batches.

    Neighbouring data sets differ by one example added or removed. It is Renyi accounting (Mironov et al., 2019, arXiv:1908.10530)
    by the package `dp-accounting`, converted as by Canonne et al. (2020, arXiv:2004.00010): earlier conversions give more, for
    the example below 3.01. Raises `InvalidArgument` for arguments out of range.

    >>> round(epsilon(noise=1.1, batch_size=256, examples=60_000, steps=14_063, delta=1e-5), 2)
    2.6
    """
    check_positive(noise, "epsilon: noise")
    _check_sampling("epsilon", batch_size, examples, steps, delta)
    accounting = _dp_accounting("epsilon")
    steps_taken = _noisy_steps(accounting, noise, batch_size / examples, steps)
    return float(accounting.rdp.RdpAccountant().compose(steps_taken).get_epsilon(delta))


def noise_for(*, epsilon: float | int, batch_size: int, examples: int, steps: int, delta: float | int) -> float:
    """Returns the least `noise` of `private` with which `steps` steps have at most this `epsilon`: the inverse of that function.

    Raises `InvalidArgument` for arguments out of range.

    >>> round(noise_for(epsilon=2.6, batch_size=256, examples=60_000, steps=14_063, delta=1e-5), 2)
    1.1
    """
    check_positive(epsilon, "noise_for: epsilon")
    _check_sampling("noise_for", batch_size, examples, steps, delta)
    accounting = _dp_accounting("noise_for")
    # On its way the search tries so little noise that some orders' sums do not converge. They are left out, with a warning each.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        noise = accounting.calibrate_dp_mechanism(
            accounting.rdp.RdpAccountant,
            lambda noise: _noisy_steps(accounting, noise, batch_size / examples, steps),
            epsilon,
            delta,
            accounting.LowerEndpointAndGuess(1e-3, 1.0),
        )
    finally:
        logger.setLevel(level)
    return float(noise)


def _check_sampling(function: str, batch_size: int, examples: int, steps: int, delta: float | int) -> None:
    for name, value in (("batch_size", batch_size), ("examples", examples), ("steps", steps), ("delta", delta)):
        check_positive(value, f"{function}: {name}")
    if batch_size > examples or delta >= 1:
        raise InvalidArgument(
            f"{function}: batch_size is {batch_size} of {examples} examples, delta {delta}; expected a batch_size of at most the "
            "number of examples, and a delta below 1, such as 1 over the number of examples."
        )


def _dp_accounting(function: str) -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise InvalidArgument(f"{function}: it needs the package dp-accounting: pip install 'research[private]'.") from error
    return dp_accounting


def _noisy_steps(accounting: Any, noise: float | int, probability: float, steps: int) -> Any:
    """Returns the event of the accountant that so many steps are, each with a batch of examples drawn with a probability."""
    step = accounting.PoissonSampledDpEvent(probability, accounting.GaussianDpEvent(noise))
    return accounting.SelfComposedDpEvent(step, steps)


def _noisy(update: Update, deviation: float | int, batch_size: float | int, seed: int) -> Update:
    """Returns an update that gets the sum of the clipped gradients plus noise, over `batch_size`."""

    def inner(state: State) -> State:
        return state._replace(optimizer=state.optimizer["update"])

    def init(trainable: PyTree) -> PyTree:
        return {"noise": jax.random.key_data(jax.random.key(seed)), "update": update.init(trainable)}

    def apply(state: State, gradients: Gradients, evaluate: Callable[[PyTree], Gradients] | None = None) -> State:
        leaves, structure = jax.tree.flatten(gradients.values)
        after, *keys = jax.random.split(jax.random.wrap_key_data(state.optimizer["noise"]), len(leaves) + 1)
        noisy = [
            (leaf * gradients.weight.astype(leaf.dtype) + deviation * jax.random.normal(key, leaf.shape, leaf.dtype)) / batch_size
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        # Without `evaluate`: what an optimizer learns from the gradient at other weights would not be private.
        stepped = update.apply(inner(state), gradients._replace(values=jax.tree.unflatten(structure, noisy)))
        return stepped._replace(optimizer={"noise": jax.random.key_data(after), "update": stepped.optimizer})

    def names(variables: Sequence[keras.Variable], names: Sequence[str]) -> PyTree:
        return {"noise": "noise/key", "update": update_names(update, variables, names)}

    scale = update.loss_scale
    return Update(
        init=init,
        apply=apply,
        iterations=lambda state: update.iterations(inner(state)),
        learning_rate=lambda state: update.learning_rate(inner(state)),
        names=names,
        loss_scale=None if scale is None else lambda state: scale(inner(state)),
    )

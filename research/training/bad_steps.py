"""Steps that spoil a run: a loss that is not finite, a loss far above those before it, weights that are not finite."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

Watch = Callable[[int, int, dict[str, Any], Any], None]  # (first step, number of steps, last logs, stacked logs or None)
NONFINITE, SPIKE = "nonfinite", "spike"
RECENT = "recent/"  # before the name of a loss, in a checkpoint's logs
MAD_TO_SIGMA = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation


class BadStep(Exception):
    """A step, counted from 1, after which training must not go on. `reason` is "nonfinite" or "spike", the message a clause.

    >>> str(BadStep(37, NONFINITE, "loss is nan"))
    'loss is nan'
    """

    def __init__(self, step: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.step, self.reason = step, reason


class Watched:
    """The dispatches of a training loop whose logs its `watch`, if any, has not seen yet.

    >>> watched = Watched(lambda first, *_: print(first))
    >>> watched.add(1, 4, {}, {})
    >>> watched.add(5, 4, {}, {})
    >>> watched.check(later=1)
    1
    """

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.dispatches: deque[tuple[int, int, dict[str, Any], Any]] = deque()

    def add(self, first: int, steps: int, logs: dict[str, Any], all_logs: Any) -> None:
        """Adds a dispatch."""
        if self.watch is not None:
            self.dispatches.append((first, steps, logs, all_logs))

    def check(self, later: int) -> None:
        """Watches all dispatches but the `later` last ones, and waits for the device if it has not computed them yet."""
        while self.watch is not None and len(self.dispatches) > later:
            self.watch(*self.dispatches.popleft())


class LossWatch:
    """A `watch` for `research.train`, which raises `BadStep` at the first step whose loss is not finite, or jumps up.

    It looks at the logs called `loss` or ending in `_loss`, running means since the start of an epoch, and so costs the device
    nothing. With a `threshold`, a loss is a spike if it is above the median of the last `window` losses by more than `threshold`
    standard deviations, which are estimated from their median absolute deviation. The first `window` losses are never spikes.
    `logs` are those of the step to start from. With those of `recent` it goes on as if training had not been interrupted.

    >>> watch = LossWatch(steps_per_epoch=100, threshold=5.0, window=3)
    >>> watch(1, 4, {}, {"loss": np.array([1.0, 1.1, 1.0, 1.05])})
    >>> watch(5, 1, {"loss": np.array(3.0)}, None)
    Traceback (most recent call last):
    research.training.bad_steps.BadStep: loss is 10.8, the median of the last 3 is 1.2
    """

    def __init__(
        self,
        steps_per_epoch: int,
        *,
        threshold: float | None = None,
        window: int = 128,
        logs: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps_per_epoch, self.threshold, self.window = steps_per_epoch, threshold, window
        self.means, self.losses = {}, {}
        for name, value in (logs or {}).items():
            if name.startswith(RECENT):
                self.losses[name.removeprefix(RECENT)] = deque(np.asarray(value).tolist(), window)
            elif is_loss(name):
                self.means[name] = float(value)

    def __call__(self, first: int, steps: int, logs: dict[str, Any], all_logs: Any) -> None:
        """Looks at the logs of a dispatch."""
        for name in filter(is_loss, all_logs or logs):
            means = np.asarray(all_logs[name])[:steps] if all_logs else np.asarray(logs[name])[None]
            bad = np.flatnonzero(~np.isfinite(means))
            if self.threshold is not None:
                self._find_spike(name, first, means[: bad[0]] if len(bad) else means)
            if len(bad):
                raise BadStep(first + int(bad[0]), NONFINITE, f"{name} is {means[bad[0]]}")

    def _find_spike(self, name: str, first: int, means: Float[np.ndarray, " steps"]) -> None:
        recent = self.losses.setdefault(name, deque(maxlen=self.window))
        assert self.threshold is not None
        for step, mean in enumerate(means.astype(float).tolist(), first):
            count = (
                step - 1
            ) % self.steps_per_epoch + 1  # the loss follows from two means; of a shorter last batch, a part of it
            loss = mean if count == 1 else count * mean - (count - 1) * self.means.get(name, mean)
            if len(recent) == self.window:
                median = float(np.median(recent))
                deviation = float(np.median(np.abs(np.subtract(recent, median))))
                sigma = MAD_TO_SIGMA * max(deviation, 1e-6 * abs(median))  # equal losses are equal to rounding only
                if loss - median > self.threshold * sigma:
                    raise BadStep(step, SPIKE, f"{name} is {loss:.4g}, the median of the last {self.window} is {median:.4g}")
            recent.append(loss)
            self.means[name] = mean

    def recent(self) -> dict[str, Any]:
        """Returns the losses that the next one is compared with, as logs for a checkpoint; none without a threshold."""
        return {RECENT + name: np.array(values) for name, values in self.losses.items()}


def without_recent(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the logs of a checkpoint without those that `LossWatch.recent` added.

    >>> without_recent({"loss": 0.5, "recent/loss": [0.6, 0.5]})
    {'loss': 0.5}
    """
    return {name: value for name, value in logs.items() if not name.startswith(RECENT)}


def is_loss(name: str) -> bool:
    """Returns whether a log is a running mean of a loss, by its name.

    >>> is_loss("generator_loss"), is_loss("accuracy")
    (True, False)
    """
    return name == "loss" or name.endswith("_loss")


def state_check(start: PyTree) -> Callable[[int, Any, Any], None]:
    """Returns a hook for `research.train` that raises `BadStep` if a leaf that is finite at the start is not any more.

    >>> check = state_check({"weight": jnp.ones(2), "best": jnp.inf})
    >>> check(100, {"weight": jnp.zeros(2), "best": jnp.inf}, {})
    >>> check(200, {"weight": jnp.full(2, jnp.nan), "best": jnp.inf}, {})
    Traceback (most recent call last):
    research.training.bad_steps.BadStep: the state is not finite
    """
    finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])

    def flags(state: PyTree) -> list[bool]:
        return [bool(flag) for flag in jax.device_get(finite([leaf for leaf in jax.tree.leaves(state) if _is_inexact(leaf)]))]

    before = flags(start)

    def check(step: int, state: Any, logs: Any) -> None:
        if any(old and not new for old, new in zip(before, flags(state), strict=True)):
            raise BadStep(step, NONFINITE, "the state is not finite")

    return check


def _is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact))

"""User callbacks under Keras' own loops: which of them need single batches, and logs that stay on the device until read."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import keras

from research.keras_fit.programs import LoopState, ModelFunctions

PROGRESS_INTERVAL = 0.05  # seconds between two updates of the progress bar, as in Keras
BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
}
# Keras' callbacks whose batch hooks do nothing when they save once per epoch.
CHECKPOINT_CALLBACKS = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)


def wrap_callbacks(callbacks: Any, functions: ModelFunctions, verbose: Any, validation_steps: int | None = None) -> Any:
    """Returns the list of callbacks to pass to Keras: a `CallbackDispatcher` around the user's, and a progress bar.

    A `CallbackList` or `ProgbarLogger` among the user's callbacks is returned unchanged, with the rest: it gets its logs from
    Keras. `History` callbacks stay in the list, where Keras looks for them.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> wrapped = wrap_callbacks([keras.callbacks.History()], ModelFunctions(model), verbose=1)
    >>> [type(callback).__name__ for callback in wrapped]
    ['CallbackDispatcher', 'History', 'DelayedProgressBar']
    """
    user_callbacks = keras.tree.flatten(callbacks) if callbacks else []
    if any(isinstance(c, keras.callbacks.CallbackList | keras.callbacks.ProgbarLogger) for c in user_callbacks):
        return callbacks
    histories = [c for c in user_callbacks if isinstance(c, keras.callbacks.History)]
    others = [c for c in user_callbacks if c not in histories]
    dispatcher = CallbackDispatcher(others, functions, verbose != 0, validation_steps)
    return [dispatcher, *histories, *([DelayedProgressBar(dispatcher)] if verbose != 0 else [])]


class CallbackDispatcher(keras.callbacks.Callback):
    """Calls a user's callbacks, and reports the position in Keras' loops to the model's functions.

    Batch hooks are called only on callbacks that have them, with `LazyLogs`.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> dispatcher = CallbackDispatcher([keras.callbacks.TerminateOnNaN()], ModelFunctions(model), False, None)
    >>> {split: len(callbacks) for split, callbacks in dispatcher.batch_callbacks.items()}
    {'train': 1, 'test': 0}
    """

    def __init__(
        self, callbacks: Sequence[Any], functions: ModelFunctions, progress_bar: bool, validation_steps: int | None
    ) -> None:
        super().__init__()
        self.callbacks, self.functions, self.validation_steps = callbacks, functions, validation_steps
        self.batch_callbacks = {split: [c for c in callbacks if has_hook(c, hooks)] for split, hooks in BATCH_HOOKS.items()}
        self.loops = {
            split: LoopState(may_fuse=not needing_batches, first_alone=progress_bar)
            for split, needing_batches in self.batch_callbacks.items()
        }
        self.training = False

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def _call_all(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def on_train_begin(self, logs: Any = None) -> None:
        self.training = True
        self._call_all("on_train_begin", logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._call_all("on_train_end", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._call_all("on_epoch_begin", epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.loops["train"].pacer.pause()
        self._call_all("on_epoch_end", epoch, logs)

    def on_test_begin(self, logs: Any = None) -> None:
        self._call_all("on_test_begin", logs)

    def on_test_end(self, logs: Any = None) -> None:
        self.loops["test"].pacer.pause()
        self._call_all("on_test_end", logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin_batch("train", batch, self.params.get("steps"))

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin_batch("test", batch, self.validation_steps if self.training else self.params.get("steps"))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end_batch("train", batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end_batch("test", batch, logs)

    def _begin_batch(self, split: str, batch: int, steps: int | None) -> None:
        for callback in self.batch_callbacks[split]:
            getattr(callback, f"on_{split}_batch_begin")(batch, {})
        unit = self.functions.model.steps_per_execution
        remaining = None if steps is None else -(-(steps - batch) // unit)
        self.loops[split].begin_execution(batch, remaining)
        if split in self.functions.by_split:
            self.functions.by_split[split].loop = self.loops[split]
        self.functions.interrupts.defer()  # Keras may just be taking the weights out of the model

    def _end_batch(self, split: str, batch: int, logs: Any) -> None:
        self.functions.interrupts.allow()
        loop = self.loops[split]
        if split in self.functions.by_split:
            logs = LazyLogs(loop.logs)
        for callback in self.batch_callbacks[split]:
            getattr(callback, f"on_{split}_batch_end")(batch, logs)
        loop.returned_logs.update(loop.logs)


class DelayedProgressBar(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, one dispatch late: it shows logs that the device has finished, so it never waits for the device.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> bar = DelayedProgressBar(CallbackDispatcher([], ModelFunctions(model), True, None))
    >>> isinstance(bar, keras.callbacks.ProgbarLogger)
    True
    """

    def __init__(self, dispatcher: CallbackDispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.previous: tuple[int, Any] | None = None
        self.updated_at = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.previous, self.updated_at = None, 0.0
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._update("train", batch, logs, super().on_train_batch_end)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.dispatcher.training:
            self._update("test", batch, logs, super().on_test_batch_end)

    def _update(self, split: str, batch: int, logs: Any, show: Callable[[int, Any], None]) -> None:
        if split not in self.dispatcher.functions.by_split or self.verbose != 1:
            return show(batch, logs)
        now = time.perf_counter()
        if self.previous is not None and now - self.updated_at >= PROGRESS_INTERVAL:
            show(self.previous[0], LazyLogs(self.previous[1]))
            self.updated_at = now
        if self.dispatcher.loops[split].executed_ahead == 0:
            self.previous = (batch, self.dispatcher.loops[split].logs)
        self.seen = batch + 1  # Keras' attribute, which its last line of the epoch shows


class LazyLogs(dict[str, Any]):
    """A step's logs as Keras passes them to callbacks: floats by name, read off the device at the first access to a value.

    >>> logs = LazyLogs({"loss": jnp.ones(()), "mae": jnp.zeros(())})
    >>> "loss" in logs, logs["loss"], dict(logs)
    (True, 1.0, {'loss': 1.0, 'mae': 0.0})
    """

    def __init__(self, values: Any) -> None:
        super().__init__(flatten_logs(values))
        self._on_device = True

    def _read(self) -> None:
        if self._on_device:
            self._on_device = False
            super().update({name: _as_float(value) for name, value in jax.device_get(dict(super().items())).items()})

    def __iter__(self) -> Iterator[str]:  # overridden, or `dict(logs)` copies the values without reading them
        return iter(super().keys())

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _read_first(name: str) -> Callable[..., Any]:
    """Wraps a method of `dict` so that the logs are read off the device before it runs."""
    method = getattr(dict, name)

    def call(self: LazyLogs, *args: Any, **kwargs: Any) -> Any:
        self._read()
        return method(self, *args, **kwargs)

    return call


for _name in ("__getitem__", "get", "items", "values", "copy", "pop", "popitem", "setdefault", "update", "__setitem__"):
    setattr(LazyLogs, _name, _read_first(_name))
for _name in ("__eq__", "__ne__", "__or__", "__ror__", "__ior__", "__repr__"):
    setattr(LazyLogs, _name, _read_first(_name))


def has_hook(callback: Any, hooks: Sequence[str]) -> bool:
    """Returns whether a callback overrides one of these hooks. A checkpoint callback that saves per epoch does not count.

    >>> [has_hook(callback, BATCH_HOOKS["train"]) for callback in (keras.callbacks.TerminateOnNaN(), keras.callbacks.History())]
    [True, False]
    """
    if type(callback) in CHECKPOINT_CALLBACKS and callback.save_freq == "epoch":
        return False
    return any(
        getattr(type(callback), hook, None) is not getattr(keras.callbacks.Callback, hook) or hook in vars(callback)
        for hook in hooks
    )


def flatten_logs(logs: Any) -> dict[str, Any]:
    """Returns nested logs as one dictionary, in the order in which Keras sorts them.

    >>> flatten_logs({"b": 1, "a": {"c": 2}})
    {'c': 2, 'b': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in sorted((logs or {}).items()):
        flat.update(flatten_logs(value) if isinstance(value, dict) else {name: value})
    return flat


def _as_float(value: Any) -> Any:
    """Returns a scalar as a float, anything else as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value

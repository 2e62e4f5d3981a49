"""A user's callbacks under Keras' own loops: who looks at single batches, and logs that are read when looked at."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp  # noqa: F401  (for the examples in docstrings)
import keras

from research.programs import Loop, Programs

SHOW_EVERY = 0.05  # seconds between two looks of the progress bar at the logs, as in Keras
BATCH_HOOKS = {
    "train": ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end"),
    "test": ("on_test_batch_begin", "on_test_batch_end"),
}
# Keras' callbacks that have batch hooks, and do nothing in them where they save by the epoch.
SAVING = (keras.callbacks.ModelCheckpoint, keras.callbacks.BackupAndRestore)


def watched(callbacks: Any, programs: Programs, verbose: Any, validation_steps: int | None = None) -> Any:
    """A user's callbacks with ours around them: what to hand to Keras."""
    given = keras.tree.flatten(callbacks) if callbacks else []
    if any(isinstance(c, keras.callbacks.CallbackList | keras.callbacks.ProgbarLogger) for c in given):
        return callbacks  # they get their logs from Keras
    own = [c for c in given if isinstance(c, keras.callbacks.History)]
    watch = Watch([c for c in given if c not in own], programs, verbose != 0, validation_steps)
    return [watch, *own, *([Bar(watch)] if verbose != 0 else [])]


class Watch(keras.callbacks.Callback):
    """Stands before a user's callbacks: tells the programs where Keras' loops are, and hands on what Keras calls.

    Batch hooks reach those that have them, with logs that are read when looked at.
    """

    def __init__(self, callbacks: Sequence[Any], programs: Programs, bar: bool, validation_steps: int | None) -> None:
        super().__init__()
        self.callbacks, self.programs, self.validation_steps = callbacks, programs, validation_steps
        self.lookers = {split: [c for c in callbacks if looks(c, hooks)] for split, hooks in BATCH_HOOKS.items()}
        self.loops = {split: Loop(fusing=not lookers, alone=bar) for split, lookers in self.lookers.items()}
        self.training = False

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def _tell(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments)

    def on_train_begin(self, logs: Any = None) -> None:
        self.training = True
        self._tell("on_train_begin", logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._tell("on_train_end", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._tell("on_epoch_begin", epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.loops["train"].pace.rest()
        self._tell("on_epoch_end", epoch, logs)

    def on_test_begin(self, logs: Any = None) -> None:
        self._tell("on_test_begin", logs)

    def on_test_end(self, logs: Any = None) -> None:
        self.loops["test"].pace.rest()
        self._tell("on_test_end", logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("train", batch, self.params.get("steps"))

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin("test", batch, self.validation_steps if self.training else self.params.get("steps"))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("train", batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._end("test", batch, logs)

    def _begin(self, split: str, batch: int, steps: int | None) -> None:
        for callback in self.lookers[split]:
            getattr(callback, f"on_{split}_batch_begin")(batch, {})
        unit = self.programs.model.steps_per_execution
        left = None if steps is None else -(-(steps - batch) // unit)
        self.loops[split].begin(batch, left)
        if split in self.programs.of:
            self.programs.of[split].loop = self.loops[split]
        self.programs.interrupts.defer()  # Keras may just be taking the weights out of the model

    def _end(self, split: str, batch: int, logs: Any) -> None:
        self.programs.interrupts.allow()
        loop = self.loops[split]
        if split in self.programs.of:
            logs = Logs(loop.logs)
        for callback in self.lookers[split]:
            getattr(callback, f"on_{split}_batch_end")(batch, logs)
        loop.shown.update(loop.logs)


class Bar(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, always showing the dispatch before the last, which the device has done by then."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.before: tuple[int, Any] | None = None
        self.looked = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.before, self.looked = None, 0.0
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._look("train", batch, logs, super().on_train_batch_end)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        if not self.watch.training:
            self._look("test", batch, logs, super().on_test_batch_end)

    def _look(self, split: str, batch: int, logs: Any, show: Callable[[int, Any], None]) -> None:
        if split not in self.watch.programs.of or self.verbose != 1:
            return show(batch, logs)
        now = time.perf_counter()
        if self.before is not None and now - self.looked >= SHOW_EVERY:
            show(self.before[0], Logs(self.before[1]))
            self.looked = now
        if self.watch.loops[split].done == 0:
            self.before = (batch, self.watch.loops[split].logs)
        self.seen = batch + 1


class Logs(dict[str, Any]):
    """A step's logs as Keras hands them to callbacks: Python numbers by name, read off the device when somebody looks at one.

    >>> logs = Logs({"loss": jnp.ones(()), "mae": jnp.zeros(())})
    >>> "loss" in logs, logs["loss"], dict(logs)
    (True, 1.0, {'loss': 1.0, 'mae': 0.0})
    """

    def __init__(self, values: Any) -> None:
        super().__init__(_flat(values))
        self._waiting = True

    def _read(self) -> None:
        if self._waiting:
            self._waiting = False
            super().update({name: _number(value) for name, value in jax.device_get(dict(super().items())).items()})

    def __iter__(self) -> Iterator[str]:  # of its own: otherwise `dict(logs)` takes the values unread
        return iter(super().keys())

    def __reduce__(self) -> Any:
        return dict, (dict(self.items()),)


def _reading(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def read(self: Logs, *args: Any, **kwargs: Any) -> Any:
        self._read()
        return method(self, *args, **kwargs)

    return read


for _name in ("__getitem__", "get", "items", "values", "copy", "pop", "popitem", "setdefault", "update", "__setitem__"):
    setattr(Logs, _name, _reading(_name))
for _name in ("__eq__", "__ne__", "__or__", "__ror__", "__ior__", "__repr__"):
    setattr(Logs, _name, _reading(_name))


def looks(callback: Any, hooks: Sequence[str]) -> bool:
    """Whether a callback has one of these hooks."""
    if type(callback) in SAVING and callback.save_freq == "epoch":
        return False
    return any(
        getattr(type(callback), hook, None) is not getattr(keras.callbacks.Callback, hook) or hook in vars(callback)
        for hook in hooks
    )


def _flat(logs: Any) -> dict[str, Any]:
    """Nested logs as one dictionary, sorted as Keras sorts them."""
    flat: dict[str, Any] = {}
    for name, value in sorted((logs or {}).items()):
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value

"""What an experiment must provide, checked before training: one clear line for each mistake. See experiments/README.md."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from research.cli.experiment import Experiment, display_path
from research.core.learner import Learner
from research.core.state import InvalidArgument, count_parameters
from research.data.batches import Batches
from research.errors import one_line

REQUIRED = {"build": ("config",), "data": ("config",)}
_PARTS = ("config", "learner", "state", "splits")
OPTIONAL = {
    "weights_mapping": ("config",),
    "models": ("config", "state"),
    "pictures": _PARTS,
    "each_epoch": _PARTS,
    "results": _PARTS,
    "summaries": (*_PARTS, "writer", "step"),
}
SPLIT = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*")
MAX_PARAMETERS = 50_000_000  # of a state whose models are built at the start, only to see whether they can be saved


def check_module(experiment: Experiment) -> None:
    """Raises `InvalidArgument` unless the module has `Config`, `build` and `data`, and its functions take the right arguments.

    >>> from types import SimpleNamespace
    >>> check_module(Experiment("mine", SimpleNamespace(Config=dict), Path("mine.py")))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: mine.py: Config is not a dataclass; decorate it with @dataclass(frozen=True).
    """
    module, where = experiment.module, display_path(experiment.file)
    config = getattr(module, "Config", None)
    if config is None:
        raise InvalidArgument(f"{where}: there is no Config; define a frozen dataclass with epochs, steps, batch_size and seed.")
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise InvalidArgument(f"{where}: Config is not a dataclass; decorate it with @dataclass(frozen=True).")
    fields = {field.name for field in dataclasses.fields(config)}
    for name, default in (("epochs", "int = 10"), ("steps", "int | None = None")):
        if name not in fields:
            raise InvalidArgument(f"{where}: Config has no field {name!r}; add `{name}: {default}`.")
    for name, parameters in {**REQUIRED, **OPTIONAL}.items():
        function = getattr(module, name, None)
        if function is None and name in REQUIRED:
            raise InvalidArgument(f"{where}: there is no {name}; define {name}({', '.join(parameters)}).")
        if function is not None:
            _check_parameters(where, name, function, parameters)


def _check_parameters(where: str, name: str, function: Any, parameters: tuple[str, ...]) -> None:
    expected = f"{name}({', '.join(parameters)})"
    if not callable(function):
        raise InvalidArgument(f"{where}: {name} is {type(function).__name__}; expected a function {expected}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*parameters)
    except TypeError:
        line = f":{function.__code__.co_firstlineno}" if inspect.isfunction(function) else ""
        raise InvalidArgument(
            f"{where}{line}: {name} takes {_count(signature)}, expected {len(parameters)}; define it as {expected}."
        ) from None


def _count(signature: inspect.Signature) -> str:
    count = len(signature.parameters)
    names = ", ".join(signature.parameters)
    return f"{count} argument{'' if count == 1 else 's'}{f' ({names})' if names else ''}"


def check_config(experiment: Experiment, config: Any) -> None:
    """Raises `InvalidArgument` unless config.json can hold the config: `resume` builds it again from there.

    >>> from types import SimpleNamespace
    >>> Config = dataclasses.make_dataclass("Config", [("epochs", int, 1), ("lengths", Any, frozenset({3}))])
    >>> check_config(Experiment("mine", SimpleNamespace(Config=Config), Path("mine.py")), Config())
    Traceback (most recent call last):
    research.core.state.InvalidArgument: mine.py: Config.lengths is frozenset({3}), which is frozenset; expected finite ...
    """
    for name, value in dataclasses.asdict(config).items():
        if not _is_plain(value):
            raise InvalidArgument(
                f"{display_path(experiment.file)}: Config.{name} is {value!r}, which is {type(value).__name__}; expected "
                "finite numbers, strings, booleans, None, paths, or tuples and dicts of them, which config.json can hold."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str | Path)


def check_splits(experiment: Experiment, splits: Any) -> dict[str, Batches]:
    """Returns what `data` returned. Raises `InvalidArgument` unless it is a dict of `Batches` with "train"."""
    where = f"{display_path(experiment.file)}: data(config) returned"
    if not isinstance(splits, Mapping):
        raise InvalidArgument(f"{where} {type(splits).__name__}; expected a dict of splits, such as {{'train': batches}}.")
    if "train" not in splits:
        names = ", ".join(map(repr, splits)) or "no"
        raise InvalidArgument(f"{where} {names} splits; expected 'train' among them, and if there are any 'val' and 'test'.")
    for name, split in splits.items():
        if not (isinstance(name, str) and SPLIT.fullmatch(name)):
            raise InvalidArgument(
                f"{where} a split named {name!r}; expected letters, numbers, - and _, since logs and folders are named after it."
            )
        if not isinstance(split, Batches):
            raise InvalidArgument(
                f"{where} {type(split).__name__} as {name!r}; expected Batches, as from research.from_arrays or from_examples."
            )
    return dict(splits)


def check_learner(experiment: Experiment, learner: Any) -> Learner:
    """Returns what `build` returned. Raises `InvalidArgument` unless it is a `Learner`."""
    if not isinstance(learner, Learner):
        raise InvalidArgument(
            f"{display_path(experiment.file)}: build(config) returned {type(learner).__name__}; expected a research.Learner, "
            "as from research.supervised."
        )
    return learner


def check_models(experiment: Experiment, state: Any, build: Callable[[], dict[str, keras.Model]]) -> None:
    """Raises `InvalidArgument` for a model of `models` that a .keras file can't hold. Its config is tried, not its weights.

    Does nothing for a state with more than `MAX_PARAMETERS` parameters: building its models would take too long.
    """
    if not hasattr(experiment.module, "models") or count_parameters(state) > MAX_PARAMETERS:
        return
    for name, model in build().items():
        try:
            json.dumps(keras.saving.serialize_keras_object(model))
        except Exception as error:  # Keras and get_config of any layer raise what they like
            raise InvalidArgument(
                f"{display_path(experiment.file)}: models: {name!r} can't be saved as a .keras file ({type(error).__name__}: "
                f"{one_line(error, 300)}); give its own classes get_config and register them with "
                "keras.saving.register_keras_serializable, or leave it out of models."
            ) from error


def check_mapping(experiment: Experiment, config: Any) -> Any:
    """Returns the experiment's `weights_mapping`, None if it defines none. Raises `InvalidArgument` for another type."""
    if not hasattr(experiment.module, "weights_mapping"):
        return None
    mapping = experiment.module.weights_mapping(config)
    if not (callable(mapping) or isinstance(mapping, Mapping)):
        raise InvalidArgument(
            f"{display_path(experiment.file)}: weights_mapping(config) returned {type(mapping).__name__}; expected a dict or a "
            "function, from names of the state's leaves to names in a file."
        )
    return mapping

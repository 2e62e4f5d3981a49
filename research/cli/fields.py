"""Values of config fields: checked against their annotations and intervals, wherever they come from."""

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from research.core.state import InvalidArgument


class Interval(NamedTuple):
    """The numbers that a field may have, in the usual notation. `x in Interval(...)`; NaN is in none.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     dropout: typing.Annotated[float, Interval("[0, 1)")] = 0.5
    >>> 0.0 in Interval("[0, 1)"), 1.0 in Interval("[0, 1)"), math.inf in Interval("(0, inf)")
    (True, False, False)
    """

    text: str

    def __contains__(self, value: object) -> bool:
        low, high = (float(bound) for bound in self.text[1:-1].split(","))
        if not isinstance(value, int | float) or math.isnan(value):
            return False
        above = low < value or (self.text[0] == "[" and low == value)
        return above and (value < high or (self.text[-1] == "]" and value == high))


def check_fields(config: Any) -> None:
    """Raises `InvalidArgument` for the first field of a dataclass outside of the interval in its annotation.

    >>> Config = dataclasses.make_dataclass("Config", [("batch_size", typing.Annotated[int, Interval("[1, inf)")])])
    >>> check_fields(Config(0))
    Traceback (most recent call last):
    research.core.state.InvalidArgument: --batch-size 0: expected a value in [1, inf).
    """
    for name, annotation in annotations(type(config)).items():
        value = getattr(config, name)
        interval = outside(annotation, value)
        if interval is not None:
            shown = " ".join(map(str, value)) if isinstance(value, tuple | list) else value
            raise InvalidArgument(f"--{name.replace('_', '-')} {shown}: expected a value in {interval.text}.")


def outside(annotation: Any, value: Any) -> Interval | None:
    """Returns the interval of an annotation that does not contain a value; None if there is none.

    >>> outside(typing.Annotated[int, Interval("[1, inf)")] | None, 0)
    Interval(text='[1, inf)')
    >>> outside(typing.Annotated[int, Interval("[1, inf)")] | str, "auto")
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        intervals = [extra for extra in arguments[1:] if isinstance(extra, Interval)]
        return next((interval for interval in intervals if value not in interval), None)
    if origin in (typing.Union, types.UnionType) and value is not None and not (isinstance(value, str) and str in arguments):
        return next((interval for interval in (outside(a, value) for a in arguments) if interval is not None), None)
    if isinstance(value, tuple | list) and origin in (tuple, list):
        items = [arguments[0]] * len(value) if arguments[1:] in ((), (...,)) else arguments
        checked = (outside(item, element) for item, element in zip(items, value, strict=False))
        return next((interval for interval in checked if interval is not None), None)
    return None


def restore_config(config_class: type, values: Mapping[str, Any]) -> Any:
    """Builds a config from the values in config.json. A field that is annotated as a tuple or a path becomes one again.

    Raises `InvalidArgument` for a field that the class does not have, and for a value of another type than its annotation or
    outside of its interval. Annotations of other types than config.json can hold are not checked.

    >>> Config = dataclasses.make_dataclass("Config", [("sizes", tuple[int, ...]), ("rate", float)])
    >>> restore_config(Config, {"sizes": [3, 4], "rate": 0.1})
    Config(sizes=(3, 4), rate=0.1)
    >>> restore_config(Config, {"sizes": [3, 4], "rate": "high"})
    Traceback (most recent call last):
    research.core.state.InvalidArgument: rate is 'high'; expected a number
    """
    types_of = annotations(config_class)
    unknown = [name for name in values if name not in types_of]
    if unknown:
        raise InvalidArgument(f"there is no field {_short(unknown[0])}; expected {', '.join(types_of)}")
    restored = {}
    for name, value in values.items():
        try:
            restored[name] = _restore(types_of[name], value)
        except _Mismatch as mismatch:
            raise InvalidArgument(f"{name} is {_short(value)}; expected {mismatch}") from None
        interval = outside(types_of[name], restored[name])
        if interval is not None:
            raise InvalidArgument(f"{name} is {_short(value)}; expected a value in {interval.text}")
    try:
        return config_class(**restored)
    except Exception as error:  # a field without a default is missing, or __post_init__ raises what it likes
        raise InvalidArgument(f"it can't be built ({' '.join(str(error).split())[:300]})") from error


def read_value(annotation: Any, text: str) -> Any:
    """Returns a text of the command line as a value of an annotation. Raises `InvalidArgument` if it is none.

    >>> read_value(float | None, "1e-3"), read_value(float | None, "None"), read_value(typing.Literal["mlp", "cnn"], "cnn")
    (0.001, None, 'cnn')
    >>> read_value(int, "0.5")
    Traceback (most recent call last):
    research.core.state.InvalidArgument: expected a whole number, got '0.5'
    """
    expected = ""
    for value in (*_literals(text), text):
        try:
            return _restore(annotation, value)
        except _Mismatch as mismatch:
            expected = str(mismatch)
    raise InvalidArgument(f"expected {expected}, got {text[:80]!r}")


def _literals(text: str) -> list[Any]:
    """Returns a text as a number, a boolean or None; nothing if it is none of them."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [value] if value is None or isinstance(value, bool | int | float) else []


class _Mismatch(Exception):
    """A value does not have the type of an annotation: what was expected."""


def annotations(config_class: type) -> dict[str, Any]:
    """Returns the annotation of each field that the constructor takes, with its interval.

    >>> annotations(dataclasses.make_dataclass("Config", [("epochs", int)]))
    {'epochs': <class 'int'>}
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(config_class) if field.init}


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + " ..."


def _restore(annotation: Any, value: Any) -> Any:
    """Returns a value of config.json as the type of an annotation. Raises `_Mismatch` if it isn't one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _restore(arguments[0], value)
    if origin in (typing.Union, types.UnionType):
        return _restore_union(arguments, value)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _Mismatch(" or ".join(map(repr, arguments)))
    if tuple in (annotation, origin):
        return _restore_tuple(arguments, value)
    if list in (annotation, origin) and isinstance(value, list):
        return [_restore(arguments[0] if arguments else Any, element) for element in value]
    if dict in (annotation, origin) and isinstance(value, dict):
        return {key: _restore(arguments[1] if arguments else Any, element) for key, element in value.items()}
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _restore_dataclass(annotation, value)
    expected_type = origin or annotation
    if expected_type not in _EXPECTED:  # anything, or a type that config.json can't hold
        return value
    if isinstance(value, expected_type) and (expected_type is bool or not isinstance(value, bool)):
        return value
    raise _Mismatch(_EXPECTED[expected_type])


_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    types.NoneType: "null",
    list: "a list",
    dict: "an object",
    Path: "a path",
}


def _restore_dataclass(config_class: type, value: Any) -> Any:
    if not isinstance(value, dict):
        raise _Mismatch(_EXPECTED[dict])
    try:
        return restore_config(config_class, value)
    except InvalidArgument as error:
        raise _Mismatch(f"a {config_class.__name__}: {error}") from None


def _restore_union(alternatives: tuple[Any, ...], value: Any) -> Any:
    """Returns the value as one of the alternatives: a text as a path, a list as a tuple, a number as it is."""
    restored, expected = [], []
    for alternative in alternatives:
        try:
            restored.append(_restore(alternative, value))
        except _Mismatch as mismatch:
            expected.append(str(mismatch))
    if not restored:
        raise _Mismatch(" or ".join(dict.fromkeys(expected)))
    converted = isinstance(value, str | list | dict)
    return next((result for result in restored if (type(result) is not type(value)) == converted), restored[0])


def _restore_tuple(items: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _Mismatch("a list")
    if not items or items[1:] == (...,):
        items = (*items[:1], Any)[:1] * len(value)
    if len(items) != len(value):
        raise _Mismatch(f"a list of {len(items)}")
    return tuple(_restore(item, element) for item, element in zip(items, value, strict=True))

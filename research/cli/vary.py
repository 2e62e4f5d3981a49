"""`--vary learning_rate=log:1e-4:1e-1,units=64:128`: which fields of a config differ between members or trials, and how."""

import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.cli.fields import outside, read_value
from research.core.state import InvalidArgument

_RANGE = re.compile(r"(log|linear):([^:]*):([^:]*)")


class Range(NamedTuple):
    """Numbers from `low` to `high`, by equal factors, `log`, or by equal differences."""

    log: bool
    low: Any
    high: Any


class Varied(NamedTuple):
    """One part of `--vary`, `FIELD=...`: the part itself, the field and its annotation, and what follows the sign."""

    part: str
    field: str
    annotation: Any
    text: str


def parse_vary(vary: str, types_of: Mapping[str, Any], fixed: Mapping[str, str] | None = None) -> list[Varied]:
    """Returns the parts of `--vary`. Raises `InvalidArgument` for a field that there is not, twice, or that is `fixed`, and why.

    >>> [(each.field, each.text) for each in parse_vary("seed,rate=log:1e-4:1", {"seed": int, "rate": float})]
    [('seed', ''), ('rate', 'log:1e-4:1')]
    """
    fixed, found = fixed or {}, dict[str, Varied]()
    for part in vary.split(","):
        name, _, text = (side.strip() for side in part.partition("="))
        name = name.replace("-", "_")
        if name in fixed:
            raise InvalidArgument(f"--vary {part}: {fixed[name]}")
        if name not in types_of:
            fields = [field for field in types_of if field not in fixed]
            nearest = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"expected one of {', '.join(fields)}."
            raise InvalidArgument(f"--vary {part}: there is no field {name[:80]!r}: {hint}")
        if name in found:
            raise InvalidArgument(f"--vary {vary}: {name} is there twice; expected each field once.")
        found[name] = Varied(part.strip(), name, types_of[name], text)
    return list(found.values())


def listed(text: str) -> list[str]:
    """Returns the texts of a list of values, A:B:C, or A|B|C if there is a : in them.

    >>> listed("64:128"), listed("gs://a|gs://b")
    (['64', '128'], ['gs://a', 'gs://b'])
    """
    return text.split("|") if "|" in text else text.split(":")


def is_range(text: str) -> bool:
    """Returns whether a text is a range, log:LOW:HIGH or linear:LOW:HIGH.

    >>> is_range("log:1e-4:1e-1"), is_range("64:128")
    (True, False)
    """
    return _RANGE.fullmatch(text) is not None


def read_range(varied: Varied) -> Range:
    """Returns the range of a field. Raises `InvalidArgument` if the field is no number or can't have the bounds.

    >>> read_range(Varied("rate=log:1e-4:1", "rate", float, "log:1e-4:1"))
    Range(log=True, low=0.0001, high=1.0)
    """
    match = _RANGE.fullmatch(varied.text)
    assert match is not None
    low, high = read_values(varied._replace(annotation=float), [match[2], match[3]])
    if number_type(varied.annotation) is None:
        raise InvalidArgument(f"--vary {varied.part}: it is not a number; expected {varied.field}=A:B:C.")
    if match[1] == "log" and min(low, high) <= 0:
        raise InvalidArgument(f"--vary {varied.part}: expected bounds above 0, or linear:LOW:HIGH.")
    return Range(match[1] == "log", low, high)


def read_values(varied: Varied, texts: Sequence[str]) -> list[Any]:
    """Returns texts as values of a field. Raises `InvalidArgument` for one that it can't have.

    >>> read_values(Varied("units=64:128", "units", int, "64:128"), ["64", "128"])
    [64, 128]
    """
    try:
        values = [read_value(varied.annotation, text.strip()) for text in texts]
    except InvalidArgument as error:
        raise InvalidArgument(f"--vary {varied.part}: {error}.") from None
    for value in values:
        interval = outside(varied.annotation, value)
        if interval is not None:
            raise InvalidArgument(f"--vary {varied.part}: {value} is outside of {interval.text}.")
    return values


def number_type(annotation: Any) -> type | None:
    """Returns whether values of an annotation are whole numbers, `int`, other numbers, `float`, or none.

    >>> number_type(float | None), number_type(typing.Annotated[int, "count"]), number_type(bool), number_type(str | None)
    (<class 'float'>, <class 'int'>, None, None)
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return number_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [number_type(each) for each in arguments]
        return float if float in kinds else int if int in kinds else None
    return annotation if annotation in (int, float) else None

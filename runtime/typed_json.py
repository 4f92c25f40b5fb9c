"""JSON -> frozen dataclasses by their annotations, every type checked: for files that anybody may have written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def decode(kind: Any, value: Any, where: str = "it") -> Any:
    """``value``, as ``json.loads`` gives it, as a ``kind``: a dataclass, tuple[...], Mapping[str, ...], a union, Any,
    str, int, float, bool or None. ``where`` names the value in messages.

    Raises TypeError for another type, a missing or an unknown field; ValueError where a dataclass refuses a value, or a
    number is not finite.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is Mapping:
        fields = _instance(dict, value, where)
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in fields.items()}
    if kind is float:  # JSON does not tell 1.0 from 1, and Python reads 1e400 and NaN
        number = _instance((int, float), value, where)
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}, no finite number")
        return number
    return _instance(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    fields = _instance(dict, value, where)
    unknown = sorted(set(fields) - set(hints))
    if unknown:
        raise TypeError(f"{where} has an unknown field {unknown[0]!r}")
    return kind(**{key: decode(hints[key], item, f"{where}.{key}") for key, item in fields.items()})


def _decode_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _instance(list, value, where)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        raise TypeError(f"{where} has {len(items)} items, not {len(kinds)}")
    return tuple(
        decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Of None and one other kind."""
    (kind,) = (each for each in kinds if each is not NoneType)
    return None if value is None else decode(kind, value, where)


def _instance(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{where} is of type {type(value).__name__}, not {wanted}")
    return value

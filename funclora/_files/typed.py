"""The values of a JSON file, checked and converted to the types of a program."""

from __future__ import annotations

import contextlib
import dataclasses
import reprlib
import types
import typing
from typing import Any

from funclora.errors import FormatError

# The bits of the largest integer: other programs use 64-bit integers, and no file needs more.
_BITS = 63


def as_type(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a value of a type, strictly: an integer is not a flag, and no key is missing or unknown.

    Args:
        kind: a dataclass, `list[...]`, `tuple[...]`, `dict[..., ...]`, a union, or a plain type. The keys of a dict may
            be integers, which JSON stores as texts.
        value: a value that `json` read from a file.
        where: the file and the place in it, for messages.

    Raises:
        FormatError: the value does not have that type.

    Examples:
        >>> as_type(dict[int, tuple[int, float]], {"3": [1, 0.5]}, "state.json")
        {3: (1, 0.5)}
        >>> as_type(int | None, "", "state.json: best")
        Traceback (most recent call last):
        funclora.errors.FormatError: state.json: best: expected int or None, got ''.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _union(parts, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _fields(kind, value, where)
    if origin is list and isinstance(value, list):
        return [as_type(parts[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(parts):
        return tuple(as_type(part, item, where) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {
            _key(parts[0], key, where): as_type(parts[1], item, f"{where}[{key!r:.40}]") for key, item in value.items()
        }
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and _fits(value):
        return float(value)
    if kind is int and type(value) is int and _fits(value):
        return value
    if kind is Any or (kind in (str, bool) and type(value) is kind) or (kind in (None, type(None)) and value is None):
        return value
    raise FormatError(f"{where}: expected {_name(kind)}, got {reprlib.repr(value)}.")


def _union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        with contextlib.suppress(FormatError):
            return as_type(kind, value, where)
    raise FormatError(f"{where}: expected {' or '.join(map(_name, kinds))}, got {reprlib.repr(value)}.")


def _fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    odd = [name for name in names if name not in value] + [name for name in value if name not in hints]
    if odd:
        raise FormatError(f"{where}: expected {', '.join(names)}; {reprlib.repr(odd[0])} is missing or unknown.")
    return kind(**{name: as_type(hints[name], value[name], f"{where}: {name}") for name in names})


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is not int:
        return key
    if not (key.isascii() and key.isdigit() and len(key) <= len(str(1 << _BITS)) and str(int(key)) == key):
        raise FormatError(f"{where}: expected integers as names, got {reprlib.repr(key)}.")
    return int(key)


def _fits(number: float) -> bool:
    return not isinstance(number, int) or number.bit_length() <= _BITS


def _name(kind: Any) -> str:
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))

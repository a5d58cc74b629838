"""Strict JSON: what Python's reader accepts beyond the standard, or silently drops, is an error."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from typing import Any

from funclora.errors import FormatError


def parse(text: str, where: str, expected: str = "JSON") -> Any:
    """The value of a JSON text, strictly: no repeated name in an object, no NaN or infinity, no lone surrogates.

    Raises:
        FormatError: it is not such a text; the message begins with `where`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        reason = error.msg.removesuffix(" at")
        raise FormatError(f"{where}: expected {expected}: {reason} at {line}column {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: expected {expected}: {str(error).splitlines()[0]}.") from error
    if "\\u" in text:
        half = next((string for string in _strings(value) if not _whole(string)), None)
        if half is not None:
            raise FormatError(
                f"{where}: {reprlib.repr(half)} contains half of a surrogate pair, which is not a character."
            )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {reprlib.repr(twice)} appears twice in an object")
    return fields


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{reprlib.repr(digits)} is too large for a number")
    return value


def _strings(value: Any) -> Iterator[str]:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list):
            todo += item


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

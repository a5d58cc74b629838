"""Copies of objects that a forward pass may write to besides tensors and containers: arrays, generators, helpers.

The functions here do not handle modules. A value of a kind that no function here handles is shared with the original.
"""

from __future__ import annotations

import array
import ast
import copy
import copyreg
import io
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Packages whose objects are compared by identity (operators, process groups, locks, loggers): a copy would differ.
_BY_IDENTITY = frozenset(
    ("torch", "triton", "threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref")
)


def copied_leaf(value: Any) -> Any:
    """A copy of an array, a random generator or a counter, which refer to nothing else; None for other values."""
    for kinds, copied in (*_LEAVES.items(), *_numpy_leaves()):
        if issubclass(type(value), kinds):  # not isinstance, which may run code of the model
            return copied(value)
    return None


def is_one_way(value: Any) -> bool:
    """Whether a value can only be read once: a generator, an iterator in C. Files are not state of the model."""
    kind = type(value)
    one_way = hasattr(kind, "__next__") or hasattr(kind, "__anext__")
    return one_way and not issubclass(kind, io.IOBase) and not _slots(value) and not _dict(value)


def copied_object(value: Any) -> Any:
    """A shallow copy of a helper object, without running code of its class where that is possible.

    Returns:
        The copy; None if it has no attributes, is compared by identity, or owns a resource that ends with it.
    """
    kind: Any = type(value)
    if kind.__module__.partition(".")[0] in _BY_IDENTITY or hasattr(kind, "__del__"):
        return None
    attributes, slots = _dict(value), _slots(value)
    if not attributes and not slots:
        return None
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    try:
        if not plain or hasattr(kind, "__copy__"):
            new = copy.copy(value)
            return None if new is value else new
        new = object.__new__(kind)
        if attributes:
            _dict(new).update(attributes)
        for name, part in slots.items():
            object.__setattr__(new, name, part)
    except Exception:  # noqa: BLE001  the class may raise any error
        return None
    return new


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object, in its dict or in slots."""
    return _dict(value) | _slots(value)


def set_attribute(value: Any, name: str, part: Any) -> None:
    """Set an attribute without code of the object's class, unless it is a slot."""
    if name in copyreg._slotnames(type(value)):  # type: ignore[attr-defined]
        object.__setattr__(value, name, part)
    else:
        _dict(value)[name] = part


def _dict(value: Any) -> dict[str, Any]:
    try:
        attributes: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes


def _slots(value: Any) -> dict[str, Any]:
    names = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _random(value: random.Random) -> random.Random | None:
    return None if isinstance(value, random.SystemRandom) else copy.copy(value)  # SystemRandom has no state


def _generator(value: torch.Generator) -> torch.Generator:
    return torch.Generator(value.device).set_state(value.get_state())


def _count(value: Any) -> Any:
    # Python no longer copies counters; their repr contains the arguments that make them.
    arguments = ast.literal_eval(repr(value).removeprefix("count"))
    return itertools.count(*(arguments if isinstance(arguments, tuple) else (arguments,)))


_LEAVES: dict[Any, Callable[[Any], Any]] = {
    (bytearray, array.array): copy.copy,
    random.Random: _random,
    torch.Generator: _generator,
    itertools.count: _count,
}


def _numpy_leaves() -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield numpy.ndarray, lambda value: None if isinstance(value, numpy.memmap) else value.copy()
        yield (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator), copy.deepcopy

"""The rule of a part of a weight, so that a weight can be rewritten piece by piece."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from funclora.errors import UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.dense import Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Conv, Matrices
from funclora.rules.low_rank import LowRank

Shape = tuple[int, ...]


def can_narrow(rule: Rule, shape: Shape, dim: int) -> bool:
    """True if a rule of a weight of that shape has a part for each slice along a dimension."""
    if isinstance(rule, Full):
        return True
    if not isinstance(rule, LowRank):
        return False
    if isinstance(rule.layout, Conv):
        return dim == 0
    if not isinstance(rule.layout, Matrices):
        return False
    return not (isinstance(rule, DoRA) and dim == _in_dim(rule, shape))  # its norm needs the whole of an output unit


def narrowed(rule: Rule, shape: Shape, dim: int, start: int, length: int) -> Rule:
    """The rule of `weight.narrow(dim, start, length)`.

    Args:
        rule: the rule of a weight.
        shape: the shape of that weight.
        dim: the dimension, counted from the front.
        start: the first slice.
        length: how many.

    Raises:
        UnsupportedError: that part has no rule of its own.
    """
    if start == 0 and length == shape[dim]:
        return rule
    if not can_narrow(rule, shape, dim):
        raise UnsupportedError(f"{type(rule).__name__} has no part along dimension {dim} of a weight {list(shape)}.")
    if isinstance(rule, Full):
        return replace(rule, value=rule.value.narrow(dim, start, length))
    assert isinstance(rule, LowRank)

    def cut(names: tuple[str, ...], at: int) -> dict[str, Any]:
        return {name: getattr(rule, name).narrow(at, start, length) for name in names}

    vectors = rule.leaf_names[2:]
    if isinstance(rule.layout, Conv):
        return replace(rule, **cut(("b", *vectors), 0))
    if dim < len(shape) - 2:  # one of several matrices
        return replace(rule, **cut(rule.leaf_names, dim))
    if dim == _in_dim(rule, shape):
        return replace(rule, **cut(("a",), -1))
    return replace(rule, **cut(("b",), -2), **cut(vectors, -1))


def _in_dim(rule: LowRank, shape: Shape) -> int:
    """The dimension of a weight that counts inputs."""
    return len(shape) - (2 if rule.layout.transposed else 1)

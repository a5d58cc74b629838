"""Rewriting the tensors of a checkpoint block by block, so that whole weights are in memory only where necessary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from funclora._bind.merge import refuse_nonfinite
from funclora._files.safetensors import certainly_within
from funclora._torch.pytree import map_tensors
from funclora.errors import NonFiniteError, UnsupportedError
from funclora.io.hf.structure import Part, Shape
from funclora.rules.base import Rule
from funclora.rules.low_rank import low_rank_of

# Elements of a weight that are computed together, so that they stay in a core's cache from reading to rounding.
BLOCK = 2**19

Read = Callable[[str, int, int], Tensor]


class PartRewriter:
    """Computes the new values of a part of a parameter, slice by slice of its tensor.

    Args:
        part: the part.
        rules: the rules of the whole parameter, applied one after the other in the compute dtype.
        whole: the shape of the parameter.
        read: `(key, first, length)` -> slices of a tensor of the checkpoint, along its first dimension.
        double: compute in float64.
    """

    def __init__(self, part: Part, rules: Sequence[Rule], whole: Shape, read: Read, *, double: bool = False) -> None:
        self._part, self._read, self._double = part, read, double
        shape = [*whole]
        for dim, start, length in part.cuts:
            rules = [_narrowed(rule, tuple(shape), dim, start, length) for rule in rules]
            shape[dim] = length
        self._shape = tuple(shape)
        # The dimension of the parameter that is the tensor's first one: those before it have length 1.
        self._dim = len(shape) - len(part.shape)
        if double:
            rules = [map_tensors(Tensor.double, rule) for rule in rules]
        rules = [self._prepared(rule) for rule in rules]
        self._rules = rules
        self.divisible = bool(part.shape) and all(map(self._is_divisible, rules))

    def _is_divisible(self, rule: Rule) -> bool:
        """True if the rule has a part for each slice."""
        return rule.narrow(self._shape, self._dim, 0, 0) is not None

    def _prepared(self, rule: Rule) -> Rule:
        """A rule without a part for each slice, as DoRA if its norms run across them, after it saw the whole weight."""
        if not self._part.shape or self._is_divisible(rule) or low_rank_of(rule) is None:
            return rule
        weight = self._base(0, self._part.shape[0])
        return rule.prepared(weight.double() if self._double else weight)

    def blocks(self) -> list[tuple[int, int]]:
        """`(first slice, number of slices)` of each block, counted from the part's beginning."""
        n = self._part.shape[0] if self._part.shape else 1
        size = n
        if self.divisible:
            size = max(1, BLOCK // max(1, torch.Size(self._part.shape[1:]).numel()))
        return [(i, min(size, n - i)) for i in range(0, n, size)]

    def dense(self, first: int, length: int) -> tuple[Tensor, Tensor]:
        """The base weight and the rewritten one, before it is rounded, at some slices: `[length, ...]` both."""
        base = self._base(first, length)
        value = base
        for rule in self._rules:
            own = _narrowed(rule, self._shape, self._dim, first, length) if self.divisible else rule
            value = own.dense(value)
        return base.reshape(length, *self._part.shape[1:]), value.reshape(length, *self._part.shape[1:])

    def _base(self, first: int, length: int) -> Tensor:
        values = self._read(self._part.key, self._part.first + first, length)
        return values.reshape(*self._shape[: self._dim], length, *self._shape[self._dim + 1 :])


def _narrowed(rule: Rule, shape: Shape, dim: int, start: int, length: int) -> Rule:
    part = rule.narrow(shape, dim, start, length)
    if part is None:
        raise UnsupportedError(
            f"{type(rule).__name__} cannot be split along dimension {dim} of a weight {list(shape)}."
        )
    return part


def rounded(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in their final dtype, contiguous.

    Raises:
        NonFiniteError: a value is NaN or infinite, or too large for the dtype.
    """
    result = value.to(dtype).contiguous()
    if not certainly_within(value, torch.finfo(dtype).max):
        refuse_nonfinite(name, value, result)
    return result


def cast(value: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A weight without an adapter, in another dtype; NaN and infinity in it are kept.

    Raises:
        NonFiniteError: a value is too large for the dtype.
    """
    changed = value.to(dtype)
    if (torch.isfinite(value) & ~torch.isfinite(changed)).any():
        raise NonFiniteError(f"{key!r} contains values that are too large for {dtype}. Choose a wider dtype.")
    return changed


def ranges(length: int, row_elements: int) -> Iterator[tuple[int, int]]:
    """`(first, number)` of the blocks that a tensor of so many slices is cut into."""
    size = max(1, BLOCK // max(1, row_elements))
    for first in range(0, length, size):
        yield first, min(size, length - first)

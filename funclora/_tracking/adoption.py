"""Memory that belonged to nobody, to which a model writes values of known owners: fresh buffers, caches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funclora._tracking.calls import Owner
from funclora._tracking.owners import Place, index_of, settled


@dataclass(frozen=True)
class Adopted:
    """Memory with owners.

    Attributes:
        storage: the memory, held so that its address is not used again.
        shape: the shape of the tensor that all its views show parts of, without gaps.
        strides: its strides, in any order of the dimensions.
        offset: where it begins.
        owner: its owners.
    """

    storage: Any
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    owner: Owner

    @classmethod
    def of(cls, x: Tensor, owner: Owner, before: Adopted | None) -> Adopted | None:
        """The memory of x after values of those owners were written to it; None if other owners were there."""
        base = x if x._base is None else x._base
        if not _is_dense(base):
            return None
        if x._base is not None:
            at = _dim_in(base, x, owner.dim) if isinstance(owner, Place) else None
            if at is None:
                return None
            owner = Place(at, owner.inner)  # type: ignore[union-attr]
        adopted = cls(base.untyped_storage(), base.shape, base.stride(), int(base.storage_offset()), owner)
        if before is not None and before.layout() != adopted.layout():
            return None
        grows = before is None or before.owner == owner or (x._base is None and not isinstance(before.owner, Place))
        return adopted if grows else None

    def layout(self) -> tuple[Any, ...]:
        return self.shape, self.strides, self.offset

    def owner_of(self, x: Tensor, n: int) -> Owner | None:
        """The owners of a view of this memory; None if they cannot be found."""
        if (x.shape, x.stride(), x.storage_offset()) == self.layout():
            return self.owner
        if x.dtype.itemsize * math.prod(self.shape) > self.storage.nbytes():
            return None
        index = torch.empty_strided(self.shape, self.strides, dtype=torch.int32)
        index.copy_(index_of(self.owner, n, len(self.shape)).expand(self.shape))
        if x.storage_offset() < self.offset:
            return None
        return settled(index.as_strided(x.shape, x.stride(), x.storage_offset() - self.offset), n, False)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in any order of the dimensions."""
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def _dim_in(base: Tensor, x: Tensor, dim: int) -> int | None:
    """The dimension of a tensor that a dimension of its view shows completely."""
    for d, stride in enumerate(base.stride()):
        if stride == x.stride(dim) and base.shape[d] == x.shape[dim]:
            # The view begins inside of one step along this dimension.
            return d if (x.storage_offset() - base.storage_offset()) % (stride * base.shape[d]) < stride else None
    return None

"""Who a position of a tensor belongs to: the same for all operations, static or by index.

An *owner* is a number: a row of the batch, or with ids for each token one of the members that they name. Most tensors
hold the owners in order along one dimension, which a `Place` says. `Owners` say it position by position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ANYONE = -1


class Place(NamedTuple):
    """The owners are along `dim`, one after the other, `inner` positions each."""

    dim: int
    inner: int


class Owners:
    """The owner of each position, where no `Place` says it. Compared by identity.

    Attributes:
        index: whole numbers, with as many dimensions as the tensor, of size 1 where the owner does not vary; -1 for a
            position that holds no values of any owner.
        lasting: the same in every call of the model, so results of operations on it are remembered.
        plans: what others derive from them.
    """

    __slots__ = ("index", "lasting", "plans")

    def __init__(self, index: Tensor, lasting: bool) -> None:
        self.index = index
        self.lasting = lasting
        self.plans: dict[Any, Any] = {}

    def varying(self) -> list[int]:
        """The dimensions along which the owner varies."""
        return [d for d, size in enumerate(self.index.shape) if size > 1]

    def with_dims(self, dims: int) -> Owners:
        """The owners of a tensor with dimensions of size 1 after the last."""
        missing = dims - self.index.dim()
        if not missing:
            return self
        if missing not in self.plans:
            self.plans[missing] = Owners(self.index.reshape(*self.index.shape, *[1] * missing), self.lasting)
        wider: Owners = self.plans[missing]
        return wider

    def __repr__(self) -> str:
        return f"Owners({list(self.index.shape)})"


class Lost(str):
    """The operation that lost the owners, and the line of the model that called it."""

    __slots__ = ("where",)
    where: str

    @classmethod
    def at(cls, operation: str, where: str) -> Lost:
        lost = cls(operation)
        lost.where = where
        return lost


class LostError(Exception):
    """An operation mixes positions of several owners, or is unknown; or its argument was lost before, by `cause`."""

    def __init__(self, cause: str | None = None) -> None:
        super().__init__()
        self.cause = cause


def in_order(n: int, inner: int, device: torch.device | str = "cpu") -> Tensor:
    """`[n·inner]`: the owners one after the other."""
    return torch.arange(n, dtype=torch.int32, device=device).repeat_interleave(inner)


_in_order = functools.lru_cache(maxsize=256)(in_order)


def index_of(owner: Place | Owners, n: int, dims: int, device: torch.device | None = None) -> Tensor:
    """The owners of a tensor with that many dimensions, of size 1 where they do not vary."""
    if isinstance(owner, Place):
        kept = device is None or device.type == "cpu"
        found = _in_order(n, owner.inner) if kept else in_order(n, owner.inner, device or "cpu")
        return found.view([-1 if d == owner.dim else 1 for d in range(dims)])
    return owner.index if device is None else owner.index.to(device)


def settled(index: Tensor, n: int, lasting: bool, like: Place | Owners | None = None) -> Place | Owners:
    """The owners of a tensor as a `Place` if there is one.

    Args:
        index: the owner of each position, expanded or not.
        n: the number of owners.
        lasting: as in `Owners`.
        like: owners from which these were computed, returned if they are the same.
    """
    for d, size in enumerate(index.shape):
        if size > 1 and (index.stride(d) == 0 or bool((index == index.narrow(d, 0, 1)).all())):
            index = index.narrow(d, 0, 1)
    if isinstance(like, Owners) and (_is_same(index, like.index) or torch.equal(index, like.index)):
        return like
    varying = [d for d, size in enumerate(index.shape) if size > 1]
    if len(varying) == 1 and index.shape[varying[0]] % n == 0:
        inner = index.shape[varying[0]] // n
        if torch.equal(index.flatten(), in_order(n, inner, index.device)):
            return Place(varying[0], inner)
    return Owners(index, lasting)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def merged(owners: Sequence[Tensor], dims: int) -> Tensor:
    """The owners of a tensor that combines others element by element; `ANYONE` agrees with every owner.

    Args:
        owners: for each tensor its owners.
        dims: the number of dimensions of the result.

    Raises:
        LostError: the tensors belong to different owners at some position.
    """
    found = owners[0]
    for given in owners[1:]:
        if _is_same(found, given):
            continue
        one, other = torch.broadcast_tensors(found, given.to(found.device))
        if bool(((one != other) & (one >= 0) & (other >= 0)).any()):
            raise LostError
        found = torch.where(one < 0, other, one)
    return found.reshape((1,) * (dims - found.dim()) + tuple(found.shape))


def reshaped(index: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The owners of a tensor of shape `old` in the shape `new`: only what varies is written out."""
    parts: list[list[int]] = []  # pieces of the old shape, each with as many elements as one of the new shape
    sizes: list[int] = []
    i = 0
    for start, stop, piece in _pieces(old, new):
        varies = any(index.shape[d] > 1 for d in range(start, stop))
        parts.append(list(old[start:stop] if varies else [1] * (stop - start)))
        sizes += piece if varies else [1] * len(piece)
        i = stop
    assert i == len(old)
    return index.expand([size for part in parts for size in part]).reshape(sizes)


def _pieces(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """The shortest runs of dimensions `old[start:stop]` that hold as many elements as runs of the new dimensions."""
    if 0 in old:
        return [(0, len(old), list(new))]
    found: list[tuple[int, int, list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, first = i, j
        have = want = 1
        while have != want or (i == start and j == first):
            if have <= want and i < len(old):
                have *= old[i]
                i += 1
            elif j < len(new):
                want *= new[j]
                j += 1
            else:
                have *= old[i]
                i += 1
        found.append((start, i, list(new[first:j])))
    return found

"""Operations that move positions: the owners move with them.

Each is done to the owners too. Only the dimensions along which the owner varies are written out, so this costs little
for large tensors, and nothing is read from the values of a tensor where they decide nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclora._torch.functions import named
from funclora._tracking.calls import OpCall, Owner, Places
from funclora._tracking.owners import ANYONE, LostError, Place, merged, reshaped

Propagation = Callable[[OpCall], Places]
_WHOLE = slice(None)


def reshape(call: OpCall) -> Places:
    """view, reshape, flatten: the elements keep their order."""
    if not call.is_tracked(call.x):
        return None  # view_as and reshape_as read only the shape of the other
    owner, old, new = call.owner_of(call.x), call.x.shape, call.out.shape
    if math.prod(old) != math.prod(new):
        raise LostError  # a view of another dtype
    if isinstance(owner, Place):
        before, passed = math.prod(old[: owner.dim]), 1
        for i, size in enumerate(new):
            if passed == before and size and size % call.n == 0:
                return Place(i, size // call.n)
            passed *= size
    _eager()
    return call.settled(reshaped(call.index(call.x), old, new))


def view(func: Callable[..., Any]) -> Propagation:
    """Views that move, cut or add dimensions: applied to the owners, which have stride 0 where they do not vary."""

    def propagation(call: OpCall) -> Places:
        if not call.is_tracked(call.x) and func in _LIKE_ANOTHER:
            return None  # only the shape of the other is read
        owner = call.owner_of(call.x)
        if isinstance(owner, Place):
            places = _of_whole(func, call, owner)
            if places is not None:
                return places
        _eager()
        out = _applied(func, call, call.index(call.x).expand(call.x.shape))
        return call.settled(out) if isinstance(out, Tensor) else tuple(map(call.settled, out))

    return propagation


_LIKE_ANOTHER = named("expand_as")


def _of_whole(func: Callable[..., Any], call: OpCall, place: Place) -> Places:
    """The places in views that show all rows in order; None if one does not."""
    size = call.x.shape[place.dim]
    strides = [0] * call.x.dim()
    strides[place.dim] = 1
    out = _applied(func, call, torch.empty_strided(call.x.shape, strides, device="meta"))
    found = []
    for each in (out,) if isinstance(out, Tensor) else out:
        dims = [i for i, stride in enumerate(each.stride()) if stride == 1 and each.shape[i] == size]
        if len(dims) != 1:
            return None
        found.append(Place(dims[0], place.inner))
    return found[0] if isinstance(out, Tensor) else tuple(found)


def _applied(func: Callable[..., Any], call: OpCall, index: Tensor) -> Any:
    kwargs = {name: value for name, value in call.kwargs.items() if value is not call.x}
    return func(index, *call.args[1:], **kwargs)


def _eager() -> None:
    """The compiler cannot trace owners that are compared by value."""
    if torch.compiler.is_compiling():
        raise LostError


_sliced = view(Tensor.__getitem__)


_UNKNOWN = -2


def strided(call: OpCall) -> Places:
    """as_strided: any parts of the tensor in memory, which may overlap; its owners are laid out in memory as it is."""
    x, out = call.x, call.out
    index = call.index(x)
    _eager()
    if not x.numel() or not out.numel():
        raise LostError
    start = out.storage_offset() - x.storage_offset()
    memory = index.new_full((max(_last(x), start + _last(out)) + 1,), _UNKNOWN)
    as_x = memory.as_strided(x.shape, x.stride())
    as_x.copy_(index.expand(x.shape))
    found = memory.as_strided(out.shape, out.stride(), start) if start >= 0 else memory
    if start < 0 or not bool((as_x == index).all()) or bool((found == _UNKNOWN).any()):
        raise LostError  # positions that share memory, or memory outside of the tensor
    return call.settled(found)


def _last(x: Tensor) -> int:
    """How far from its first element the last one is in memory."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def indexed(call: OpCall) -> Places:
    """x[index]: the owners of x, whoever the index belongs to; the owners of the index if x is a table of its own."""
    parts = list(call.args[1]) if isinstance(call.args[1], tuple) else [call.args[1]]
    if any(isinstance(part, bool) for part in parts):
        raise LostError
    if not call.is_tracked(call.x):
        return _looked_up(call, parts)
    owner = call.owner_of(call.x)
    if all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in parts):
        return _sliced(call)
    _eager()
    index = call.index(call.x)
    parts = _with_dims(parts, call.x.dim())
    moved: list[tuple[int, int]] = []  # the advanced parts, and the first dimension of each
    dim = 0
    for i, part in enumerate(parts):
        if not isinstance(part, (slice, type(None))):
            moved.append((i, dim))
        dim += _consumed(part)
    chosen = [d for i, first in moved for d in range(first, first + _consumed(parts[i]))]
    by_value = any(index.shape[d] > 1 for d in chosen)
    if by_value:
        tensor = next(x for x in (*call.tensors, *(p for p in parts if isinstance(p, Tensor))) if x is not call.x)
        index = call.index(call.x, tensor)
        index = index.expand([call.x.shape[d] if d in chosen else size for d, size in enumerate(index.shape)])
    ones = max([1 if _is_mask(parts[i]) else parts[i].dim() for i, _ in moved])
    done: list[Any] = []
    dim = 0
    for part in parts:
        if part is None:
            done.append(None)
        elif isinstance(part, slice):
            done.append(part if index.shape[dim] > 1 else _WHOLE)
        elif by_value:
            done.append(call.values(part))
        else:  # which positions are taken does not matter
            done += [torch.zeros([1] * ones, dtype=torch.long)] * _consumed(part)
        dim += _consumed(part)
    found = index[tuple(done)]
    return call.settled(found) if by_value or not isinstance(owner, Place) else _at(call, found, owner)


def _at(call: OpCall, index: Tensor, owner: Place) -> Owner:
    """The place of owners that kept their order; a cheaper `settled`."""
    dims = [d for d, size in enumerate(index.shape) if size > 1]
    whole = len(dims) == 1 and index.shape[dims[0]] == call.x.shape[owner.dim]
    return Place(dims[0], owner.inner) if whole else call.settled(index)


def _with_dims(parts: list[Any], dims: int) -> list[Any]:
    """The parts of an index, one for each dimension: the ellipsis written out, lists and numbers as tensors."""
    if any(part is Ellipsis for part in parts):
        i = next(i for i, part in enumerate(parts) if part is Ellipsis)
    else:
        i, parts = len(parts), [*parts, Ellipsis]
    missing = dims - sum(_consumed(part) for part in parts if part is not Ellipsis)
    parts = [*parts[:i], *[_WHOLE] * missing, *parts[i + 1 :]]
    found = []
    for part in parts:
        if isinstance(part, (slice, type(None), Tensor)):
            found.append(part)
        elif isinstance(part, (int, list, range)):
            found.append(torch.as_tensor(part))
        else:
            raise LostError
    return found


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def _consumed(part: Any) -> int:
    """The number of dimensions that a part of an index takes."""
    if part is None:
        return 0
    return part.dim() if _is_mask(part) else 1


def _looked_up(call: OpCall, parts: list[Any]) -> Places:
    """table[index], of a table without owners."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if any(_is_mask(part) for part in tensors) or any(isinstance(part, list) for part in parts):
        raise LostError
    owned = []
    for part in tensors:
        if call.is_owned(part):
            owned.append(call.index(part))
        elif call.is_tracked(part) and part.numel() > 1:
            call.owner_of(part)  # lost
    if not owned:
        return None  # one position of a table
    first = next(i for i, part in enumerate(parts) if isinstance(part, Tensor))
    last = max(i for i, part in enumerate(parts) if isinstance(part, Tensor))
    if any(not isinstance(part, (Tensor, int)) for part in parts[first:last]) or (
        first and isinstance(parts[first - 1], int)
    ):
        raise LostError
    before = 0
    for part in parts[:first]:
        rest = sum(_consumed(p) for p in parts if p is not Ellipsis)
        before += call.x.dim() - rest if part is Ellipsis else not isinstance(part, int)
    dims = max(part.dim() for part in tensors)
    index = merged(owned, dims)
    return call.settled(index.reshape((1,) * before + tuple(index.shape) + (1,) * (call.out.dim() - before - dims)))


def select(call: OpCall) -> Places:
    """index_select: rows of x, or of a table without owners."""
    x, index = call.x, call.arg(2, "index")
    dim = call.arg(1, "dim") % x.dim()
    if not call.is_tracked(x):
        owners = call.index(index)
        return call.settled(owners.reshape([-1 if d == dim else 1 for d in range(call.out.dim())]))
    if call.index(x).shape[dim] == 1:
        return call.owner_of(x)
    _eager()
    return call.settled(call.index(x, index).index_select(dim, call.values(index)))


def gather(call: OpCall) -> Places:
    """gather, take_along_dim: positions of x along one dimension, or of a table without owners."""
    x, index = call.x, call.arg(2 if _is_number(call.arg(1, "dim")) else 1, "index", "indices")
    dim = call.arg(1, "dim") if _is_number(call.arg(1, "dim")) else call.arg(2, "dim")
    if dim is None or not isinstance(index, Tensor):
        raise LostError
    dim %= x.dim()
    if not call.is_tracked(x):
        return call.owner_of(index)
    owners = call.index(x)
    if owners.shape[dim] == 1:
        if any(size > 1 and size != call.out.shape[d] for d, size in enumerate(owners.shape)):
            owners = owners[tuple(slice(call.out.shape[d]) for d in range(x.dim()))]
            return call.settled(owners)
        return call.owner_of(x)
    _eager()
    chosen = call.values(index).broadcast_to(call.out.shape)
    for d in range(x.dim()):
        if d != dim and owners.shape[d] == 1 and chosen.stride(d) == 0:
            chosen = chosen.narrow(d, 0, 1)
    return call.settled(call.index(x, index).expand(x.shape).gather(dim, chosen))


def _is_number(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def sort(position: int) -> Propagation:
    """sort, topk, argsort: values along a dimension in another order, and their positions."""

    def propagation(call: OpCall) -> Places:
        owner, dim = call.only(), call.arg(position, "dim", default=-1)
        dim = (dim if _is_number(dim) else call.kwargs.get("dim", -1)) % call.x.dim()
        owners = call.index(call.x)
        if owners.shape[dim] > 1:
            _eager()
            order = call.out if isinstance(call.out, Tensor) else call.out[1]
            owner = call.settled(call.index(call.x, order).expand(call.x.shape).take_along_dim(call.values(order), dim))
        return owner if isinstance(call.out, Tensor) else (owner, owner)

    return propagation


def reorder(func: Callable[..., Any]) -> Propagation:
    """flip, roll: positions in another order, which depends on no values."""

    def propagation(call: OpCall) -> Places:
        owner, dims = call.only(), call.arg(2 if func in _ROLLS else 1, "dims")
        dims = call.args[1:] if _is_number(dims) and func not in _ROLLS else dims
        dims = [dims] if _is_number(dims) else list(dims or ())
        varying = [d for d, size in enumerate(call.index(call.x).shape) if size > 1]
        if dims and not {d % call.x.dim() for d in dims} & set(varying):
            return owner
        _eager()
        index = call.index(call.x)
        return call.settled(_applied(func, call, index if dims else index.expand(call.x.shape)))

    return propagation


_ROLLS = (torch.roll, Tensor.roll)


def repeat(call: OpCall) -> Places:
    """repeat, tile: complete copies one after the other."""
    owner, index, out = call.owner_of(call.x), call.index(call.x), call.out
    index = index.reshape((1,) * (out.dim() - index.dim()) + tuple(index.shape))
    old = (1,) * (out.dim() - call.x.dim()) + tuple(call.x.shape)
    times = [
        size // before if varies > 1 else 1 for size, before, varies in zip(out.shape, old, index.shape, strict=True)
    ]
    if max(times, default=1) == 1 and isinstance(owner, Place):
        return Place(owner.dim + out.dim() - call.x.dim(), owner.inner)
    _eager()
    return call.settled(index.repeat(times))


def repeat_interleave(call: OpCall) -> Places:
    """Each position several times."""
    owner, times, dim = call.owner_of(call.x), call.arg(1, "repeats"), call.arg(2, "dim")
    index = call.index(call.x)
    if dim is not None and index.shape[dim % call.x.dim()] == 1:
        return owner
    if dim is not None and isinstance(times, int) and isinstance(owner, Place):
        return Place(owner.dim, owner.inner * times)
    _eager()
    if dim is None:
        index = index.expand(call.x.shape)
    if isinstance(times, Tensor):
        times = call.values(times)
        index = index.to(times.device)
    return call.settled(torch.repeat_interleave(index, times, dim))


def join(*, new_dim: bool) -> Propagation:
    """cat and stack; positions of a tensor without owners belong to nobody."""

    def propagation(call: OpCall) -> Places:
        owned = call.owned()
        dim = call.arg(1, "dim", "axis", default=0) % call.out.dim()
        owners = {owner for _, owner in owned}
        owner = owners.pop()
        if not owners and isinstance(owner, Place):
            at = owner.dim + (new_dim and dim <= owner.dim)
            if dim != at and call.out.shape[at] == call.n * owner.inner:
                return Place(at, owner.inner)
        _eager()
        indices = [call.index(x).unsqueeze(dim) if new_dim else call.index(x) for x, _ in owned]
        if all(index.shape[dim] == 1 for index in indices):
            with contextlib.suppress(LostError):
                return call.settled(merged(indices, call.out.dim()))
        parts: list[Tensor] = []
        for x in call.arg(0, "tensors"):
            index = call.index(x) if call.is_owned(x) else torch.full([1] * x.dim(), ANYONE, dtype=torch.int32)
            if new_dim:
                parts.append(index.unsqueeze(dim))
            elif x.shape != (0,):  # which cat takes for nothing
                parts.append(index.expand([x.shape[d] if d == dim else size for d, size in enumerate(index.shape)]))
        return call.settled(_along(parts, dim))

    return propagation


def _along(parts: list[Tensor], dim: int) -> Tensor:
    """The owners of tensors that are joined along a dimension; each is of size 1 where its owners do not vary."""
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    sizes = [max(part.shape[d] for part in parts) for d in range(parts[0].dim())]

    def whole(part: Tensor) -> Tensor:
        return part.to(device).expand([part.shape[d] if d == dim else size for d, size in enumerate(sizes)])

    return torch.cat([whole(part) for part in parts], dim)


def pad(call: OpCall) -> Places:
    """F.pad: added positions belong to nobody; `mode` may copy positions of the same owner only."""
    owner, pads, dims = call.only(), list(call.arg(1, "pad")), call.x.dim()
    index = call.index(call.x)
    changed = {dims - 1 - i // 2 for i, size in enumerate(pads) if size}
    if not any(index.shape[d] > 1 for d in changed):
        return owner
    if call.arg(2, "mode", default="constant") != "constant":
        raise LostError
    _eager()
    kept = [size if index.shape[dims - 1 - i // 2] > 1 else 0 for i, size in enumerate(pads)]
    return call.settled(torch.nn.functional.pad(index, kept, value=ANYONE))


def nonzero(call: OpCall) -> Places:
    """nonzero, where(condition), argwhere: positions, each of its owner."""
    owners = call.index(call.x).expand(call.x.shape)
    _eager()
    found = call.settled(owners.to(call.x.device)[call.values(call.x) != 0])
    if isinstance(call.out, Tensor):
        return call.settled(owners.to(call.x.device)[call.values(call.x) != 0].unsqueeze(-1))
    return (found,) * len(call.out)


def masked_select(call: OpCall) -> Places:
    mask = call.arg(1, "mask")
    _eager()
    x = call.index(call.x, mask).expand(call.x.shape)
    return call.settled(torch.masked_select(x, call.values(mask)))

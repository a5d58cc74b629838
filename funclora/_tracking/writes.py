"""Operations that put values into chosen positions of a tensor: each position keeps one owner, or they are lost.

The target may have no owners yet: a fresh buffer, or a cache. Then it gets those of the values. Where values of one
owner would get to positions of another, an adapted layer could not tell who reads it: the result is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclora._torch.views import View, seen
from funclora._tracking.calls import OpCall, Places
from funclora._tracking.owners import ANYONE, LostError, Place, merged
from funclora._tracking.structure import _eager

_INDEX = Tensor.__getitem__


def set_item(call: OpCall) -> Places:
    """x[index] = value."""
    return _put(call, call.args[1], call.args[2])


def index_put(call: OpCall) -> Places:
    """x.index_put(indices, values), with or without accumulation."""
    return _put(call, tuple(call.arg(1, "indices")), call.arg(2, "values"))


def _put(call: OpCall, index: Any, value: Any) -> Places:
    x = call.x
    target = call.owner_of(x) if call.is_tracked(x) else None
    if not call.is_tracked(value):
        if target is None:  # only the index is tracked: numbers at positions that depend on it
            raise LostError
        return target
    given = call.owner_of(value)
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in parts)
    part = seen(_INDEX, tuple(x.shape), (index,), {}) if plain else None
    if isinstance(part, View) and isinstance(given, Place):
        at = _claimed(part, given, value, x)
        if at is not None and target in (None, at):
            return at
    _eager()
    tensors = [p for p in parts if isinstance(p, Tensor)]
    whole = len(tensors) == len(parts) and all(p.dtype not in (torch.bool, torch.uint8) for p in tensors)
    kept = len(parts) if whole else x.dim()
    owners = _of_target(call, x, kept, (tensors or [x])[0])
    plain_index = tuple(call.values(p) if isinstance(p, Tensor) else p for p in parts)
    if not tensors:
        call.by_value = False
    before = owners[plain_index]
    after = call.index(value, owners)
    return call.settled(_written(owners, plain_index, before, after))


def _claimed(part: View, given: Place, value: Tensor, x: Tensor) -> Place | None:
    """The place of the owners in x if a part of it, which holds all of them in order, gets values of that place."""
    dim = given.dim - value.dim() + len(part.dims)  # values broadcast from the last dimension
    to = part.dims[dim] if 0 <= dim < len(part.dims) else None
    if to is None or part.lengths[to] != x.shape[to] or x.shape[to] != value.shape[given.dim]:
        return None
    return Place(to, given.inner)


def _of_target(call: OpCall, x: Tensor, written: int, like: Tensor) -> Tensor:
    """The owners of a tensor that is written to, written out in its first dimensions, and as large as the values'."""
    if call.is_tracked(x):
        index = call.index(x, like)
    else:
        index = torch.full([1] * x.dim(), ANYONE, dtype=torch.int32, device=like.device)
    return index.expand([size if d < written else index.shape[d] for d, size in enumerate(x.shape)]).clone()


def _written(owners: Tensor, index: Any, before: Tensor, after: Tensor) -> Tensor:
    """The owners after a write to `owners[index]`."""
    new = torch.where(before < 0, after, before)
    if new.shape != before.shape:  # the values vary along dimensions that the target's owners do not
        raise LostError
    owners = owners.clone()
    owners[index] = new
    if bool(((owners[index] != after) & (after >= 0)).any()):
        raise LostError
    return owners


def along(call: OpCall) -> Places:
    """index_add, index_copy, index_reduce, along one dimension."""
    x, dim, index, value = call.x, call.arg(1, "dim") % call.x.dim(), call.arg(2, "index"), call.arg(3, "source")
    if not call.is_tracked(value):
        return call.owner_of(x)
    given = call.owner_of(value)
    if isinstance(given, Place) and given.dim != dim and (not call.is_tracked(x) or call.owner_of(x) == given):
        return given
    _eager()
    owners = _of_target(call, x, 0, index)
    after = call.index(value, index)
    sizes = [x.shape[d] if d == dim else max(owners.shape[d], after.shape[d]) for d in range(x.dim())]
    owners = owners.expand(sizes)
    after = after.expand([value.shape[d] if d == dim else size for d, size in enumerate(sizes)])
    chosen = call.values(index).long()
    before = owners.index_select(dim, chosen)
    owners = owners.index_copy(dim, chosen, torch.where(before < 0, after, before))
    if bool(((owners.index_select(dim, chosen) != after) & (after >= 0)).any()):
        raise LostError
    return call.settled(owners)


def scatter(call: OpCall) -> Places:
    """scatter, scatter_add, scatter_reduce: positions along one dimension that each index chooses."""
    x, dim, index = call.x, call.arg(1, "dim") % call.x.dim(), call.arg(2, "index")
    value = call.arg(3, "src", "value")
    owned = [each for each in (x, index, value) if call.is_owned(each)]
    for each in (x, value):
        if call.is_tracked(each):
            call.owner_of(each)
    if not owned:
        raise LostError
    indices = [call.index(each) for each in owned]
    if all(each.shape[dim] == 1 for each in indices):
        whole = all(size == x.shape[d] for d, size in enumerate(index.shape) if d != dim)
        if not whole and not (call.is_owned(x) and len({call.owner_of(each) for each in owned}) == 1):
            raise LostError
        places = {call.owner_of(each) for each in owned}
        _eager() if len(places) > 1 else None
        return places.pop() if len(places) == 1 else call.settled(merged(indices, x.dim()))
    _eager()
    if not call.is_owned(value):
        return call.owner_of(x)
    owners = _of_target(call, x, x.dim(), index)
    chosen, after = call.values(index), call.index(value, index).expand(value.shape)
    after = after[tuple(slice(size) for size in chosen.shape)]
    before = owners.gather(dim, chosen)
    owners = owners.scatter(dim, chosen, torch.where(before < 0, after, before))
    if bool(((owners.gather(dim, chosen) != after) & (after >= 0)).any()):
        raise LostError
    return call.settled(owners)


def masked_scatter(call: OpCall) -> Places:
    """Values, one after the other, at the positions of a mask."""
    x, mask, value = call.x, call.arg(1, "mask"), call.arg(2, "source")
    if not call.is_tracked(value):
        return call.owner_of(x)
    given = call.index(value, mask)
    _eager()
    owners = _of_target(call, x, 0, mask)
    chosen = call.values(mask).broadcast_to(x.shape)
    vectors = chosen.dim() > 1 and chosen.stride(-1) == 0 and value.shape[-1] == x.shape[-1]
    if vectors and owners.shape[-1] == given.shape[-1] == 1:
        owners, chosen, given = owners[..., 0], chosen[..., 0], given[..., 0]
    owners = owners.expand(chosen.shape)
    after = given.expand(value.shape[: given.dim()]).flatten()[: int(chosen.sum())]
    before = owners[chosen]
    if bool(((before != after) & (before >= 0) & (after >= 0)).any()):
        raise LostError
    owners = owners.masked_scatter(chosen, torch.where(before < 0, after, before).to(owners.dtype))
    return call.settled(owners.reshape(tuple(owners.shape) + (1,) * (x.dim() - owners.dim())))

"""Views of a lazy weight that are lazy weights themselves: transposes, slices of experts, slices of rows.

`views` takes an operation to a function of its arguments that gives a lazy weight (or a list of them), or raises
`NoFormError` where this call of the operation has no such form. `inlined` takes functions that torch wrote in
Python, from linear operations, to copies that run their body on lazy weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import NoFormError, undispatched
from funclora.rules.layouts import Matrices

# Any: a lazy weight; this module knows it only by `rule`, `base` and `like`.


def _rule(lazy: Any) -> Any:
    rule = getattr(lazy, "rule", None)
    if rule is None or not isinstance(rule.layout, Matrices):
        raise NoFormError
    return rule


def _view(lazy: Any, base: Tensor, rule: Any) -> Any:
    """The lazy weight of a view; `rule` is its rule, None if there is none."""
    if rule is None:
        raise NoFormError
    return lazy.like(base, rule)


def _transposed(lazy: Any) -> Any:
    rule = _rule(lazy)
    return _view(lazy, lazy.base.mT, rule.transposed())


def _transpose_2d(lazy: Any) -> Any:
    if lazy.base.dim() != 2:
        raise NoFormError
    return _transposed(lazy)


def _transpose(lazy: Any, dim0: int, dim1: int) -> Any:
    n = lazy.base.dim()
    if {dim0 % n, dim1 % n} != {n - 1, n - 2}:
        raise NoFormError
    return _transposed(lazy)


def _permute(lazy: Any, *dims: Any) -> Any:
    order = [d % lazy.base.dim() for d in (dims[0] if len(dims) == 1 and isinstance(dims[0], Sequence) else dims)]
    n = len(order)
    if order != [*range(n - 2), n - 1, n - 2]:
        raise NoFormError
    return _transposed(lazy)


def _getitem(lazy: Any, index: Any) -> Any:
    rule = _rule(lazy)
    if lazy.base.dim() < 3 or not (isinstance(index, (int, slice)) or _counts(index, lazy.base.dim() - 2)):
        raise NoFormError
    return _view(lazy, lazy.base[index], rule.select_experts(index))


def _counts(index: Any, lead: int) -> bool:
    """True for a tensor of positions along the first of the leading dimensions."""
    return isinstance(index, Tensor) and not index.is_floating_point() and index.dtype != torch.bool and lead >= 1


def _narrow(lazy: Any, dim: int, start: int, length: int) -> Any:
    rule = _rule(lazy)
    rows = -1 if rule.layout.transposed else -2
    if dim % lazy.base.dim() != rows % lazy.base.dim():
        raise NoFormError
    return _view(lazy, lazy.base.narrow(dim, start, length), rule.narrow_outputs(start, length))


def _split(lazy: Any, split_size: Any, dim: int = 0) -> tuple[Any, ...]:
    total = lazy.base.shape[dim]
    if isinstance(split_size, int):
        sizes = [min(split_size, total - start) for start in range(0, total, split_size)]
    else:
        sizes = list(split_size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(lazy, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(lazy: Any, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    return _split(lazy, -(-lazy.base.shape[dim] // chunks), dim)


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    """A cast to a lazy weight's dtype and device, or of a lazy weight to what it has already."""
    if hasattr(x, "rule"):
        like = x.base.new_empty(0).to(*args, **kwargs)
        if (like.dtype, like.device) != (x.base.dtype, x.base.device) or kwargs.get("copy"):
            raise NoFormError
        return x
    return x.to(*(getattr(arg, "base", arg) for arg in args), **kwargs)


def _type_as(x: Any, other: Any) -> Any:
    return _to(x, other.dtype)


def _same(lazy: Any, *args: Any, **kwargs: Any) -> Any:
    return lazy


views: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.T.__get__: _transpose_2d,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    Tensor.t: _transpose_2d,
    torch.t: _transpose_2d,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.swapaxes: _transpose,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.__getitem__: _getitem,
    Tensor.narrow: _narrow,
    torch.narrow: _narrow,
    Tensor.split: _split,
    torch.split: _split,
    Tensor.chunk: _chunk,
    torch.chunk: _chunk,
    Tensor.contiguous: _same,
    Tensor.to: _to,
    Tensor.type_as: _type_as,
}


inlined: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: undispatched(F.multi_head_attention_forward),
}

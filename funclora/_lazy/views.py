"""Operations on a lazy weight that return its values as another lazy weight: views, casts, copies.

`views` maps an operation to a function of it and its arguments that returns a lazy weight (or several), or raises
`NoFormError` if this call of the operation has no such form. `inlined` maps torch's Python functions that consist of
linear operations to copies that run their body on lazy weights.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from funclora._torch.functions import (
    CASTS,
    INDEX,
    NEW,
    RESHAPES,
    SAME,
    STRIDES,
    VIEWS,
    NoFormError,
    named,
    undispatched,
)
from funclora._torch.views import View, seen
from funclora._tracking.experts import gathered
from funclora._tracking.routed import LostRowsError, PreparedRouted, Routed
from funclora._tracking.tensor import rows_of
from funclora.rules.base import Rule
from funclora.rules.layouts import Matrices

# Any: a lazy weight; this module uses only its `rule`, `base` and `like`.


def _of_base(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Operations that depend on no values, or use a lazy weight only for its shape, dtype or device."""
    return func(*pytree.tree_map(_base, args), **pytree.tree_map(_base, kwargs))


def _base(x: Any) -> Any:
    return x.base if hasattr(x, "rule") else x


def _view(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    if not hasattr(x, "rule"):
        return _of_base(func, x, *args, **kwargs)
    if func in _AS:
        func, args, kwargs = _AS[func], ((*args, *kwargs.values())[0].shape,), {}
    if func == INDEX and isinstance(args[0], Tensor):
        return _gathered(x, args[0])
    views, base = seen(func, tuple(x.base.shape), args, kwargs), x.base
    if views is None:
        if func not in RESHAPES:
            raise NoFormError
        return _in_groups(x, func(base, *args, **kwargs))
    if isinstance(views, View):
        return x if views.is_whole(base.shape) else x.like(func(base, *args, **kwargs), _rule(x, views))
    rules = [_rule(x, view) for view in views]
    return tuple(x.like(part, rule) for part, rule in zip(func(base, *args, **kwargs), rules, strict=True))


def _in_groups(x: Any, base: Tensor) -> Any:
    """A weight `[out, in]` as `[groups, out / groups, in]`: one matrix for each group of output units."""
    shape = tuple(x.base.shape)
    if base.dim() != 3 or len(shape) != 2 or base.shape[-1] != shape[-1]:
        raise NoFormError
    rule = x.rule.split_outputs(base.shape[0]) or x.rule.prepared(x.base).split_outputs(base.shape[0])
    if rule is None:
        raise NoFormError
    return x.like(base, rule)


def _rule(lazy: Any, view: View | None) -> Rule:
    """The rule of a view of the weight."""
    shape = tuple(lazy.base.shape)
    if view is not None and _has_matrix(view, len(shape)):
        rule = _of_part(lazy.rule, view, shape)
        if rule is None:  # quantities of the complete weight, such as a norm, are computed before it is cut
            rule = _of_part(lazy.rule.prepared(lazy.base), view, shape)
        if rule is not None:
            return rule
    raise NoFormError


def _has_matrix(view: View, n: int) -> bool:
    """Whether a view of a tensor with n dimensions ends with its last two, and keeps the order of the others."""
    lead = [dim for dim in view.dims[:-2] if dim is not None]
    return {*view.dims[-2:]} == {n - 2, n - 1} and lead == sorted(lead)


def _of_part(rule: Rule | None, view: View, shape: tuple[int, ...]) -> Rule | None:
    n = len(shape)
    for dim, (start, length) in enumerate(zip(view.starts, view.lengths, strict=True)):
        if rule is not None and dim in view.dims and length < shape[dim]:
            rule = rule.narrow(shape, dim, start, length)
    if rule is not None and view.dims[:-2] != tuple(range(n - 2)):
        rule = rule.select_experts(_index(view, n))
    if rule is not None and view.dims[-2:] == (n - 1, n - 2):
        rule = rule.transposed()
    return rule


def _index(view: View, n: int) -> tuple[int | slice | None, ...]:
    """The index that drops and adds the dimensions before the matrix as the view does."""
    index: list[int | slice | None] = []
    passed = 0
    for dim in (*view.dims[:-2], n - 2):
        if dim is None:
            index.append(None)
            continue
        index += view.starts[passed:dim]
        if dim < n - 2:
            index.append(slice(None))
        passed = dim + 1
    return tuple(index)


def _gathered(lazy: Any, index: Tensor) -> Any:
    """The experts at positions that a tensor holds, or the rows of an embedding matrix."""
    if index.is_floating_point() or index.dtype == torch.bool or not isinstance(lazy.rule.layout, Matrices):
        raise NoFormError
    if lazy.base.dim() > 2:
        return lazy.like(lazy.base[index], _of_experts(lazy, index), copied=True)
    if not lazy.rule.layout.transposed:
        raise NoFormError
    ids = torch.where(index < 0, index + lazy.base.shape[0], index)
    # Not F.embedding itself: the compiler does not dispatch inside a dispatch.
    return type(lazy).__torch_function__(F.embedding, (type(lazy),), (ids, lazy))


def _of_experts(lazy: Any, index: Tensor) -> Rule:
    plain, owner = rows_of(index)
    rule = lazy.rule
    if isinstance(rule, Routed):
        rule = rule.prepared(lazy.base)
    if isinstance(rule, PreparedRouted) and index.numel() != 1:
        if isinstance(owner, str):
            raise LostRowsError("is read by an index", owner, repr(lazy.target))
        return gathered(rule.pairs(), plain, owner, index.scope, lazy.base)  # type: ignore[attr-defined]
    found: Rule | None = rule.select_experts(plain)
    if found is None:
        raise NoFormError
    return found


def _cast(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    if not hasattr(x, "rule"):
        return _of_base(func, x, *args, **kwargs)
    args, kwargs = pytree.tree_map(_base, args), pytree.tree_map(_base, kwargs)
    kind = func(x.base.new_empty((0,) * x.base.dim()), *args, **kwargs)
    if isinstance(kind, str):
        return kind
    if kind.device != x.base.device or not kind.is_floating_point():
        raise NoFormError
    if kind.dtype == x.base.dtype and not kwargs.get("copy"):
        return x
    return x.like(x.base.to(kind.dtype), x.rule, copied=True)


def _same(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    if func in _DETACHED:
        return x.like(x.base.detach(), pytree.tree_map(torch.detach, x.rule))
    return x.like(x.base, x.rule, copied=True) if func in _CLONED else x


_AS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.view_as: Tensor.view,
    Tensor.reshape_as: Tensor.reshape,
    Tensor.expand_as: Tensor.expand,
}
_DETACHED = named("detach data")
_CLONED = named("clone")

views: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(STRIDES | NEW, _of_base),
    **dict.fromkeys(VIEWS | RESHAPES | {INDEX}, _view),
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(SAME, _same),
}


def _bound(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda get, x: functools.partial(views[method], method, x)


# For a method that torch wrote in Python, the compiler first reads the method and then calls it.
views |= {method.__get__: _bound(method) for method in views if isinstance(method, types.FunctionType)}


inlined: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: undispatched(F.multi_head_attention_forward),
}

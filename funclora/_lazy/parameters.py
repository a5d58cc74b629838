"""Operations on parameters that differ by row, without linear maps: biases, norms, completely replaced weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._lazy.dispatch import linear_ops
from funclora._tracking.groups import Members, RoutedGroup, members_of
from funclora._tracking.owners import Owners, Place
from funclora._tracking.propagation import is_elementwise
from funclora._tracking.routed import WHOLE_TENSOR, LostRowsError, PreparedRouted, Routed, spread
from funclora._tracking.tensor import RowTensor, rows_back, rows_first, rows_of
from funclora.errors import UnsupportedError
from funclora.rules.base import rescaled


def differs_by_row(x: Any) -> bool:
    """True for a lazy weight that differs by row."""
    return isinstance(getattr(x, "rule", None), (Routed, PreparedRouted))


def operate_by_row(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that is not a linear map, on parameters that differ by row: biases, the scale and shift of norms.

    Returns:
        The result; NotImplemented if the operation has no such form, or has no such parameters.
    """
    if not any(map(differs_by_row, (*args, *kwargs.values()))):
        return NotImplemented
    if func is torch.addmm and differs_by_row(args[0]) and not kwargs:
        return _fitted(args[1] @ args[2], args[0], False, torch.add)
    if func in _AFFINE:
        given = dict(zip(_AFFINE[func].names, args, strict=False)) | kwargs
        scale, shift = (given.get(name) for name in _AFFINE[func].affine)
        if differs_by_row(scale) or differs_by_row(shift):
            names = _AFFINE[func].affine if differs_by_row(scale) else _AFFINE[func].affine[1:]
            given |= {name: None for name in names if name in given}
            positional = [given.pop(name) for name in _AFFINE[func].names[: len(args)]]
            y = func(*positional, **given)
            if differs_by_row(scale):
                y = _fitted(y, scale, _AFFINE[func].channels_first, torch.mul)
            return y if shift is None else _fitted(y, shift, _AFFINE[func].channels_first, torch.add)
    for x in (*args, *kwargs.values()):
        if differs_by_row(x) and x.rule.layout is None and func in linear_ops:
            return _replaced(func, args, kwargs, x)
    like = next((x for x in args if isinstance(x, RowTensor)), None)
    if like is None or not is_elementwise(func) or (differs_by_row(args[0]) and func.__name__.endswith("_")):
        return NotImplemented
    return func(*(_by_row(x, like, False) if differs_by_row(x) else x for x in args), **kwargs)


def _replaced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], lazy: Any) -> Tensor:
    """An operation linear in a weight that some members replace: their rows are computed separately."""

    def operation(weight: Any, rows: Tensor | None = None) -> Any:
        def given(x: Any) -> Any:
            return weight if x is lazy else x if rows is None else only_rows(x, rows, rule.n)

        return func(*map(given, args), **{name: given(x) for name, x in kwargs.items()})

    lazy.used("fast")
    rule, base = lazy.rule, lazy.base
    if func is F.embedding and (kwargs.get("max_norm") is not None or args[3:4] not in ((), (None,))):
        base = base.clone()  # torch writes to it
    together = rule.together()
    y: Tensor = operation(base if together is None else lazy.like(base, together))
    out, place = rows_of(y)
    if rule.n == 1:
        place = WHOLE_TENSOR
    if isinstance(place, str):
        raise LostRowsError("is read", place, repr(lazy.target))
    rows = rows_first(out, place, rule.n)
    for several, group in rule.apart():
        if group.present is not None:
            raise UnsupportedError(
                f"{lazy.target!r}: a tensor of ids needs rules that are low-rank updates, and {type(several).__name__} "
                "has no such form: its low_rank is None. Give route the ids as a list, or use funclora.vmap."
            )
        for j, chosen in _rows_of_members(group, place):
            one = rescaled(several.member(j), group.scalings[j])
            value = lazy.like(base, one)
            if one.bind_dense:
                value = one.dense(base).to(base.dtype, copy=True)  # embeddings with max_norm write to it
            if chosen is None:
                change = operation(value) - operation(base)
                change = rows_first(rows_of(change)[0], place, rule.n)
                weights = group.weights[:, j] if isinstance(place, Place) else group.weights[_positions(place), j]
                rows = rows + change * spread(weights.to(change.dtype), change, ())
                continue
            own = operation(value, chosen)
            own = rows_first(own, place, len(chosen)) if isinstance(place, Place) else own
            rows = rows.index_copy(0, chosen, own)
    out = rows_back(rows, place)
    return y.scope.enter(out, place) if isinstance(y, RowTensor) else out


def _rows_of_members(group: RoutedGroup, place: Place | Owners) -> Iterator[tuple[int, Tensor | None]]:
    """The members of a group that are used, and the rows of each, as `rows_first` counts them; None for weights."""
    m, device = len(group.scalings), group.scalings.device
    if group.rows is None:
        yield from ((j, None) for j in range(m))
        return
    every = Members(list(range(m)), group.rows, group.rows.first())
    plan = [every] if isinstance(place, Place) else members_of(group, m, place)
    for some in plan:
        for i, j in enumerate(some.chosen):
            rows = some.rows.of_member(i, device)
            if len(rows):
                yield j, rows


def _positions(owners: Owners) -> Tensor:
    """The owner of each position along which it varies."""
    return owners.index.flatten().long()


def only_rows(x: Any, chosen: Tensor, n: int) -> Any:
    """Some rows of an argument, as a plain tensor."""
    if not isinstance(x, RowTensor):
        return x
    plain, place = rows_of(x)
    if isinstance(place, str):
        raise LostRowsError("is read", place)
    rows = rows_first(plain, place, n).index_select(0, chosen)
    return rows if isinstance(place, Owners) else rows_back(rows, place)


class _Affine(NamedTuple):
    names: tuple[str, ...]  # of the arguments, in their order
    affine: tuple[str, str]  # the arguments that scale and shift the result
    channels_first: bool


_AFFINE: dict[Callable[..., Any], _Affine] = {
    F.linear: _Affine(("input", "weight", "bias"), ("", "bias"), False),
    F.layer_norm: _Affine(("input", "normalized_shape", "weight", "bias", "eps"), ("weight", "bias"), False),
    F.rms_norm: _Affine(("input", "normalized_shape", "weight", "eps"), ("weight", ""), False),
    F.group_norm: _Affine(("input", "num_groups", "weight", "bias", "eps"), ("weight", "bias"), True),
    F.batch_norm: _Affine(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
                          ("weight", "bias"), True),
}  # fmt: skip
_conv: Callable[..., Any]
for _conv in (F.conv1d, F.conv2d, F.conv3d):
    _AFFINE[_conv] = _Affine(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), ("", "bias"), True)
for _conv in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    _AFFINE[_conv] = _Affine(
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"), ("", "bias"), True
    )


def _fitted(y: Tensor, value: Any, channels_first: bool, combine: Callable[..., Tensor]) -> Tensor:
    """y scaled or shifted by a parameter, which may differ by row, in y's dtype."""
    if differs_by_row(value):
        value = _by_row(value, y, channels_first)
    elif channels_first:
        value = value.reshape(-1, *[1] * (y.dim() - 2))
    out: Tensor = combine(y, value).to(y.dtype)
    return out


def _by_row(lazy: Any, like: Tensor, channels_first: bool) -> Tensor:
    """The values of a parameter, each in the place of its row, to broadcast over `like`."""
    rule, base = lazy.rule, lazy.base
    if rule.together() is not None:
        raise UnsupportedError(f"{lazy.target!r} has low-rank updates that differ by row, and all of it is read.")
    lazy.used("fast")
    values = base.expand(rule.n, *base.shape)
    for several, group in zip(rule.rules, rule.groups, strict=True):
        value = torch.func.vmap(lambda one, s: rescaled(one, s).dense(base))(several, group.scalings).to(base.dtype)
        if group.present is not None:
            present = group.present.reshape(-1, *[1] * base.dim())
            values = torch.where(present, value, values)
        elif group.rows is not None:
            each = value.unsqueeze(1)
            values = group.rows.put(values, each.expand(-1, group.rows.count, *base.shape))
        else:
            change = value - base
            values = values + (group.weights.to(base.dtype) @ change.flatten(1)).unflatten(1, base.shape)
    shape = [*base.shape, *[1] * (like.dim() - 2)] if channels_first else list(base.shape)
    if rule.n == 1:
        return cast(Tensor, values.reshape(shape))
    _, place = rows_of(like)
    if isinstance(place, str) or any(d >= like.dim() - len(shape) for d in _dims(place)):
        raise LostRowsError("is read", str(place) if isinstance(place, str) else "", repr(lazy.target))
    sizes = [1] * (like.dim() - len(shape))
    for d in _dims(place):
        sizes[d] = like.shape[d]
    if isinstance(place, Owners):
        values = values[_positions(place).to(values.device)]
    elif place.inner > 1:
        values = values.repeat_interleave(place.inner, 0)
    out: Tensor = values.reshape(*sizes, *shape)
    return out


def _dims(place: Place | Owners) -> list[int]:
    return [place.dim] if isinstance(place, Place) else place.varying()

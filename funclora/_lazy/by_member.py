"""Operations without a form for weights that differ by row, such as recurrences: member by member, on dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from funclora._lazy.parameters import differs_by_row, only_rows
from funclora._tracking.owners import Place
from funclora._tracking.propagation import propagations
from funclora._tracking.routed import WHOLE_TENSOR, LostRowsError
from funclora._tracking.tensor import RowTensor, rows_back, rows_first, rows_of
from funclora.rules.base import rescaled

_BY_TOKEN = "an operation on single tokens (ids for each token, or experts)"
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def by_member(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation whose results keep rows apart, on the dense weights of each row.

    Returns:
        The result; NotImplemented if nothing is known of the operation.

    Raises:
        LostRowsError: the rows of an argument, or of the result, are not known.
    """
    given = (_with_states(func, args), kwargs)
    leaves = pytree.tree_leaves(given)
    lazy = list({id(x): x for x in leaves if differs_by_row(x)}.values())
    tracked = [x for x in leaves if isinstance(x, RowTensor)]
    n = lazy[0].rule.n
    if func not in propagations or not (tracked or n == 1):
        return NotImplemented
    for x in tracked:
        if n > 1 and not isinstance(place := rows_of(x)[1], Place):
            cause = place if isinstance(place, str) else _BY_TOKEN
            raise LostRowsError("is read as a dense weight of each row", cause, repr(lazy[0].target))
    outs, spec = pytree.tree_flatten(_run(func, given, {id(x): x.base for x in lazy}))
    places = [_place(out, n, lazy[0].target) for out in outs]
    results = [rows_first(rows_of(out)[0], place, n) for out, place in zip(outs, places, strict=True)]
    for weights, chosen in _weights_of_rows(lazy):
        some = pytree.tree_map(lambda x: only_rows(x, chosen, n), given) if n > 1 else given  # noqa: B023
        own = pytree.tree_leaves(_run(func, some, {id(x): w for x, w in zip(lazy, weights, strict=True)}))
        for i, (out, place) in enumerate(zip(own, places, strict=True)):
            results[i] = results[i].index_copy(0, chosen, rows_first(out, place, len(chosen)).to(results[i].dtype))
    entered = []
    for out, result, place in zip(outs, results, places, strict=True):
        back = rows_back(result, place)
        entered.append(out.scope.enter(back, place) if isinstance(out, RowTensor) else back)
    return pytree.tree_unflatten(entered, spec)


def _run(func: Callable[..., Any], given: Any, values: dict[int, Tensor]) -> Any:
    args, kwargs = pytree.tree_map(lambda x: values.get(id(x), x), given)
    return func(*args, **kwargs)


def _place(out: Tensor, n: int, target: str) -> Place:
    place = WHOLE_TENSOR if n == 1 else rows_of(out)[1]
    if not isinstance(place, Place):
        cause = place if isinstance(place, str) else _BY_TOKEN
        raise LostRowsError("is read as a dense weight of each row", cause, repr(target))
    return place


def _with_states(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a recurrence, with the rows of first states that the module itself made."""
    x = args[0] if args else None
    if func not in _RECURRENT or not isinstance(x, RowTensor):
        return args

    def tracked(h: Tensor) -> Tensor:
        fits = type(h) is Tensor and h.dim() == 3 and h.shape[1] == x.scope.n
        return x.scope.enter(h, Place(1, 1)) if fits else h

    return args[0], pytree.tree_map(tracked, args[1]), *args[2:]


def _weights_of_rows(lazy: list[Any]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The dense weights that some rows use, and these rows, for all rows that do not use the base weights."""
    n, device = lazy[0].rule.n, lazy[0].base.device
    rows: dict[Any, list[int]] = {}
    of_rows = [_choices(x.rule) for x in lazy]
    for row in range(n):
        choice = tuple(each[row] for each in of_rows)
        if any(one is not None for one in choice):
            rows.setdefault(choice, []).append(row)
    for choice, some in rows.items():
        weights = [x.base if one is None else _dense(x, one) for x, one in zip(lazy, choice, strict=True)]
        yield weights, torch.tensor(some, device=device)


def _choices(rule: Any) -> list[Any]:
    """For each row the group and the member that it uses, or with weights the row itself; None for the base."""
    found: list[Any] = [None] * rule.n
    for i, group in enumerate(rule.groups):
        if group.weights is not None:
            return list(range(rule.n))
        present = None if group.present is None else group.present.tolist()
        for row, member in enumerate(group.rows.member_of(len(group.scalings)).tolist()):
            if member >= 0 and (present is None or present[row]):
                found[row] = (i, member)
    return found


def _dense(lazy: Any, choice: Any) -> Tensor:
    """The weight of one row."""
    rule, base = lazy.rule, lazy.base

    def of(i: int, j: int) -> Tensor:
        dense: Tensor = rescaled(rule.rules[i].member(j), rule.groups[i].scalings[j]).dense(base)
        return dense

    if isinstance(choice, tuple):
        return of(*choice).to(base.dtype)
    weight: Tensor = base
    for i, group in enumerate(rule.groups):
        for j in range(len(group.scalings)):
            change = of(i, j) - base
            weight = weight + group.weights[choice, j].to(change.dtype) * change
    return weight.to(base.dtype)

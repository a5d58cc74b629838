"""Experts whose matrices differ by row: tokens sorted by member and expert, and matrices gathered for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funclora._tracking.calls import Owner
from funclora._tracking.groups import RoutedGroup, member_at
from funclora._tracking.owners import Owners, index_of
from funclora._tracking.tensor import ForwardCall
from funclora.errors import UnsupportedError
from funclora.rules.layouts import Matrices, Parameter
from funclora.rules.linear_ops import GroupedMatmulOp
from funclora.rules.low_rank import LoRA, LowRank, ScaledLowRank

Pairs = Sequence[tuple[LowRank, RoutedGroup]]
"""The members' updates, with leaves `[m, experts, *]`, and the rows that use them."""


def by_expert(pairs: Pairs, op: GroupedMatmulOp, owner: Owner, weight: Tensor, n: int, dropout: float) -> Tensor:
    """A product of tokens, sorted by expert, with the matrices that their expert has for their row.

    Args:
        pairs: the members.
        op: the product, of a plain tensor `[tokens, in]`.
        owner: the rows of its tokens.
        weight: the base matrices, `[experts, *]`.
        n: the number of rows.
        dropout: the probability that applies in this call.

    Returns:
        `[tokens, out]`.
    """
    tokens = torch.arange(len(op.x), device=op.x.device, dtype=op.offs.dtype)
    expert = torch.searchsorted(op.offs, tokens, right=True)
    owners = index_of(owner, n, 2, op.x.device)[:, 0].expand(len(tokens)).long()
    if pairs[0][1].weights is not None:
        return _mixed(pairs, op, owners, expert, weight, dropout)
    members = [member_at(group, len(group.scalings), owners) for _, group in pairs]
    scale = _scale_of_tokens(pairs, members, expert, weight)
    if scale is not None and op.transposed:
        op = _with_input(op, (op.x * scale).to(op.x.dtype))
    base = y = op.dense(weight, bias=True)
    for (rule, group), member in zip(pairs, members, strict=True):
        used = (member >= 0).nonzero().squeeze(-1)
        key = member[used] * len(weight) + expert[used]
        order = used[key.argsort(stable=True)]
        offs = key.bincount(minlength=len(weight) * len(group.scalings)).cumsum(0).to(op.offs.dtype)
        sorted_by_both = GroupedMatmulOp(op.op, op.x[order], offs, transposed=op.transposed)
        a, b = (x.flatten(0, 1) for x in (rule.a, _times(rule.b, group.scalings)))
        u = sorted_by_both.low_rank(a, b, rule.dropout if dropout else 0.0)
        y = y.to(torch.promote_types(y.dtype, u.dtype)).index_add(0, order, u)
    return (y if scale is None or op.transposed else y * scale).to(base.dtype)


def _mixed(pairs: Pairs, op: GroupedMatmulOp, owners: Tensor, expert: Tensor, weight: Tensor, dropout: float) -> Tensor:
    """The same for the base matrices plus weighted sums of all members' changes."""
    base = y = op.dense(weight, bias=True)
    for rule, group in pairs:
        assert group.weights is not None
        own, b = rule.output_scale(weight), _times(rule.b, group.scalings)
        for j, w in enumerate(group.weights.to(owners.device)[owners].unbind(1)):
            scale = None if own is None else own[j][expert]
            given = op if scale is None or not op.transposed else _with_input(op, (op.x * scale).to(op.x.dtype))
            one = base if given is op else given.dense(weight, bias=True)
            one = one + given.low_rank(rule.a[j], b[j], rule.dropout if dropout else 0.0)
            if scale is not None and not op.transposed:
                one = one * scale
            y = y + (one - base) * w.unsqueeze(-1).to(one.dtype)
    return y.to(base.dtype)


def _with_input(op: GroupedMatmulOp, x: Tensor) -> GroupedMatmulOp:
    return GroupedMatmulOp(op.op, x, op.offs, transposed=op.transposed)


def _times(x: Tensor, scalings: Tensor) -> Tensor:
    """x `[m, *]` times a number for each member, in its dtype."""
    return (x * scalings.reshape(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def _scale_of_tokens(pairs: Pairs, members: list[Tensor], expert: Tensor, weight: Tensor) -> Tensor | None:
    """The scale of the output units for each token, `[tokens, out]`; None for 1."""
    scale: Tensor | None = None
    for (rule, _), member in zip(pairs, members, strict=True):
        own = rule.output_scale(weight)
        if own is not None:
            chosen = own[member.clamp(min=0), expert]
            rest = torch.ones_like(chosen) if scale is None else scale
            scale = torch.where((member >= 0).unsqueeze(-1), chosen, rest)
    return scale


def gathered(pairs: Pairs, index: Tensor, owner: Owner, scope: ForwardCall, weight: Tensor) -> LowRank:
    """The rule of `weight[index]`, one matrix for each position of the index, of the row that the position belongs to.

    Args:
        pairs: the members.
        index: the experts, a plain tensor.
        owner: the rows of its positions.
        scope: the call of the model. The factors belong to its rows, so that no other row can be multiplied by them.
        weight: the base matrices, `[experts, *]`.

    Raises:
        UnsupportedError: the members' rules differ in dropout, or have weights.
    """
    if pairs[0][1].weights is not None or len({rule.dropout for rule, _ in pairs}) > 1:
        raise UnsupportedError(
            "matrices of experts that are gathered for each token, with weights over the members or different dropout. "
            'Use model.set_experts_implementation("grouped_mm").'
        )
    owners = index_of(owner, scope.n, index.dim(), index.device).expand(index.shape).long()
    expert = torch.where(index < 0, index + len(weight), index)
    members = [member_at(group, len(group.scalings), owners) for _, group in pairs]
    downs, ups = [], []
    for (rule, group), member in zip(pairs, members, strict=True):
        used = (member >= 0).reshape(*member.shape, 1, 1)
        at = member.clamp(min=0), expert
        downs.append(torch.where(used, rule.a[at], 0.0))
        ups.append(torch.where(used, _times(rule.b, group.scalings)[at], 0.0))
    scale = _scale_of_tokens(pairs, members, expert, weight)
    layout = pairs[0][0].layout
    assert isinstance(layout, Matrices)

    def tracked(x: Tensor) -> Tensor:
        return scope.enter(x, owner.with_dims(x.dim()) if isinstance(owner, Owners) else owner)

    a, b = tracked(torch.cat(downs, -2)), tracked(torch.cat(ups, -1))
    dropout, kept = pairs[0][0].dropout, Parameter(layout.transposed)
    if scale is None:
        return LoRA(a, b, dropout=dropout, layout=kept)
    return ScaledLowRank(a, b, tracked(scale), dropout=dropout, layout=kept)

"""A different adapter for every row of the batch, in one ordinary forward pass.

The operation on the base weight runs once, on all rows. Only small tensors differ by row: the low-rank path runs as one
batched product over the members (rows of one member together), and the scale of the output units is a vector per row.
For a row with member j, scaling s and scale g (m/‖V‖ for DoRA, otherwise 1):

    y = g_j ∘ (x·Wᵀ) + (x·A_jᵀ)·(s·g_j ∘ B_j)ᵀ + bias

With weights over the members, the weight of a row is the base weight plus the weighted sum of the members' changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funclora._torch.functions import overwriting
from funclora._torch.pytree import pytree_node
from funclora._tracking.batch import Batch
from funclora._tracking.calls import Owner
from funclora._tracking.experts import by_expert
from funclora._tracking.groups import RoutedGroup, RoutedGroups, in_succession, members_of
from funclora._tracking.owners import Owners, Place
from funclora._tracking.repeated import Plan, Repeated, Scales
from funclora._tracking.tensor import dropped, refuse_seeds, rows_back, rows_first, rows_of
from funclora.errors import UnsupportedError
from funclora.rules.base import Rule, of_members
from funclora.rules.layouts import Layout, Matrices
from funclora.rules.linear_ops import ConvOp, GroupedMatmulOp, LeftMatmulOp, LinearLayerOp
from funclora.rules.low_rank import LowRank, low_rank_of_members

ROWS_FIRST = Place(0, 1)
# The place of the rows if there is only one row: the complete tensor is that row, and gets a new first dimension.
WHOLE_TENSOR = Place(0, 0)


@pytree_node
@dataclass(frozen=True, eq=False)
class Routed(Rule):
    """A different member of a stack for every row of the batch. Made by `route`.

    Attributes:
        rules: for each group the members' rule, with leaves `[m, *]`.
        groups: for each rule the rows that use its members.
        batch: how the inputs of the model hold the rows.
    """

    rules: tuple[Rule, ...]
    groups: RoutedGroups
    batch: Batch

    leaf_names: ClassVar[tuple[str, ...]] = ("rules",)

    @property
    def n(self) -> int:
        """The number of rows, or of the members that ids for each token name."""
        return self.batch.n

    @property
    def dropout_p(self) -> float:
        return max(rule.dropout_p for rule in self.rules)

    @property
    def layout(self) -> Layout | None:  # type: ignore[override]
        """Where the matrix is in the weight; None if some members' rules are not low-rank updates."""
        return None if any(group.apart for group in self.groups) else self.rules[0].layout

    def apart(self) -> list[tuple[Rule, RoutedGroup]]:
        """The members whose rule is not a low-rank update."""
        return [each for each in zip(self.rules, self.groups, strict=True) if each[1].apart]

    def together(self) -> Routed | None:
        """The rule of the other members, if there are any."""
        kept = [each for each in zip(self.rules, self.groups, strict=True) if not each[1].apart]
        return replace(self, rules=tuple(r for r, _ in kept), groups=RoutedGroups(g for _, g in kept)) if kept else None

    def dense(self, weight: Tensor) -> Tensor:
        raise UnsupportedError(
            "every row of the batch has its own weight here, and this operation cannot use a weight per row. Leave "
            "the target out, use funclora.vmap over the stack, or call the model once for each member."
        )

    def check(self, name: str, weight: Tensor) -> None:
        places = {_place(rule.layout) for rule, group in zip(self.rules, self.groups, strict=True) if not group.apart}
        if len(places) > 1:
            raise UnsupportedError(
                f"{name!r}: the members' rules read the weight as different matrices, because their layouts differ: "
                f"{', '.join(sorted({type(rule.layout).__name__ for rule in self.rules}))}. Give them one layout, or "
                "use funclora.vmap over the stack."
            )
        for rule in self.rules:
            rule.member(0).check(name, weight)

    def prepared(self, weight: Tensor) -> Rule:
        if self.layout is None:
            return self
        each = [_prepared(rule, group, weight) for rule, group in zip(self.rules, self.groups, strict=True)]
        groups = RoutedGroups(group for _, group in each)
        rules = tuple(rule for rule, _ in each)
        return PreparedRouted(rules, groups, self.n, in_succession(groups, self.n), Repeated())

    def apply_op(self, op: Any, weight: Tensor, dropout: float) -> Tensor:
        return self.prepared(weight).apply_op(op, weight, dropout)

    def transposed(self) -> Rule | None:
        return self.of_each(lambda rule: rule.transposed())

    def narrow(self, shape: tuple[int, ...], dim: int, start: int, length: int) -> Rule | None:
        return self.of_each(lambda rule: rule.narrow(shape, dim, start, length))

    def split_outputs(self, groups: int) -> Rule | None:
        return self.of_each(lambda rule: rule.split_outputs(groups))

    def select_experts(self, index: Any) -> Rule | None:
        return self.of_each(lambda rule: rule.select_experts(index))

    def of_each(self, form: Callable[[Rule], Rule | None]) -> Rule | None:
        """This rule with another form of its members' rules; None if one of them has none."""
        found = [of_members(r, group.scalings, form) for r, group in zip(self.rules, self.groups, strict=True)]
        each = [one for one in found if one is not None]
        if len(each) < len(found):
            return None
        groups = (group.with_scalings(s) for group, (_, s) in zip(self.groups, each, strict=True))
        return self.with_rules(tuple(rule for rule, _ in each), RoutedGroups(groups))

    def with_rules(self, rules: tuple[Any, ...], groups: RoutedGroups) -> Rule:
        """This rule with other members' rules for the same rows."""
        return replace(self, rules=rules, groups=groups)


def _place(layout: Layout | None) -> tuple[type, bool, int]:
    """A key that is equal for layouts with the matrix in the same place of the weight."""
    kind = Matrices if isinstance(layout, Matrices) else type(layout)
    return kind, getattr(layout, "transposed", False), getattr(layout, "groups", 1)


def _prepared(rule: Rule, group: RoutedGroup, weight: Tensor) -> tuple[LowRank, RoutedGroup]:
    """The update of the members of a group, with the scale of the output units computed."""
    low, scalings = low_rank_of_members(rule, group.scalings)
    if group.present is not None:
        scalings = torch.where(group.present, scalings, 0.0)
    scale = rule.output_scale_of_members(weight, group.scalings)
    return low if scale is None else low.with_scale(scale), group.with_scalings(scalings)


@pytree_node
@dataclass(frozen=True, eq=False)
class PreparedRouted(Rule):
    """A `Routed` rule of low-rank updates, with the scales of their output units computed.

    Attributes:
        rules: as in `Routed`.
        groups: as in `Routed`.
        n: the number of rows.
        succession: the groups in the order of their rows, if these follow each other and cover all rows.
        repeated: what is computed from the members once.
    """

    rules: tuple[LowRank, ...]
    groups: RoutedGroups
    n: int
    succession: tuple[int, ...]
    repeated: Repeated

    leaf_names: ClassVar[tuple[str, ...]] = ("rules",)
    dense = Routed.dense
    check = Routed.check
    dropout_p = Routed.dropout_p
    transposed = Routed.transposed
    narrow = Routed.narrow
    split_outputs = Routed.split_outputs
    select_experts = Routed.select_experts
    of_each = Routed.of_each

    def with_rules(self, rules: tuple[Any, ...], groups: RoutedGroups) -> Rule:
        """As in `Routed`."""
        return replace(self, rules=rules, groups=groups, repeated=Repeated())

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        """Where the matrix is in the weight."""
        return self.rules[0].layout

    def apply_op(self, op: Any, weight: Tensor, dropout: float) -> Tensor:
        out: Tensor
        x, place = rows_of(op.x)
        kept = place == ROWS_FIRST and not dropout and not torch.compiler.is_compiling()
        if kept and (plan := self._plan(op, x, weight)) is not None:
            entered: Tensor = op.x.scope.enter(plan.run(op.with_input(x), weight), place)
            return entered
        if self.n == 1:
            place = WHOLE_TENSOR
        if isinstance(place, str):
            raise LostRowsError("is read", place)
        given = op.with_input(x)
        if dropout and op.takes_dropout and isinstance(given, GroupedMatmulOp):
            refuse_seeds()
        if isinstance(given, GroupedMatmulOp):
            out = by_expert(self.pairs(), given, place, weight, self.n, dropout)
        else:
            if self.n > 1 and not _keeps(op, x, place, weight):
                raise LostRowsError("is read along the rows", type(op).__name__.removesuffix("Op"))
            rule = self.at(place) if isinstance(place, Owners) else self
            out = rule._rewritten(given, place, weight, dropout)
        if self.n == 1:
            return out
        tracked: Tensor = op.x.scope.enter(out, place.with_dims(out.dim()) if isinstance(place, Owners) else place)
        return tracked

    def _plan(self, op: Any, x: Tensor, weight: Tensor) -> Plan | None:
        """How the operation repeats on rows in order, if that has a quick form and nothing sees its steps."""
        key = type(op), op.transposed, torch.is_inference_mode_enabled()
        plan = self.repeated.plans.get(key)
        if plan is None:
            if self.n == 1 or not _repeats(op, weight):
                return None
            scale = functools.partial(self._row_scale, [rule.output_scale(weight) for rule in self.rules])
            plan = self.repeated.plan(key, self.pairs(), scale)
        return plan if plan is not None and plan.fits(x, weight) else None

    def pairs(self) -> list[tuple[LowRank, RoutedGroup]]:
        """Each rule with its group."""
        return list(zip(self.rules, self.groups, strict=True))

    def at(self, owners: Owners) -> PreparedRouted:
        """The rule for a tensor of which every position along which the owner varies is a row."""
        rules: list[LowRank] = []
        groups: list[RoutedGroup] = []
        positions = owners.index.flatten()
        if bool((positions < 0).any()):
            raise LostRowsError("is read at positions without a row", "")
        for rule, group in self.pairs():
            if group.weights is not None:
                rules.append(rule)
                groups.append(group._replace(weights=group.weights[positions.to(group.weights.device).long()]))
                continue
            for some in members_of(group, len(group.scalings), owners):
                leaves: Any = {leaf: some.taken(getattr(rule, leaf)) for leaf in rule.leaf_names}
                rules.append(replace(rule, **leaves))
                scalings = some.taken(group.scalings)
                groups.append(group._replace(scalings=scalings, rows=some.rows, present=None, owners=some.owners))
        n, each = positions.numel(), RoutedGroups(groups)
        return PreparedRouted(tuple(rules), each, n, in_succession(each, n), Repeated())

    def _rewritten(self, op: Any, place: Owner, weight: Tensor, dropout: float) -> Tensor:
        """The operation on the rows' own weights; its input is a plain tensor with the rows in that place."""
        if not self.rules:
            return op.dense(weight, bias=True)  # type: ignore[no-any-return]
        rows = rows_first(op.x, place, self.n)
        scales = [rule.output_scale(weight) for rule in self.rules]
        scaled = any(scale is not None for scale in scales)
        inputs = rows
        if scaled and op.transposed:
            inputs = (rows * _spread_scale(op, rows, self._row_scale(scales))).to(op.x.dtype)
            op = op.with_input(rows_back(inputs, place))
        joint = None if dropout else self._joint(op, inputs, weight, bias=not scaled)
        if joint is not None:
            dtype, out = joint.dtype, joint if op.transposed else _scaled(op, joint, self._row_scale(scales))
        else:
            y = op.dense(weight, bias=not scaled)
            dtype, out = y.dtype, rows_first(y, place, self.n)
            if self.groups[0].weights is not None:
                out = self._mixed(op, rows, out, scales, dropout)
            elif self.succession:
                out = self._by_part(op, inputs, out, scales, dropout)
            else:
                out = self._gathered(op, inputs, out, scales, dropout)
        if scaled and op.bias is not None:
            bias = op.per_output(op.bias)
            out = out + bias.reshape(*[1] * (out.dim() - bias.dim()), *bias.shape)
        return rows_back(out.to(dtype), place)

    def _joint(self, op: Any, x: Tensor, weight: Tensor, *, bias: bool) -> Tensor | None:
        """The base operation and all updates as one function with its own gradient, if it has one and it is needed."""
        if not any(rule.a.requires_grad or rule.b.requires_grad for rule in self.rules):
            return None
        parts = [(self.rules[i], self.groups[i]) for i in self.succession]
        sizes = [end - start for start, end in (group.rows.span for _, group in parts)]  # type: ignore[union-attr, misc]
        groups = [(rule.a, rule.b, group.scalings) for rule, group in parts]
        joint: Tensor | None = op.in_groups(weight, x, sizes, groups, bias=bias) if parts else None
        return joint

    def _by_part(self, op: Any, x: Tensor, y: Tensor, scales: Scales, dropout: float) -> Tensor:
        """The rows of a result, rewritten group by group; x is the operation's input with rows first."""
        sizes = [end - start for start, end in (self.groups[i].rows.span for i in self.succession)]  # type: ignore[union-attr, misc]
        # One split has one gradient; each slice would have one of the size of all rows.
        pieces = zip(*([z] if len(sizes) == 1 else z.split(sizes) for z in (x, y)), strict=True)
        outs = []
        for i, (inputs, base) in zip(self.succession, pieces, strict=True):
            scale, rows = scales[i], self.groups[i].rows
            assert rows is not None
            out = op.add_grouped(rows.split(base), *self._grouped(i, op, rows.split(inputs), dropout))
            if scale is not None and not op.transposed:
                out = _scaled(op, out, scale, before=2)
            outs.append(out.flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _gathered(self, op: Any, x: Tensor, y: Tensor, scales: Scales, dropout: float) -> Tensor:
        """The same, if the rows of the groups are mixed in the batch, or some rows have no member."""
        for i, group in enumerate(self.groups):
            assert group.rows is not None
            inputs = self._grouped(i, op, group.rows.gathered(x), dropout)
            y = group.rows.added(y, op.grouped(*inputs, 0.0))
        return y if op.transposed else _scaled(op, y, self._row_scale(scales))

    def _grouped(self, i: int, op: Any, inputs: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The inputs `[m, count, *]`, factors and scalings of the low-rank updates of the i-th group."""
        rule, group = self.rules[i], self.groups[i]
        assert group.rows is not None
        if dropout and rule.dropout and op.takes_dropout:
            owners = group.rows.first() if group.owners is None else group.owners
            inputs = dropped(inputs.to(rule.a.dtype), rule.dropout, owners, group.rows.counts(len(inputs)))
        if op.transposed:
            return inputs, rule.a, rule.b, None if group.unscaled else group.scalings
        return inputs, rule.a, *self.repeated.factor(i, group, rule.b, inputs.shape[1:-1].numel())

    def _mixed(self, op: Any, x: Tensor, y: Tensor, scales: Scales, dropout: float) -> Tensor:
        """The rows of a result under weighted sums of all members: scales are summed, updates keep their own scale."""
        if not op.transposed:
            y = _scaled(op, y, self._row_scale(scales))
        for rule, group, scale in zip(self.rules, self.groups, scales, strict=True):
            assert group.weights is not None
            weights = group.weights * group.scalings.to(group.weights.dtype)
            for j, w in enumerate(weights.unbind(1)):
                a, b, inputs = rule.a[j : j + 1], rule.b[j : j + 1], x
                own = None if scale is None else op.per_output(scale[j])
                if own is not None and op.transposed:
                    inputs = (x * own).to(x.dtype)
                u = op.grouped(inputs.unsqueeze(0), a, b, None, rule.dropout if dropout else 0.0)[0]
                if own is not None and not op.transposed:
                    u = u * own
                y = y + u * spread(w.to(u.dtype), u, ())
        return y

    def _row_scale(self, scales: Scales) -> Tensor | None:
        """The scale of the base weight's output units for each row, `[n, out]`; None if no row has one."""
        return self.repeated.keep("scale", lambda: self._scale_of_rows(scales))

    def _scale_of_rows(self, scales: Scales) -> Tensor | None:
        of_rows: Tensor | None = None
        mixed: Tensor | None = None
        for own, group in zip(scales, self.groups, strict=True):
            if own is None:
                continue
            if of_rows is None:
                of_rows = own.new_ones(self.n, *own.shape[1:])
            if group.present is not None:
                of_rows = torch.where(spread(group.present, own, ()), own, of_rows)
            elif group.rows is not None:
                each = own.unsqueeze(1).expand(-1, group.rows.count, *own.shape[1:])
                of_rows = group.rows.put(of_rows, each)
            else:
                weights = group.weights.to(own.dtype)  # type: ignore[union-attr]
                of_rows = of_rows - spread(weights.sum(1), of_rows, ())  # the remaining weight of the base
                sums = torch.tensordot(weights, own, 1)
                mixed = sums if mixed is None else mixed + sums
        return of_rows if mixed is None or of_rows is None else of_rows + mixed


def _scaled(op: Any, rows: Tensor, scale: Tensor | None, before: int = 1) -> Tensor:
    """Rows, a temporary, times the scales of their output units, as `_spread_scale`."""
    if scale is None:
        return rows
    factor = _spread_scale(op, rows, scale, before)
    return overwriting()(torch.mul, rows, factor) if rows.dtype == factor.dtype else rows * factor


def _spread_scale(op: Any, rows: Tensor, scale: Any, before: int = 1) -> Tensor:
    """The scales of the output units, `[n, *lead, out]`, to broadcast over rows.

    Args:
        op: the operation.
        rows: `[n, *]`, or with `before=2` `[n, count, *]`.
        scale: the scales.
        before: the number of dimensions before those of a single row.
    """
    if scale.dim() > 2:  # of experts
        lead = scale.shape[1:-1]
        return spread(scale, rows, (*lead, *[1] * (rows.dim() - before - 1 - len(lead)), scale.shape[-1]))
    return spread(scale, rows, op.per_output(scale[0]).shape)


def _repeats(op: Any, weight: Tensor) -> bool:
    """Whether the operation is a product of rows with one matrix, which `Plan` repeats."""
    return isinstance(op, LinearLayerOp) and not op.transposed and weight.dim() == 2


def _keeps(op: Any, x: Tensor, place: Owner, weight: Tensor) -> bool:
    """Whether an operation on a weight keeps rows at that place separate, and apart from the experts of the weight."""
    dims = [place.dim] if isinstance(place, Place) else place.varying()
    if isinstance(op, ConvOp):
        return not any(dims) and x.dim() == op.spatial + 2
    summed = 2 if isinstance(op, LeftMatmulOp) else 1 if isinstance(op, LinearLayerOp) else 0
    if summed and weight.dim() > 2 and any(x.dim() - weight.dim() <= d < x.dim() - 2 for d in dims):
        return False
    return all(d < x.dim() - summed for d in dims)


def spread(v: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A value `[n, *]` for each row, of that shape for one row, to broadcast over rows `[n, *]`."""
    return v.reshape(v.shape[0], *[1] * (like.dim() - 1 - len(shape)), *shape)


class LostRowsError(UnsupportedError):
    """A weight that differs by row gets an input whose rows are not known."""

    def __init__(self, doing: str, cause: str, target: str = "a weight that differs by row") -> None:
        self.doing, self.cause = doing, cause
        where = getattr(cause, "where", "")
        what = f"{cause}{f', called at {where},' if where else ''} mixed or reordered the rows before" if cause else (
            "the input does not come from the batch. If it is the same for all rows, such as positions or queries that "
            "are learned, give the model one for each row where it accepts that (position_ids of shape [rows, tokens])"
        )  # fmt: skip
        super().__init__(
            f"{target} {doing}, but the row of the batch that an input belongs to is not known: {what}. Use "
            "funclora.vmap over the stack, call the model once for each member, or leave out the targets after that "
            "operation."
        )

    def of(self, target: str) -> LostRowsError:
        """The error with the name of the weight."""
        return LostRowsError(self.doing, self.cause, repr(target))

"""What a weight that is read again and again keeps, as the decoding of a batch reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funclora._torch.functions import in_transform, is_sharded, is_watched
from funclora._tracking.groups import FEW, Assignment, RoutedGroup
from funclora.rules.linear_ops import EXACT, add_products, scaled
from funclora.rules.low_rank import LowRank

# The scale of the output units of each group's members, `[m, out]`; None for 1.
Scales = Sequence[Tensor | None]


class Repeated:
    """What a weight keeps from one operation to the next, as long as its members are the same.

    Tensors made in inference mode are kept apart, since autograd refuses them, and those of a transform are not kept.

    Attributes:
        known: the kept values.
        plans: how each kind of operation repeats, as far as that is known.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Tensor | None] = {}
        self.plans: dict[Any, Plan] = {}

    def keep(self, key: Any, made: Callable[[], Tensor | None]) -> Tensor | None:
        """The result of a function: of an earlier call with the same key, if there was one."""
        if torch.compiler.is_compiling() or in_transform():
            return made()
        key = key, torch.is_inference_mode_enabled()
        if key in self.known:
            return self.known[key]
        result = made()
        if result is None or not result.requires_grad:  # the graph of one call is no part of the next
            self.known[key] = result
        return result

    def factor(self, i: int, group: RoutedGroup, b: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
        """B, `[m, out, r]`, of the i-th group in a good order in memory for products with that many rows, and scalings.

        Batches of small products are up to three times as fast with `[m, r, out]` in memory. To reorder B costs as much
        as some products, so B is reordered only after a first product. Then the scalings are multiplied into it too.
        """
        scalings = None if group.unscaled else group.scalings
        if rows > FEW or b.dim() != 3 or torch.compiler.is_compiling() or (scalings is None and b.mT.is_contiguous()):
            return b, scalings
        if i not in self.known:
            self.known[i] = None
            return b, scalings
        if scalings is None or scalings.dtype != b.dtype or b.dtype not in EXACT:
            return self.keep(("b", i), lambda: b.mT.contiguous().mT), scalings  # type: ignore[return-value]
        return self.keep(("b", i), lambda: scaled(b.mT.contiguous(), scalings).mT), None  # type: ignore[return-value]

    def plan(
        self, key: Any, pairs: list[tuple[LowRank, RoutedGroup]], row_scale: Callable[[], Tensor | None]
    ) -> Plan | None:
        """The plan of a kind of operation, once the factors of all groups are in a good order; it is kept.

        Args:
            key: the kind.
            pairs: each rule with its group.
            row_scale: computes the scale of `Plan`, `[n, out]`.
        """
        if torch.compiler.is_compiling() or in_transform():
            return None
        parts = []
        for i, (rule, group) in enumerate(pairs):
            if group.rows is None or rule.a.dim() != 3 or rule.a.requires_grad or rule.b.requires_grad:
                return None
            b, scalings = self.factor(i, group, rule.b, 1)
            if not b.mT.is_contiguous():
                return None
            parts.append(Part(group.rows, rule.a, b.mT, scalings))
        scale = row_scale()
        dtypes = {x.dtype for part in parts for x in (part.first, part.second)}
        if scale is not None:
            dtypes.add(scale.dtype)
            scale = scale.unsqueeze(1)
        if len(dtypes) > 1 or (scale is not None and scale.requires_grad):
            return None
        plan = self.plans[key] = Plan(parts, scale, dtypes.pop())
        return plan


class Part(NamedTuple):
    """The factors of a group's members for the products of their rows.

    Attributes:
        rows: which rows use which member.
        first: `[m, r, in]`.
        second: `[m, r, out]`.
        scalings: `[m]`, or None for 1.
    """

    rows: Assignment
    first: Tensor
    second: Tensor
    scalings: Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """A product with the weights of many rows, with as few steps as possible.

    Attributes:
        parts: the updates of the groups.
        scale: `[n, 1, out]`, the scale of the base weight's output units for each row; None for 1.
        dtype: of the factors and the scale.
    """

    parts: list[Part]
    scale: Tensor | None
    dtype: torch.dtype

    def fits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether results for an input are plain tensors in the dtype of the factors, and may be overwritten."""
        return (
            x.dtype is weight.dtype is self.dtype
            and x.dim() > 1
            and x.is_contiguous()
            and type(x) is Tensor
            and not is_sharded(weight)
            and not is_watched(x, weight)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def run(self, op: Any, weight: Tensor) -> Tensor:
        """The operation on rows `[n, *, in]` in order, `[n, *, out]`."""
        y: Tensor = op.dense(weight, bias=self.scale is None)
        x, out, tokens = op.x, y, y.shape[1:-1].numel()
        n, inputs, outputs = y.shape[0], x.shape[-1], y.shape[-1]
        if y.dim() != 3:
            x, out = x.view(n, tokens, inputs), y.view(n, tokens, outputs)
        for rows, first, second, scalings in self.parts:
            m, each = first.shape[0], rows.count * tokens
            if rows.table is None:  # all rows in order
                add_products(out.view(m, each, outputs), x.view(m, each, inputs), first, second, scalings)
            elif rows.span is not None:
                span = slice(*rows.span)
                add_products(out[span].view(m, each, outputs), x[span].view(m, each, inputs), first, second, scalings)
            else:
                update = out.new_zeros(m * rows.count + 1, tokens, outputs)  # the last one is for rows without a member
                given = x.index_select(0, rows.taken).view(m, each, inputs)
                add_products(update[:-1].view(m, each, outputs), given, first, second, scalings)
                out += update.index_select(0, rows.back)
        if self.scale is not None:
            out *= self.scale
            if op.bias is not None:
                out += op.bias
        return out if y.dim() == 3 else out.view(y.shape)

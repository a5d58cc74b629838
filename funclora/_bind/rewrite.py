"""The replacement of a parameter in a bound model."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funclora._lazy.weight import LazyWeight, Placeholders, requires_grad
from funclora._torch.functions import is_sharded
from funclora._torch.mesh import placed_as, whole
from funclora._torch.pytree import pytree_node
from funclora.rules.base import Rule, dense_of
from funclora.rules.layouts import Embedding, Layout
from funclora.rules.linear_ops import LinearOp


def rewritten(
    name: str,
    weight: Tensor,
    rule: Rule | None,
    owner: nn.Module,
    uses: dict[str, str] | None,
    placeholders: Placeholders,
) -> Tensor:
    """The replacement of a parameter of `owner`; `uses` records how it is used."""
    if rule is None or (uses is None and rule.bind_dense):
        plain = weight
        if rule is not None:
            plain = placed_as(dense_of(name, rule, whole(weight)).to(weight.dtype), weight)
        if plain.dim() != 2 or getattr(owner, "max_norm", None) is None:
            return plain
        # torch would renormalise the embedding matrix in place.
        weight, rule, uses = plain, Unchanged(), None
    elif not (requires_grad(weight) or requires_grad(rule) or (type(weight) is not Tensor and is_sharded(weight))):
        rule = rule.prepared(weight)  # it is never differentiated, so one preparation is enough for every call
    # The owner holds the weight: a weak reference back lets both be freed at once. The compiler cannot trace it.
    held: Any = owner if torch.compiler.is_compiling() else weakref.proxy(owner)
    return LazyWeight.of(name, weight, rule, held, uses, placeholders)


@pytree_node
@dataclass(frozen=True, eq=False)
class Unchanged(Rule):
    """The base weight itself, read without the in-place writes of `F.embedding(..., max_norm=...)`."""

    layout: Layout = field(default=Embedding())

    leaf_names: ClassVar[tuple[str, ...]] = ()
    bind_dense: ClassVar[bool] = True

    def dense(self, weight: Tensor) -> Tensor:
        return weight

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        return op.dense(weight, bias=True)

    def check(self, name: str, weight: Tensor) -> None:
        pass

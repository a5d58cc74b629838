"""Rules: what an adapter does to one weight. The mathematics of a method is written here, once.

    LoRA(a, b)             W  ->  W + s·B·A
    DoRA(a, b, magnitude)  W  ->  m · (W + s·B·A) / ‖W + s·B·A‖      (norm per output unit)
    Full(value)            W  ->  value
    Delta(value)           W  ->  W + s·value

A rule is a pytree node: its children are exactly its trainable tensors, everything else is static. It knows two
things: its dense form (`dense`), and how an operation that is linear in the weight is computed without that
dense form (`apply_op`). A new method is a new subclass of `Rule`, made a tree node by `pytree_node`; those of tables of
tokens are in `_tokens`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from funclora.rules.linear_ops import LinearOp


class Rule(ABC):
    """Rewrites one weight. Subclasses are frozen dataclasses whose tensors come first."""

    leaf_names: ClassVar[tuple[str, ...]]
    # The dense form costs nothing: it is used as it is, no lazy weight stands for it.
    bind_dense: ClassVar[bool] = False

    @abstractmethod
    def dense(self, weight: Tensor) -> Tensor:
        """The rewritten weight, not yet rounded: in float32 at least, in the adapter's dtype if that is wider.

        Args:
            weight: the base weight, as its module stores it.

        Returns:
            A tensor of the weight's shape.
        """

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        """The result of `op` on the rewritten weight, in the dtype that `op` gives on the base weight.

        Args:
            op: the operation.
            weight: the base weight.
            dropout: the probability that applies in this call (0 in evaluation mode).
        """
        return op.dense(self.dense(weight).to(weight.dtype), bias=True)

    @abstractmethod
    def check(self, name: str, weight: Tensor) -> None:
        """Raise `ParamsError` if this rule does not fit the weight of that name."""

    def prepared(self, weight: Tensor) -> Rule:
        """A rule with the same results that has computed what depends on nothing but itself and the weight."""
        return self

    @property
    def dropout_p(self) -> float:
        """The dropout probability on the rule's own input in training mode."""
        return 0.0


Adapters = Mapping[str, Rule]
Params = Mapping[str, Tensor]

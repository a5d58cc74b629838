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
from typing import Any, ClassVar

from torch import Tensor

from funclora.rules.layouts import Layout, Shape
from funclora.rules.linear_ops import LinearOp


class Rule(ABC):
    """Rewrites one weight. Subclasses are frozen dataclasses whose tensors come first.

    `dense` and `check` are a rule's own. All else has a default that is right for every rule: `None` where a rule has
    no such form, and then the dense weight is computed, or an error says what is missing.

    Attributes:
        leaf_names: the fields that hold the trainable tensors.
        bind_dense: the dense form costs nothing: it is used as it is, no lazy weight stands for it.
        layout: where the matrix that the rule rewrites is in the weight. None: `apply_op` is never called, every
            operation gets the dense weight.
    """

    leaf_names: ClassVar[tuple[str, ...]]
    bind_dense: ClassVar[bool] = False
    layout: Layout | None = None

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

    def transposed(self) -> Rule | None:
        """The rule of the transposed weight; None if there is no such rule."""
        return None

    def narrow_outputs(self, start: int, length: int) -> Rule | None:
        """The rule of `length` output units from `start` on; None if there is no such rule."""
        return None

    def narrow_inputs(self, start: int, length: int) -> Rule | None:
        """The rule of `length` inputs from `start` on; None if there is no such rule."""
        return None

    def select_experts(self, index: Any) -> Rule | None:
        """The rule of `weight[index]`, where the index selects among leading dimensions (experts); None if none."""
        return None

    def narrow(self, shape: Shape, dim: int, start: int, length: int) -> Rule | None:
        """The rule of `weight.narrow(dim, start, length)`; None if there is no such rule.

        Args:
            shape: the shape of the weight.
            dim: the dimension, counted from the front.
            start: the first slice.
            length: how many.
        """
        if (start, length) == (0, shape[dim]):
            return self
        what = None if self.layout is None else self.layout.counts(shape, dim)
        if what == "outputs":
            return self.narrow_outputs(start, length)
        if what == "inputs":
            return self.narrow_inputs(start, length)
        if what == "experts":
            return self.select_experts((slice(None),) * dim + (slice(start, start + length),))
        return None

    @property
    def dropout_p(self) -> float:
        """The dropout probability on the rule's own input in training mode."""
        return 0.0


Adapters = Mapping[str, Rule]
"""One adapter: full name of a parameter -> rule."""

Params = Mapping[str, Tensor]
"""A model's weights: full name -> tensor, as from `base_params`."""

"""Rules: what an adapter does to one weight. The mathematics of each method is written here, once.

    LoRA(a, b)             W  ->  W + s·B·A
    DoRA(a, b, magnitude)  W  ->  m · (W + s·B·A) / ‖W + s·B·A‖      (norm per output unit)
    Full(value)            W  ->  value
    Delta(value)           W  ->  W + s·value

A rule is a pytree node: its children are exactly its trainable tensors, everything else is static. It knows its dense
form (`dense`), how to compute an operation that is linear in the weight without it (`apply_op`), and which other forms
it has. A new method is a new subclass of `Rule` with the decorator `pytree_node`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, TypeVar

import optree
import torch
from torch import Tensor

from funclora.errors import ParamsError, UnsupportedError
from funclora.rules.layouts import Layout
from funclora.rules.linear_ops import LinearOp

R = TypeVar("R", bound="Rule")


class Rule(ABC):
    """Rewrites one weight. A method is a subclass: a frozen dataclass that `pytree_node` makes a tree node.

    Only `dense` and `check` are required. A rule that is a low-rank update returns it from `as_lora`; operations,
    views, `route` and `algebra` then use it. Every other method has a default; where the default is None, the dense
    weight is computed, or an error says what is missing.

    Attributes:
        leaf_names: the fields that hold the trainable tensors.
        frozen_names: the fields marked with `FROZEN`; set by `pytree_node`.
        up_leaf_names: the leaves that `lora_plus` trains with the larger rate: those next to the output.
        bind_dense: the dense form costs nothing, and is used directly instead of a lazy weight.
        layout: where the matrix that the rule rewrites is in the weight. None: `apply_op` is never called, and every
            operation gets the dense weight.
        scaling: the factor of the update; None if the rule has no such number. If it is a field but not a leaf,
            members of a stack may differ in it, and it is a tensor `[]` where they are mapped.
        r: the rank of the update, if it has one.

    Examples:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> import funclora as fl
        >>> @fl.rules.pytree_node
        ... @dataclass(frozen=True, eq=False)
        ... class Gain(fl.Rule):
        ...     value: Tensor
        ...     leaf_names = ("value",)
        ...
        ...     def dense(self, weight):
        ...         return weight.float() * self.value[:, None]
        ...
        ...     def check(self, name, weight):
        ...         if self.value.shape != weight.shape[:1]:
        ...             raise fl.errors.ParamsError(f"{name!r}: expected one gain for each row of the weight.")
        >>> fl.merge({"weight": torch.ones(2, 2)}, {"weight": Gain(torch.tensor([3.0, 5.0]))})["weight"]
        tensor([[3., 3.],
                [5., 5.]])
    """

    leaf_names: ClassVar[tuple[str, ...]]
    frozen_names: ClassVar[tuple[str, ...]] = ()
    up_leaf_names: ClassVar[tuple[str, ...]] = ()
    bind_dense: ClassVar[bool] = False
    layout: Layout | None = None
    scaling: float | Tensor | None = None
    r: int | None = None

    @abstractmethod
    def dense(self, weight: Tensor) -> Tensor:
        """The rewritten weight, not yet rounded: in float32 at least, or in the adapter's dtype if it is wider.

        Args:
            weight: the base weight, as its module stores it.

        Returns:
            A tensor of the weight's shape.
        """

    @abstractmethod
    def check(self, name: str, weight: Tensor) -> None:
        """Raise `ParamsError` if this rule does not fit the weight of that name."""

    # --- as a low-rank update ----------------------------------------------------------------------------------

    def as_lora(self) -> Rule | None:
        """The `LoRA` with the same effect on every weight; None if there is none."""
        return None

    def low_rank(self) -> Rule | None:
        """The low-rank update V = W + s·B·A of which the rewritten weight is a multiple in each output unit.

        Returns:
            A `LoRA`. `output_scale` gives the multiples. None if the rewritten weight has no such form.
        """
        return self.as_lora()

    def output_scale(self, weight: Tensor) -> Tensor | None:
        """The factor of each output unit of `low_rank`, `[*lead, out]`; None for 1."""
        return None

    def with_scaling(self: R, scaling: float | Tensor) -> R:
        """The rule with another scaling."""
        rule: Any = self
        changed: R = replace(rule, scaling=scaling)
        return changed

    def scaled(self, factor: float) -> Rule | None:
        """The rule whose change of the weight is `factor` times as large; None if there is none."""
        lora = self.as_lora()
        return None if lora is None else lora.scaled(factor)

    @property
    def rank_dims(self) -> Mapping[str, int]:
        """The rank dimension of each leaf that has one: zeros after the last rank add nothing."""
        return {}

    # --- one operation -----------------------------------------------------------------------------------------

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        """The result of `op` on the rewritten weight, in the dtype that `op` gives on the base weight.

        Args:
            op: the operation.
            weight: the base weight.
            dropout: the probability that applies in this call (0 in evaluation mode).
        """
        prepared = self.prepared(weight)
        if prepared is not self:
            return prepared.apply_op(op, weight, dropout)
        if dropout and op.takes_dropout:
            raise UnsupportedError(
                f"{type(self).__name__}: dropout {dropout} cannot act on the dense weight. Set it to 0, or give the "
                "rule a low_rank form or an apply_op that drops inputs."
            )
        return op.dense(self.dense(weight).to(weight.dtype), bias=True)

    def prepared(self, weight: Tensor) -> Rule:
        """A rule with the same results, with everything precomputed that depends only on the rule and the weight."""
        low: Any = self.low_rank()
        if low is None:
            return self
        scale = self.output_scale(weight)
        prepared: Rule = low if scale is None else low.with_scale(scale)
        return prepared

    @property
    def dropout_p(self) -> float:
        """The dropout probability on the rule's own input in training mode."""
        return 0.0

    # --- parts of the weight -----------------------------------------------------------------------------------

    def transposed(self) -> Rule | None:
        """The rule of the transposed weight; None if there is no such rule."""
        lora = self.as_lora()
        return None if lora is None else lora.transposed()

    def narrow_outputs(self, start: int, length: int) -> Rule | None:
        """The rule of `length` output units from `start` on; None if there is no such rule."""
        lora = self.as_lora()
        return None if lora is None else lora.narrow_outputs(start, length)

    def narrow_inputs(self, start: int, length: int) -> Rule | None:
        """The rule of `length` inputs from `start` on; None if there is no such rule."""
        lora = self.as_lora()
        return None if lora is None else lora.narrow_inputs(start, length)

    def split_outputs(self, groups: int) -> Rule | None:
        """The rule of `weight.view(groups, -1, n_in)`; None if there is no such rule."""
        lora = self.as_lora()
        return None if lora is None else lora.split_outputs(groups)

    def select_experts(self, index: Any) -> Rule | None:
        """The rule of `weight[index]`, where the index selects among leading dimensions (experts); None if none."""
        lora = self.as_lora()
        return None if lora is None else lora.select_experts(index)

    def narrow(self, shape: tuple[int, ...], dim: int, start: int, length: int) -> Rule | None:
        """The rule of `weight.narrow(dim, start, length)`; None if there is no such rule.

        Args:
            shape: the shape of the weight.
            dim: the dimension, counted from the front.
            start: the first slice.
            length: the number of slices.
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

    # --- many members at once ----------------------------------------------------------------------------------

    def low_rank_of_members(self, scalings: Tensor) -> tuple[Rule, Tensor]:
        """`low_rank` of m members, where the leaves of this rule are `[m, *]`.

        Args:
            scalings: `[m]`, the scaling of each member.

        Returns:
            Their updates, with leaves `[m, *]`, and the scalings of these, `[m]`.
        """
        found = of_members(self, scalings, lambda rule: rule.low_rank())
        assert found is not None
        return found

    def output_scale_of_members(self, weight: Tensor, scalings: Tensor) -> Tensor | None:
        """`output_scale` of m members, where the leaves of this rule are `[m, *]`: `[m, *lead, out]`."""
        scales = []
        for j, scaling in enumerate(scalings):
            one = self.member(j)
            scales.append(rescaled(one, scaling).output_scale(weight))
        found = [scale for scale in scales if scale is not None]
        return torch.stack(found) if found else None

    def member(self, j: int) -> Rule:
        """The rule of member j, where the leaves of this rule are `[m, *]`."""
        rule: Any = self
        one: Rule = replace(rule, **{leaf: getattr(rule, leaf)[j] for leaf in rule.leaf_names})
        return one


def next_to_output(tree: Any) -> list[bool]:
    """For each leaf of a tree, whether it is a factor next to the output; without rules, those with the name `b`."""
    found = []
    paths, nodes, _ = optree.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Rule))
    for path, node in zip(paths, nodes, strict=True):
        if isinstance(node, Rule):
            for name in node.leaf_names:
                found += [name in node.up_leaf_names] * len(optree.tree_leaves(getattr(node, name)))
        else:
            found.append(path[-1:] == ("b",))
    return found


def has_own_scaling(rule: Any) -> bool:
    """Whether a rule's scaling can be another number: it is a field, but not a leaf."""
    named = any(f.name == "scaling" for f in fields(rule)) and "scaling" not in rule.leaf_names
    return named and rule.scaling is not None


def rescaled(rule: R, scaling: float | Tensor) -> R:
    """The rule with another scaling, if it has one of its own."""
    return rule.with_scaling(scaling) if has_own_scaling(rule) else rule


def dense_of(name: str, rule: Rule, weight: Tensor) -> Tensor:
    """`rule.dense(weight)` for the parameter of that name.

    Raises:
        ParamsError: the rule returns something else than a tensor of the shape of the weight.
    """
    dense = rule.dense(weight)
    if not isinstance(dense, Tensor) or dense.shape != weight.shape:
        got = f"shape {list(dense.shape)}" if isinstance(dense, Tensor) else f"a {type(dense).__name__}"
        raise ParamsError(
            f"{name!r}: {type(rule).__name__}.dense returned {got}, expected a tensor of the weight's shape "
            f"{list(weight.shape)}."
        )
    return dense


def of_members(rule: Rule, scalings: Tensor, form: Callable[[Rule], Rule | None]) -> tuple[Rule, Tensor] | None:
    """`form` of m members, where the leaves of their rule are `[m, *]`; None if it is None.

    Args:
        rule: the members' rule.
        scalings: `[m]`, the scaling of each member.
        form: another form of a rule.

    Returns:
        A rule with leaves `[m, *]`, and the members' scalings there, `[m]`.
    """
    one: Any = form(rule.member(0))
    if one is None:
        return None

    def leaves(rule: Rule, scaling: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        one: Any = form(rescaled(rule, scaling))
        number = 1.0 if one.scaling is None else one.scaling
        return tuple(getattr(one, leaf) for leaf in one.leaf_names), torch.as_tensor(
            number, dtype=scalings.dtype, device=scalings.device
        )

    values, scalings = torch.func.vmap(leaves)(rule, scalings)
    return replace(one, **dict(zip(one.leaf_names, values, strict=True))), scalings


def kinds_of(adapters: Mapping[str, Any]) -> set[type]:
    """The classes of the rules. A model has many rules of few classes, and to ask for the class of each takes time."""
    return set(map(type, adapters.values()))


Adapters = Mapping[str, Rule]
"""One adapter: full name of a parameter -> rule."""

Params = Mapping[str, Tensor]
"""A model's weights: full name -> tensor, as `base_params` returns them."""

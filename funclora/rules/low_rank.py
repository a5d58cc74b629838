"""Low-rank updates: the common base of their rules, LoRA, and other rules written as low-rank updates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funclora._quant.tensor import plain_weight
from funclora._torch.functions import is_mapped, no_autocast
from funclora._torch.pytree import pytree_node
from funclora.errors import ParamsError
from funclora.rules.base import Rule
from funclora.rules.layouts import Layout, Linear, Matrices, Parameter
from funclora.rules.linear_ops import LinearOp


@dataclass(frozen=True, eq=False)
class LowRank(Rule):
    """The base of rules with the factors of a low-rank update: g·(W + s·B·A), with one g for each output unit.

    A subclass defines g in `output_scale`, and names its leaves: `a`, `b`, then vectors `[*lead, out]`.
    This class has the operations and views of the weight.

    Attributes:
        a: the factor that reads the input, `[r, in]` (see `funclora.rules.layouts` for convolutions and experts).
        b: the factor that writes the output, `[out, r]`, of the dtype of `a`.
        scaling: s, usually α/r, or α/√r for rsLoRA (arXiv 2312.03732). A number; a tensor `[]` where members of a
            stack that differ in it are mapped.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix is in the weight.

    Examples:
        >>> import torch
        >>> from dataclasses import dataclass
        >>> from funclora.rules import LowRank, pytree_node
        >>> @pytree_node
        ... @dataclass(frozen=True, eq=False)
        ... class Gained(LowRank):
        ...     gain: Tensor
        ...     leaf_names = ("a", "b", "gain")
        ...
        ...     def output_scale(self, weight):
        ...         return self.gain
        >>> Gained(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor([5.0])).dense(torch.ones(1, 2))
        tensor([[5., 5.]])
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = field(default=1.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    layout: Layout = field(default=Linear(), kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")
    up_leaf_names: ClassVar[tuple[str, ...]] = ("b",)

    def __post_init__(self) -> None:
        for name in self.leaf_names:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise ParamsError(f"{type(self).__name__}.{name}: expected a tensor, got {type(value).__name__}.")
        if not isinstance(self.scaling, Tensor):
            largest = torch.finfo(torch.float64 if self.a.dtype == torch.float64 else torch.float32).max
            if not abs(self.scaling) <= largest:
                raise ParamsError(
                    f"{type(self).__name__}.scaling: expected a number up to {largest:.0e}, got {self.scaling!r}."
                )
        if not 0 <= self.dropout < 1:
            raise ParamsError(f"{type(self).__name__}.dropout: expected a number in [0, 1), got {self.dropout!r}.")

    @property
    def r(self) -> int:  # type: ignore[override]
        """The rank of the update."""
        return self.layout.factors(self.a, self.b)[0].shape[-2]

    @property
    def dropout_p(self) -> float:
        return self.dropout

    def leaf_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes that the leaves must have for that weight, by field name."""
        shapes = dict(zip(("a", "b"), self.layout.factor_shapes(weight.shape, self.r), strict=True))
        vectors = self.leaf_names[2:]
        return shapes | dict.fromkeys(vectors, self.layout.magnitude_shape(weight.shape)) if vectors else shapes

    def check(self, name: str, weight: Tensor) -> None:
        refuse_low_rank(name, weight)
        for leaf, shape in self.leaf_shapes(weight).items():
            got = tuple(getattr(self, leaf).shape)
            if got != shape:
                raise ParamsError(
                    f"adapter of {name!r}: {leaf} has shape {list(got)}, expected {list(shape)} for a weight of "
                    f"shape {list(weight.shape)} with layout {type(self.layout).__name__} and rank {self.r}."
                )

    @property
    def rank_dims(self) -> dict[str, int]:
        return dict(zip(("a", "b"), self.layout.rank_dims, strict=True))

    def low_rank(self) -> LoRA:
        return LoRA(self.a, self.b, scaling=self.scaling, dropout=self.dropout, layout=self.layout)

    def prepared(self, weight: Tensor) -> LowRank:
        scale = self.output_scale(weight)
        return self.low_rank() if scale is None else self.with_scale(scale)

    def with_scale(self, scale: Tensor) -> LowRank:
        """The same update with other multiples of the output units, `[*lead, out]`."""
        low = self.low_rank()
        return ScaledLowRank(low.a, low.b, scale, scaling=low.scaling, dropout=low.dropout, layout=low.layout)

    def dense(self, weight: Tensor) -> Tensor:
        updated, scale = self.update(weight), self.output_scale(weight)
        return self.layout.from_matrix(updated if scale is None else scale.unsqueeze(-1) * updated, weight.shape)

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        flat = op.flat()
        y = self._apply(flat, weight, dropout)
        return y if flat is op else op.shaped(y)

    def _apply(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        scale = self.output_scale(weight)
        if scale is None:
            y = op.dense(weight, bias=True)
            out = self.add_update(op, y, dropout)
            return out if out is y else out.to(y.dtype)
        scale = op.per_output(scale)
        if op.transposed:
            op = op.scaled_input(scale)
            y = op.dense(weight, bias=True)
            return self.add_update(op, y, dropout).to(y.dtype)
        y = op.dense(weight, bias=False)
        out = self.add_update(op, y, dropout)
        if op.bias is None:
            return (out * scale).to(y.dtype)
        return torch.addcmul(op.per_output(op.bias).to(out.dtype), out, scale.to(out.dtype)).to(y.dtype)

    def low_rank_of_members(self, scalings: Tensor) -> tuple[LoRA, Tensor]:
        return self.low_rank(), scalings

    def output_scale_of_members(self, weight: Tensor, scalings: Tensor) -> Tensor | None:
        has_none = type(self).output_scale is Rule.output_scale
        return None if has_none else super().output_scale_of_members(weight, scalings)

    def transposed(self) -> LowRank | None:
        layout = self.layout
        return replace(self, layout=Parameter(not layout.transposed)) if isinstance(layout, Matrices) else None

    def narrow_outputs(self, start: int, length: int) -> LowRank | None:
        layout, dim = self.layout.of_outputs(), self.layout.rank_dims[1] - 1
        if layout is None:
            return None
        vectors = {name: getattr(self, name).narrow(-1, start, length) for name in self.leaf_names[2:]}
        return replace(self, b=self.b.narrow(dim, start, length), **vectors, layout=layout)

    def split_outputs(self, groups: int) -> LowRank | None:
        if not isinstance(self.layout, Matrices) or self.layout.transposed or self.a.dim() != 2:
            return None
        vectors = {name: getattr(self, name).unflatten(-1, (groups, -1)) for name in self.leaf_names[2:]}
        a, b = self.a.expand(groups, *self.a.shape), self.b.unflatten(0, (groups, -1))
        return replace(self, a=a, b=b, **vectors, layout=Parameter(stored_transposed=False))

    def narrow_inputs(self, start: int, length: int) -> LowRank | None:
        of_inputs = type(self).output_scale not in (Rule.output_scale, ScaledLowRank.output_scale)  # such as a norm
        if of_inputs or not isinstance(self.layout, Matrices):
            return None
        return replace(self, a=self.a.narrow(-1, start, length), layout=Parameter(self.layout.transposed))

    def select_experts(self, index: Any) -> LowRank | None:
        if not isinstance(self.layout, Matrices):
            return None
        leaves = {name: getattr(self, name)[index] for name in self.leaf_names}
        return replace(self, **leaves, layout=Parameter(self.layout.transposed))

    def add_update(self, op: LinearOp, y: Tensor, dropout: float) -> Tensor:
        """`y + s·op(B·A)`, in the wider dtype of the two; y is a temporary, which may be overwritten."""
        return op.add_low_rank(y, self.a, self.b, self.scaling, dropout, temporary=True)

    def delta(self) -> Tensor:
        """s·B·A as a matrix `[*lead, out, in]`, in float32 at least."""
        a, b = self.layout.factors(self.a, self.b)
        nothing = a.new_zeros(()).expand(*a.shape[:-2], b.shape[-2], a.shape[-1])
        return updated(nothing, a, b, self.scaling)

    def update(self, weight: Tensor) -> Tensor:
        """M + s·B·A as a matrix `[*lead, out, in]`, in the dtype of `dense`."""
        a, b = self.layout.factors(self.a, self.b)
        return updated(self.layout.to_matrix(plain_weight(weight)), a, b, self.scaling)


@pytree_node
@dataclass(frozen=True, eq=False)
class LoRA(LowRank):
    """The low-rank update W + s·B·A (Hu et al., arXiv 2106.09685, equation 3).

    Attributes:
        a: the factor that reads the input, `[r, in]`.
        b: the factor that writes the output, `[out, r]`.
        scaling: s.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix is in the weight.

    Examples:
        >>> import torch
        >>> rule = LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        >>> rule.dense(torch.zeros(2, 3))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")

    def as_lora(self) -> LoRA:
        return self

    def low_rank(self) -> LoRA:
        return self

    def scaled(self, factor: float) -> LoRA:
        return replace(self, scaling=factor * self.scaling)


@pytree_node
@dataclass(frozen=True, eq=False)
class ScaledLowRank(LowRank):
    """scale·(W + s·B·A), one scale for each output unit: a rule such as DoRA after its norms are computed.

    Attributes:
        scale: `[*lead, out]`.
    """

    scale: Tensor

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b", "scale")

    def output_scale(self, weight: Tensor) -> Tensor:
        return self.scale

    def output_scale_of_members(self, weight: Tensor, scalings: Tensor) -> Tensor:
        return self.scale


def lora_of(rule: Rule) -> LoRA | None:
    """The `LoRA` with the same effect as a rule; None if there is none."""
    return _lora(rule, "as_lora", rule.as_lora())


def low_rank_of(rule: Rule) -> LoRA | None:
    """The low-rank update that a rule scales; None if there is none."""
    return _lora(rule, "low_rank", rule.low_rank())


def low_rank_of_members(rule: Rule, scalings: Tensor) -> tuple[LoRA, Tensor]:
    """The updates of m members whose rule has leaves `[m, *]`, and their scalings `[m]`."""
    form, scalings = rule.low_rank_of_members(scalings)
    lora = _lora(rule, "low_rank_of_members", form)
    assert lora is not None
    return lora, scalings


def _lora(rule: Rule, method: str, form: object) -> LoRA | None:
    if form is None or isinstance(form, LoRA):
        return form
    raise ParamsError(f"{type(rule).__name__}.{method}: expected a LoRA or None, got {type(form).__name__}.")


def refuse_low_rank(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight cannot have a low-rank update; the error names the weight and the reason."""
    if not weight.is_floating_point():
        raise ParamsError(f"{name!r} has dtype {weight.dtype}; a low-rank update needs a floating-point weight.")
    if weight.dim() < 2:
        raise ParamsError(
            f"{name!r} has shape {list(weight.shape)}; a low-rank update needs two or more dimensions. "
            "Train it with Full (bias=..., modules_to_save=...) instead."
        )
    if weight.shape.numel() == 0:
        raise ParamsError(f"{name!r} has shape {list(weight.shape)}: it is empty and cannot have an update.")


def updated(matrix: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """M + s·B·A, in the dtype that `compute_dtype` gives.

    Args:
        matrix: M, `[*lead, out, in]`.
        a: A, `[*lead, r, in]`.
        b: B, `[*lead, out, r]`.
        scaling: s.

    Returns:
        `[*lead, out, in]`.

    Examples:
        >>> updated(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 2.0)
        tensor([[ 7., 13.]])
    """
    dtype = compute_dtype(matrix.dtype, a.dtype)
    given, matrix, a, b = matrix, matrix.to(dtype), a.to(dtype), b.to(dtype)
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    eager = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not is_mapped(matrix, a, b)
    if eager and matrix is not given and matrix.dim() == 2:
        return matrix.addmm_(b, a, alpha=scaling)  # into the copy, which saves a pass over memory
    with no_autocast(matrix.device):  # a weight is never computed in half precision
        if matrix.dim() == 2:
            return torch.addmm(matrix, b, a, alpha=scaling)
        return torch.add(matrix, b @ a, alpha=scaling)


def compute_dtype(weight: torch.dtype, factor: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is rewritten: the wider of the two, float32 at least.

    Examples:
        >>> compute_dtype(torch.bfloat16, torch.float16), compute_dtype(torch.float32, torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(torch.promote_types(weight, factor), torch.float32)

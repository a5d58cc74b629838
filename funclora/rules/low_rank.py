"""Low-rank updates: what their rules share, and LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funclora._quant.tensor import plain_weight
from funclora._torch.functions import is_mapped
from funclora._torch.pytree import pytree_node
from funclora.errors import ParamsError
from funclora.rules.base import Rule
from funclora.rules.layouts import Layout, Linear, Matrices, Parameter
from funclora.rules.linear_ops import LinearOp


@dataclass(frozen=True, eq=False)
class LowRank(Rule):
    """What the rules of a low-rank update s·B·A share: the factors and their fit to the weight.

    Attributes:
        a: the factor that reads the input, `[r, in]` (see `funclora.rules.layouts` for convolutions and experts).
        b: the factor that writes the output, `[out, r]`, of the dtype of `a`.
        scaling: s, usually α/r, or α/√r for rsLoRA (arXiv 2312.03732). A number; a tensor `[]` where members of a
            stack that differ in it are mapped.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix lies in the weight.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = field(default=1.0, kw_only=True)
    dropout: float = field(default=0.0, kw_only=True)
    layout: Layout = field(default=Linear(), kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")

    def __post_init__(self) -> None:
        for name in self.leaf_names:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise ParamsError(f"{type(self).__name__}.{name}: expected a tensor, got {type(value).__name__}.")
        if not 0 <= self.dropout < 1:
            raise ParamsError(f"{type(self).__name__}.dropout: expected a number in [0, 1), got {self.dropout!r}.")

    @property
    def r(self) -> int:
        """The rank of the update."""
        return self.layout.factors(self.a, self.b)[0].shape[-2]

    @property
    def dropout_p(self) -> float:
        return self.dropout

    def leaf_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes that the leaves must have for that weight, by field name."""
        return dict(zip(("a", "b"), self.layout.factor_shapes(weight.shape, self.r), strict=True))

    def check(self, name: str, weight: Tensor) -> None:
        refuse_low_rank(name, weight)
        for leaf, shape in self.leaf_shapes(weight).items():
            got = tuple(getattr(self, leaf).shape)
            if got != shape:
                raise ParamsError(
                    f"adapter of {name!r}: {leaf} has shape {list(got)}, expected {list(shape)} for a weight of "
                    f"shape {list(weight.shape)} with layout {type(self.layout).__name__} and rank {self.r}."
                )

    def transposed(self) -> LowRank | None:
        layout = self.layout
        return replace(self, layout=Parameter(not layout.transposed)) if isinstance(layout, Matrices) else None

    def narrow_outputs(self, start: int, length: int) -> LowRank | None:
        layout, dim = self.layout.of_outputs(), self.layout.rank_dims[1] - 1
        if layout is None:
            return None
        vectors = {name: getattr(self, name).narrow(-1, start, length) for name in self.leaf_names[2:]}
        return replace(self, b=self.b.narrow(dim, start, length), **vectors, layout=layout)

    def narrow_inputs(self, start: int, length: int) -> LowRank | None:
        if not isinstance(self.layout, Matrices):
            return None
        return replace(self, a=self.a.narrow(-1, start, length), layout=Parameter(self.layout.transposed))

    def select_experts(self, index: Any) -> LowRank | None:
        if not isinstance(self.layout, Matrices):
            return None
        leaves = {name: getattr(self, name)[index] for name in self.leaf_names}
        return replace(self, **leaves, layout=Parameter(self.layout.transposed))

    def add_update(self, op: LinearOp, y: Tensor, dropout: float) -> Tensor:
        """`y + s·op(B·A)`, in the wider dtype of the two."""
        return op.add_low_rank(y, self.a, self.b, self.scaling, dropout)

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
        layout: where the matrix lies in the weight.

    Examples:
        >>> import torch
        >>> rule = LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=0.5)
        >>> rule.dense(torch.zeros(2, 3))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")

    def dense(self, weight: Tensor) -> Tensor:
        return self.layout.from_matrix(self.update(weight), weight.shape)

    def apply_op(self, op: LinearOp, weight: Tensor, dropout: float) -> Tensor:
        y = op.dense(weight, bias=True)
        return self.add_update(op, y, dropout).to(y.dtype)


def refuse_low_rank(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight cannot carry a low-rank update, naming it and saying why."""
    if not weight.is_floating_point():
        raise ParamsError(f"{name!r} has dtype {weight.dtype}; a low-rank update needs a floating-point weight.")
    if weight.dim() < 2:
        raise ParamsError(
            f"{name!r} has shape {list(weight.shape)}; a low-rank update needs two or more dimensions. "
            "Train it with Full (bias=..., modules_to_save=...) instead."
        )
    if weight.shape.numel() == 0:
        raise ParamsError(f"{name!r} has shape {list(weight.shape)}: it is empty and cannot carry an update.")


def updated(matrix: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """M + s·B·A in the compute dtype; shapes `[*lead, out, in]`, `[*lead, r, in]`, `[*lead, out, r]`."""
    dtype = compute_dtype(matrix.dtype, a.dtype)
    given, matrix, a, b = matrix, matrix.to(dtype), a.to(dtype), b.to(dtype)
    if isinstance(scaling, Tensor):
        b, scaling = b * scaling, 1.0
    eager = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and not is_mapped(matrix, a, b)
    if eager and matrix is not given and matrix.dim() == 2:
        return matrix.addmm_(b, a, alpha=scaling)  # into the copy, which saves a pass over memory
    with torch.autocast(matrix.device.type, enabled=False):  # a weight is never computed in half precision
        if matrix.dim() == 2:
            return torch.addmm(matrix, b, a, alpha=scaling)
        return torch.add(matrix, b @ a, alpha=scaling)


def compute_dtype(weight: torch.dtype, factor: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is rewritten: the wider of the two, float32 at least."""
    return torch.promote_types(torch.promote_types(weight, factor), torch.float32)

"""DoRA, and the norms that it divides by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from funclora._quant.tensor import plain_weight
from funclora._torch.functions import no_autocast, no_gradients
from funclora._torch.pytree import pytree_node
from funclora.rules.layouts import ConvTranspose, Layout
from funclora.rules.low_rank import LowRank, compute_dtype, updated

# The number of members whose norms are computed together.
CHUNK = 16
# The DoRA norm reads the adapted weight in blocks. A block has at most this many elements ...
NORM_BLOCK = 2**20
# ... and at most this share of the weight, so that the complete weight never exists, ...
NORM_SHARE = 8
# ... unless so small a block would cost more time for calls than it saves memory.
SMALL_BLOCK = 2**16
# The squared norm of a difference of two vectors, relative to their squares, if it is only rounding of float32.
CANCELLED = 2.0**-46


@pytree_node
@dataclass(frozen=True, eq=False)
class DoRA(LowRank):
    """The weight-decomposed update m·V/‖V‖ with V = W + s·B·A (Liu et al., arXiv 2402.09353, equation 5).

    ‖V‖ is the norm of each row of V, one per output unit. Unless `exact_norm_grad` it is a constant of the
    gradient (section 4.3 of the paper). A row of V that is zero stays zero. The bias is not scaled. Dropout
    acts on the input of `a` only, not on the input of W (PEFT drops both).

    Attributes:
        a: the factor that reads the input, `[r, in]`.
        b: the factor that writes the output, `[out, r]`.
        magnitude: m, `[*lead, out]`.
        scaling: s.
        dropout: the probability with which inputs of `a` are dropped while the weight's module trains.
        layout: where the matrix is in the weight.
        exact_norm_grad: differentiate through the norm too.

    Examples:
        >>> import torch
        >>> rule = DoRA(torch.zeros(1, 2), torch.zeros(1, 1), torch.tensor([10.0]))
        >>> rule.dense(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """

    magnitude: Tensor
    exact_norm_grad: bool = field(default=False, kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    def output_scale(self, weight: Tensor) -> Tensor:
        if self.exact_norm_grad:
            return self._scale(weight_norms(self.layout, weight, self.a, self.b, self.scaling), weight.dtype)
        with no_gradients():
            norms = weight_norms(self.layout, weight, self.a, self.b, self.scaling).detach()
        return self._scale(norms, weight.dtype)

    def output_scale_of_members(self, weight: Tensor, scalings: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.a.dtype) == torch.float64
        if wide or self.exact_norm_grad or isinstance(self.layout, ConvTranspose):
            of_each = torch.func.vmap(lambda rule, s: replace(rule, scaling=s).output_scale(weight), chunk_size=CHUNK)
            scale: Tensor = of_each(self, scalings)
            return scale
        with no_gradients():
            a, b = torch.func.vmap(self.layout.factors)(self.a, self.b)
            norms = output_norms_of_many(self.layout.to_matrix(plain_weight(weight)), a, b, scalings).detach()
        return self._scale(norms, weight.dtype)

    def _scale(self, norms: Tensor, dtype: torch.dtype) -> Tensor:
        """m/‖V‖, for a weight of that dtype; 0 where the norm is zero."""
        zero = norms == 0
        quotient = torch.where(zero, 0.0, self.magnitude / torch.where(zero, 1.0, norms))
        return quotient.to(compute_dtype(dtype, self.a.dtype))


def weight_norms(layout: Layout, weight: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """The norms of the output units of the updated weight, ‖M + s·B·A‖ by rows: `[*lead, out]`, in float64."""
    weight = plain_weight(weight)
    norms = []
    for piece, a_piece in layout.split_inputs(weight, a, NORM_SHARE):
        a_matrix, b_matrix = layout.factors(a_piece, b)
        norms.append(output_norms(layout.to_matrix(piece), a_matrix, b_matrix, scaling))
    return norms[0] if len(norms) == 1 else _norm(torch.stack(norms), 0)


def output_norms(matrix: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """The norms of the rows of M + s·B·A, without storing the complete matrix.

    ‖M‖² + 2s·rowsum((M·Aᵀ)∘B) + s²·rowsum((B·A·Aᵀ)∘B) (arXiv 2603.22276) costs the same number of operations,
    but loses all digits where s·B·A nearly cancels M. Blocks of the sum itself are exact everywhere.

    Args:
        matrix: M, `[*lead, out, in]`.
        a: `[*lead, r, in]`.
        b: `[*lead, out, r]`.
        scaling: s.

    Returns:
        `[*lead, out]`, in float64.
    """
    n_out, n_in = matrix.shape[-2:]
    if matrix.stride(-1) == 1:  # rows are contiguous in memory: take some rows at a time
        n = _block(n_out, matrix.numel())
        blocks = zip(matrix.split(n, -2), b.split(n, -2), strict=True)
        return torch.cat([_norm(updated(m, a, b_, scaling), -1) for m, b_ in blocks], dim=-1)
    n = _block(n_in, matrix.numel())
    blocks = zip(matrix.split(n, -1), a.split(n, -1), strict=True)
    return _norm(torch.stack([_norm(updated(m, a_, b, scaling), -1) for m, a_ in blocks]), 0)


def _norm(x: Tensor, dim: int) -> Tensor:
    """The norm along a dimension. Squares in float64: in float32 they leave its range at norms of 1e-19 and 1e19."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=dtype)
    return norm


def output_norms_of_many(matrix: Tensor, a: Tensor, b: Tensor, scalings: Tensor) -> Tensor:
    """`output_norms` for m updates of one matrix: one product of M with the factors of all updates.

    ‖M‖² + 2s·rowsum((M·Aᵀ)∘B) + s²·rowsum((B·A·Aᵀ)∘B) (arXiv 2603.22276) in float64, which has enough digits where
    s·B·A cancels M up to the rounding of float32. Rows that it cancels further are zero.

    Args:
        matrix: M, `[out, in]`. M, A and B are in float32 or a narrower dtype.
        a: A, `[m, r, in]`.
        b: B, `[m, out, r]`.
        scalings: s, `[m]`.

    Returns:
        `[m, out]`, in float64.
    """
    a, b, s = a.double(), b.double(), scalings.double()[:, None]
    own, inner = b.new_zeros(matrix.shape[0]), torch.zeros_like(b.mT).flatten(0, 1)
    with no_autocast(matrix.device):
        n = max(1, NORM_BLOCK // len(matrix))
        for columns, a_ in zip(matrix.split(n, -1), a.split(n, -1), strict=True):
            block = columns.double()
            own = own + block.square().sum(-1)
            inner = torch.addmm(inner, a_.flatten(0, 1), block.mT)
        update = ((b @ (a @ a.mT)) * b).sum(-1) * s**2
        squares = own + 2 * s * (inner.view_as(b.mT) * b.mT).sum(1) + update
    squares = torch.where(squares > CANCELLED * (own + update), squares, 0.0)
    return squares.sqrt()


def _block(length: int, numel: int) -> int:
    """The number of slices to read together, if a tensor with `numel` elements has `length` slices."""
    return max(1, min(NORM_BLOCK, max(numel // NORM_SHARE, SMALL_BLOCK)) * length // numel)

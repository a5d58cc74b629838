"""DoRA, and the norms that it divides by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from funclora._quant.tensor import plain_weight
from funclora._torch.functions import in_transform, no_autocast, no_gradients
from funclora._torch.pytree import pytree_node
from funclora.rules.layouts import ConvTranspose, Layout, Matrices
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
# A rank at most this part of the inputs is low: for others, blocks of the adapted weight are faster.
LOW_RANK = 16
# In float32 a sum of squares has all digits if it is at least this share of its terms, ...
KEPT_SHARE = 0.25
# ... and is not so small that terms are outside of the normal range.
SMALLEST_SQUARE = 1e-30


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
            norms = constant_norms(self.layout, weight, self.a, self.b, self.scaling)
        return self._scale(norms, weight.dtype)

    def output_scale_of_members(self, weight: Tensor, scalings: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, self.a.dtype) == torch.float64
        several = isinstance(self.layout, ConvTranspose) or self.layout.expert_dims(weight.shape)  # not one matrix
        if wide or self.exact_norm_grad or several:
            of_each = torch.func.vmap(lambda rule, s: replace(rule, scaling=s).output_scale(weight), chunk_size=CHUNK)
            scale: Tensor = of_each(self, scalings)
            return scale
        with no_gradients():
            as_they_are = isinstance(self.layout, Matrices)
            a, b = (self.a, self.b) if as_they_are else torch.func.vmap(self.layout.factors)(self.a, self.b)
            matrix = self.layout.to_matrix(plain_weight(weight))
            of_many = factored_norms if _can_repair(matrix, a, b) else output_norms_of_many
            norms = of_many(matrix, a, b, scalings).detach()
        return self._scale(norms, weight.dtype)

    def _scale(self, norms: Tensor, dtype: torch.dtype) -> Tensor:
        """m/‖V‖, for a weight of that dtype; 0 where the norm is zero."""
        zero = norms == 0
        quotient = torch.where(zero, 0.0, self.magnitude / torch.where(zero, 1.0, norms))
        return quotient.to(compute_dtype(dtype, self.a.dtype))


def constant_norms(layout: Layout, weight: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """`weight_norms` for a gradient that ignores them."""
    if not isinstance(layout, ConvTranspose):  # of which the matrix is a copy
        matrix, (a_matrix, b_matrix) = layout.to_matrix(plain_weight(weight)), layout.factors(a, b)
        low = a_matrix.shape[-2] * LOW_RANK <= a_matrix.shape[-1]
        if low and _can_repair(matrix, a_matrix, b_matrix):
            scalings = torch.as_tensor(scaling, dtype=torch.float64, device=matrix.device).reshape(1)
            return factored_norms(matrix, a_matrix.unsqueeze(0), b_matrix.unsqueeze(0), scalings)[0]
    return weight_norms(layout, weight, a, b, scaling).detach()


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


def factored_norms(matrix: Tensor, a: Tensor, b: Tensor, scalings: Tensor) -> Tensor:
    """`output_norms_of_many` in float32, which is faster; rows with too few digits in it by `output_norms`.

    Digits are lost where s·B·A cancels M, or parts of it cancel each other: where the sum is small compared with its
    terms. ‖M‖² is not kept from one call to the next: to compute it takes a tenth of the time of M·Aᵀ.

    Args:
        matrix: M, `[out, in]`, with `_can_repair`.
        a: A, `[m, r, in]`.
        b: B, `[m, out, r]`.
        scalings: s, `[m]`.

    Returns:
        `[m, out]`, in float64.
    """
    n_members, r, _ = a.shape
    with no_autocast(matrix.device):
        # Rows of A of norm 1: otherwise A·Aᵀ leaves the range of float32 where A is small and B is large.
        size = torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64).float()
        size = torch.where(size == 0, 1.0, size)
        a_, b_ = a / size[..., None], b * (scalings.float()[:, None] * size)[:, None]
        own, inner = _own_and_inner(matrix, a_.flatten(0, 1))
        terms = torch.baddbmm(inner.unflatten(-1, (n_members, r)).transpose(0, 1), b_, a_ @ a_.mT, beta=2)
        squares = own + (terms * b_).sum(-1)
        energy = own + torch.linalg.vector_norm(b_, dim=-1).square()
    norms = squares.clamp_min(0).sqrt().double()
    exact = (squares >= KEPT_SHARE * energy) & (squares >= SMALLEST_SQUARE) & squares.isfinite()
    if exact.all():
        return norms
    for j in (~exact).any(-1).nonzero().flatten().tolist():
        rows = (~exact[j]).nonzero().flatten()
        norms[j, rows] = output_norms(matrix[rows], a[j], b[j, rows], float(scalings[j])).double()
    return norms


def _own_and_inner(matrix: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """‖M‖² by rows, `[out]`, and M·Aᵀ, `[out, r]`, in float32, block by block in the order of M in memory."""
    n_out, n_in = matrix.shape
    if matrix.stride(-1) == 1:
        parts = [part.float() for part in matrix.split(max(1, NORM_BLOCK // n_in))]
        own = [torch.linalg.vector_norm(part, dim=-1).square() for part in parts]
        return torch.cat(own), torch.cat([part @ a.mT for part in parts])
    size = max(1, SMALL_BLOCK // n_out)
    squares, inner = a.new_zeros(n_out), a.new_zeros(len(a), n_out)
    for part, columns in zip(matrix.split(size, -1), a.split(size, -1), strict=True):
        block = part.float()
        squares += block.square().sum(-1)
        inner.addmm_(columns, block.mT)
    return squares, inner.mT


def _can_repair(matrix: Tensor, *factors: Tensor) -> bool:
    """Whether `factored_norms` can look for rows without digits: their number depends on values."""
    if torch.compiler.is_compiling() or in_transform() or matrix.dim() != 2 or matrix.device.type != "cpu":
        return False
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype in narrow for x in (matrix, *factors))


def _block(length: int, numel: int) -> int:
    """The number of slices to read together, if a tensor with `numel` elements has `length` slices."""
    return max(1, min(NORM_BLOCK, max(numel // NORM_SHARE, SMALL_BLOCK)) * length // numel)

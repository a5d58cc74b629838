"""A linear layer with a low-rank update for each group of rows, as one differentiable function.

Written as separate operations, its gradient would be summed from two tensors of the size of the inputs, and every
result would be new memory. Here products are added to the result that they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import in_transform, is_forward_mode, overwriting

# Members `[m, r, in]` and `[m, r, out]` of a product x·firstᵀ·second, and their scalings `[m]`, or None for 1.
Factors = tuple[Tensor, Tensor, Tensor | None]


def fits(x: Tensor, matrix: Tensor, bias: Tensor | None, factors: Sequence[Factors]) -> bool:
    """Whether `linear_in_groups` can compute this. Transforms and compilers need the separate operations."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform() or is_forward_mode():
        return False
    if matrix.requires_grad or (bias is not None and bias.requires_grad) or torch.is_autocast_enabled(x.device.type):
        return False
    tensors = [x, matrix, *(f for each in factors for f in each if f is not None)]
    return x.dtype in (torch.float32, torch.float64) and all(
        type(t) in (Tensor, torch.nn.Parameter) and (t.dtype, t.device) == (x.dtype, x.device) for t in tensors
    )


def linear_in_groups(
    x: Tensor, matrix: Tensor, bias: Tensor | None, sizes: Sequence[int], factors: Sequence[Factors]
) -> Tensor:
    """`x·Mᵀ + bias + s·(x·firstᵀ)·second`, with other factors for each member's rows.

    Args:
        x: `[n, *, in]`.
        matrix: M, `[out, in]`. Like the bias, it gets no gradient.
        bias: `[out]`, or None.
        sizes: the number of rows of each group; they follow each other, and each has as many for every member.
        factors: for each group those of its members.

    Returns:
        `[n, *, out]`.
    """
    flat = [tensor for each in factors for tensor in each]
    out: Tensor = _LinearInGroups.apply(x, matrix, bias, list(sizes), *flat)  # type: ignore[no-untyped-call]
    return out


class _LinearInGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, sizes: list[int], *flat: Any) -> Tensor:
        y = F.linear(x, matrix, bias)
        downs = []
        for inputs, out, (first, second, scalings) in _by_group(sizes, flat, x, y):
            h = projected(inputs, first, scalings)
            out.baddbmm_(h.mT, second)
            downs.append(h)
        ctx.sizes = sizes
        ctx.save_for_backward(x, matrix, *downs, *flat)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, *rest = ctx.saved_tensors
        downs, flat = rest[: len(ctx.sizes)], rest[len(ctx.sizes) :]
        g = g.contiguous()
        gx = g @ matrix if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        parts = []
        pieces = _by_group(ctx.sizes, flat, x, g, gx)
        for h, (inputs, outs, back, (first, second, scalings)) in zip(downs, pieces, strict=True):
            k = projected(outs, second, scalings)
            if torch.is_grad_enabled():  # for second derivatives, which must see how it depends on x and first
                h = projected(inputs, first, scalings)  # noqa: PLW2901
            grads += [k @ inputs, h @ outs, None]
            if gx is not None:
                parts.append(overwriting()(torch.baddbmm, back, k.mT, first))
        if gx is not None and torch.is_grad_enabled():
            gx = torch.cat([part.flatten(0, 1) for part in parts]).view_as(x)
        return gx, None, None, None, *grads


def _by_group(sizes: list[int], flat: Sequence[Any], *tensors: Tensor | None) -> list[tuple[Any, ...]]:
    """For each group its rows of some tensors, `[m, rows, features]`, and its factors."""
    factors = [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]
    # A split of one piece is a view too, and there are thousands in a step.
    pieces = [[x] * len(sizes) if x is None or len(sizes) == 1 else x.split(sizes) for x in tensors]
    return [
        (*(x if x is None else x.reshape(len(each[0]), -1, x.shape[-1]) for x in some), each)
        for *some, each in zip(*pieces, factors, strict=True)
    ]


def projected(x: Tensor, matrix: Tensor, scalings: Tensor | None) -> Tensor:
    """`[m, r, rows]`: inputs `[m, rows, in]` times the matrices `[m, r, in]` and the scalings `[m]` of members."""
    # Batches of small products are up to three times as fast if the first factor is in order in memory.
    h = matrix @ x.mT if matrix.is_contiguous() else (x @ matrix.mT).mT
    if scalings is None:
        return h
    each = scalings[:, None, None]
    return overwriting()(torch.mul, h, each) if each.dtype == h.dtype else (h * each).to(h.dtype)

"""Products with a packed weight, which is unpacked for each product, and again for its transpose in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._quant.source import UNPACKED_DTYPES, Op, Source


class _Through(torch.autograd.Function):
    """`op(x, W)` with W unpacked only for this product, and again for its transpose in backward.

    If W is already unpacked, forward uses it; backward always keeps only the packed parts.
    """

    @staticmethod
    def forward(x: Tensor, op: Op, source: Source, dense: Tensor | None, *parts: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if dense is not None:
                return op(x, dense)
            if op is F.linear and not source.steps and source.dtype in UNPACKED_DTYPES:
                return source.packing.linear(x, parts, source.stored)
            return op(x, source.dense(parts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.op, ctx.source, _, *parts = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(*parts)
        ctx.save_for_forward(*parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        back = through(grad, _adjoint(ctx.op, ctx.shape, ctx.source), ctx.source, None, *parts)
        return back, None, None, None, *(None for _ in parts)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return through(tangent, ctx.op, ctx.source, None, *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        op: Op,
        source: Source,
        dense: Tensor | None,
        *parts: Tensor,
    ) -> tuple[Tensor, int]:
        # The weight is a constant, so the input is batched.
        mapped = op if _is_product(op, source) else functools.partial(_mapped, op)
        return through(x.movedim(in_dims[0] or 0, 0), mapped, source, dense, *parts), 0


through: Callable[..., Tensor] = _Through.apply


def _adjoint(op: Op, shape: torch.Size, source: Source) -> Op:
    """The transpose of `op` as a function of its input, which has that shape."""
    if _is_product(op, source):
        return _PRODUCTS[op]
    if isinstance(op, functools.partial) and op.func is _transpose:
        return op.args[0]  # type: ignore[no-any-return]
    return functools.partial(_transpose, op, shape)


def _transpose(op: Op, shape: torch.Size, grad: Tensor, weight: Tensor) -> Tensor:
    back: Tensor = torch.func.vjp(lambda x: op(x, weight), grad.new_zeros(shape))[1](grad)[0]
    return back


def _mapped(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.func.vmap(op, (0, None))(x, weight)
    return out


def left_product(x: Tensor, weight: Tensor) -> Tensor:
    return weight @ x


# Products with a matrix, whose inputs may have any number of leading dimensions, and their transposes.
_PRODUCTS: dict[Op, Op] = {F.linear: torch.matmul, torch.matmul: F.linear}


def _is_product(op: Op, source: Source) -> bool:
    return op in _PRODUCTS and source.dim() == 2

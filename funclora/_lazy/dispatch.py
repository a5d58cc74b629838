"""Which torch operations are linear in a lazy weight.

`linear_ops` maps an operation to a function that turns its arguments into `(lazy weight, LinearOp)`, or raises
`NoFormError` if this call of the operation has no fast form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from funclora._torch.functions import NoFormError, table
from funclora.rules.layouts import Conv, ConvTranspose, Layout, Matrices
from funclora.rules.linear_ops import (
    ConvOp,
    ConvTransposeOp,
    EmbeddingOp,
    GroupedMatmulOp,
    LeftMatmulOp,
    LinearLayerOp,
    LinearOp,
    MatmulOp,
)

# Any: a lazy weight; this module uses only its attributes `rule` and `base`.
Parsed = tuple[Any, LinearOp]


def _is_lazy(x: object) -> bool:
    return type(x) is not Tensor and hasattr(x, "rule")


def _layout(weight: Any, kind: type[Layout]) -> Any:
    """The layout of the lazy weight's rule, if the operation can be computed with a layout of that kind."""
    layout = weight.rule.layout if _is_lazy(weight) else None
    if not isinstance(layout, kind):
        raise NoFormError
    return layout


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Parsed:
    transposed = _layout(weight, Matrices).transposed
    if _is_lazy(input) or _is_lazy(bias):
        raise NoFormError
    return weight, LinearLayerOp(input, bias, transposed=transposed)


def _matmul(input: Any, other: Any) -> Parsed:
    if _is_lazy(input):
        transposed = _layout(input, Matrices).transposed
        if _is_lazy(other) or other.dim() < 2:
            raise NoFormError
        return input, LeftMatmulOp(other, transposed=transposed)
    if input.dim() < 2 and _is_lazy(other) and other.base.dim() > 2:
        raise NoFormError  # one vector for all experts: the product has no token dimension
    return other, MatmulOp(input, None, transposed=not _layout(other, Matrices).transposed)


def _mm(input: Any, mat2: Any) -> Parsed:
    return _matmul(input, mat2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Parsed:
    if (beta, alpha) != (1, 1) or _is_lazy(input) or _is_lazy(mat1) or input.dim() != 1:
        raise NoFormError
    weight, op = _matmul(mat1, mat2)
    op.bias = input
    return weight, op


def _grouped_mm(op: Callable[..., Tensor]) -> Callable[..., Parsed]:
    def as_map(
        mat_a: Tensor, mat_b: Any, *, offs: Tensor | None = None, bias: None = None, out_dtype: None = None
    ) -> Parsed:
        transposed = not _layout(mat_b, Matrices).transposed
        if _is_lazy(mat_a) or offs is None or mat_a.dim() != 2 or (bias, out_dtype) != (None, None):
            raise NoFormError
        return mat_b, GroupedMatmulOp(op, mat_a, offs, transposed=transposed)

    return as_map


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Parsed:
    if not _layout(weight, Matrices).transposed:
        raise NoFormError
    n_rows = weight.base.shape[0]
    return weight, EmbeddingOp(input, n_rows, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _conv(conv: Callable[..., Tensor], spatial: int) -> Callable[..., Parsed]:
    def as_map(
        input: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Parsed:
        if _layout(weight, Conv).groups != groups:
            raise NoFormError
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return weight, ConvOp(conv, input, bias, spatial, options)

    return as_map


def _conv_transpose(conv: Callable[..., Tensor], spatial: int) -> Callable[..., Parsed]:
    def as_map(
        input: Tensor,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Parsed:
        if _layout(weight, ConvTranspose).groups != groups:
            raise NoFormError
        options = {
            "stride": stride,
            "padding": padding,
            "output_padding": output_padding,
            "dilation": dilation,
        }
        return weight, ConvTransposeOp(conv, input, bias, spatial, options | {"groups": groups})

    return as_map


linear_ops: dict[Callable[..., Any], Callable[..., Parsed]] = table(
    linear=_linear,
    matmul=_matmul,
    mm=_mm,
    addmm=_addmm,
    embedding=_embedding,
    conv=_conv,
    conv_transpose=_conv_transpose,
    grouped_mm=_grouped_mm,
)

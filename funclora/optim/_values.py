"""Values that may be given for each adapter, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from funclora.errors import ConfigError

PerMember: TypeAlias = float | Tensor
"""A number, or a tensor `[]` or `[n_adapters]`."""

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""The learning rate by the number of steps taken, `[]` or `[n_adapters]`."""


def check(name: str, value: object, holds: Callable[[float], bool], need: str, hint: str, tensor: bool = False) -> None:
    # The values of a tensor are not read: they may be traced, and reading would wait for the device.
    if tensor and isinstance(value, Tensor) and value.dim() <= 1 and value.is_floating_point():
        return
    if isinstance(value, int | float) and not isinstance(value, bool) and holds(value):
        return
    need += ", or a floating-point tensor [] or [n_adapters]" if tensor else ""
    got = f"a {value.dtype} tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ConfigError(f"{name}: expected {need}, got {got}; {hint}")


def nonnegative(x: float) -> bool:
    return 0 <= x < math.inf


def wide(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise ConfigError(f"leaves: expected floating-point tensors, got {dtype}; leave it out of the tree")
    return torch.promote_types(dtype, torch.float32)

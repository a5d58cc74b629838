"""Rules whose dense form costs nothing: a parameter that is replaced, or added to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from funclora._quant.tensor import Quantized
from funclora._torch.pytree import pytree_node
from funclora.errors import ParamsError
from funclora.rules.base import Rule
from funclora.rules.linear_ops import added


@pytree_node
@dataclass(frozen=True, eq=False)
class Full(Rule):
    """Replaces the parameter (`modules_to_save`, trained biases).

    Attributes:
        value: the new value, of the parameter's shape. It is cast to the parameter's dtype where it is used.

    Examples:
        >>> import torch
        >>> Full(torch.ones(2)).dense(torch.zeros(2))
        tensor([1., 1.])
    """

    value: Tensor

    leaf_names: ClassVar[tuple[str, ...]] = ("value",)
    bind_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise ParamsError(f"Full.value: expected a tensor, got {type(self.value).__name__}.")

    def dense(self, weight: Tensor) -> Tensor:
        return self.value

    def transposed(self) -> Full:
        return replace(self, value=self.value.mT)

    def narrow(self, shape: tuple[int, ...], dim: int, start: int, length: int) -> Full:
        return replace(self, value=self.value.narrow(dim, start, length))

    def check(self, name: str, weight: Tensor) -> None:
        refuse_full(name, weight)
        check_value(name, self.value, weight)


@pytree_node
@dataclass(frozen=True, eq=False)
class Delta(Rule):
    """Adds to the parameter: W + s·value (the bias of B, `lora_bias`).

    Attributes:
        value: the summand, of the parameter's shape.
        scaling: s.

    Examples:
        >>> import torch
        >>> Delta(torch.ones(2), scaling=0.5).dense(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    value: Tensor
    scaling: float | Tensor = field(default=1.0, kw_only=True)

    leaf_names: ClassVar[tuple[str, ...]] = ("value",)
    bind_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise ParamsError(f"Delta.value: expected a tensor, got {type(self.value).__name__}.")

    def dense(self, weight: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(weight.dtype, self.value.dtype), torch.float32)
        return added(weight.to(dtype), self.value.to(dtype), self.scaling)

    def scaled(self, factor: float) -> Delta:
        return replace(self, scaling=factor * self.scaling)

    def transposed(self) -> Delta:
        return replace(self, value=self.value.mT)

    def narrow(self, shape: tuple[int, ...], dim: int, start: int, length: int) -> Delta:
        return replace(self, value=self.value.narrow(dim, start, length))

    def check(self, name: str, weight: Tensor) -> None:
        refuse_full(name, weight)
        check_value(name, self.value, weight)


def check_value(name: str, value: Tensor, weight: Tensor) -> None:
    """Raise `ParamsError` unless a value has the shape of the parameter, and the parameter can be trained."""
    if value.shape != weight.shape:
        raise ParamsError(f"adapter of {name!r}: value has shape {list(value.shape)}, expected {list(weight.shape)}.")
    if not weight.is_floating_point():
        raise ParamsError(f"{name!r} has dtype {weight.dtype} and cannot be trained.")


def refuse_full(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight is quantised: to train it fully would replace it, not adapt it."""
    if isinstance(weight, Quantized) and not weight.is_exact:
        raise ParamsError(
            f"{name!r} is quantised and cannot be trained fully (modules_to_save, Full). Leave it out of the targets "
            "of quantize, or put its dense value, weight.dequantize(), into params."
        )

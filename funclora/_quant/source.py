"""How a packed weight is unpacked, and which view of it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funclora._quant.packing import Packing, Parts

# A view: the operation, its arguments, and the index of the result.
Step = tuple[Callable[..., Any], tuple[Any, ...], tuple[tuple[str, Any], ...], int | None]
# An operation linear in its first argument, the input; the second is the dense weight.
Op = Callable[[Tensor, Tensor], Tensor]
# The dtypes to which bitsandbytes unpacks.
UNPACKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Source(NamedTuple):
    """Everything about a quantised weight except its tensors: how to unpack it, and which view of it is used."""

    packing: Packing
    stored: torch.Size
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    def dense(self, parts: Parts) -> Tensor:
        """The dense weight."""
        dtype = self.dtype if self.packing.is_exact or self.dtype in UNPACKED_DTYPES else torch.float32
        return self.viewed(self.packing.unpack(parts, self.stored, dtype).to(self.dtype))

    def viewed(self, weight: Tensor) -> Tensor:
        """The view of the stored weight that is used."""
        for view, args, kwargs, part in self.steps:
            out = view(weight, *args, **dict(kwargs))
            weight = out if part is None else out[part]
        return weight

    def dim(self) -> int:
        """The number of dimensions of the view."""
        stored = self.stored
        return self.viewed(torch.empty(stored, device="meta")).dim() if self.steps else len(stored)

"""Weights of a model that `fully_shard` has divided: read from the model when they are used.

FSDP's hooks gather the weights of a layer before it runs, forward and backward, and free them after it. A bound copy
of the model runs these hooks too, so it finds the gathered weight in the module that FSDP manages.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._quant.packing import Packing, Parts
from funclora._quant.source import Source
from funclora._quant.tensor import Quantized
from funclora.errors import UnsupportedError


@dataclass(frozen=True)
class Live(Packing):
    """The weight that a module holds when it is read: the whole one between FSDP's hooks, else it is gathered.

    It has no parts but an empty tensor, which tells the device.

    Attributes:
        owner: the module whose parameter it is, managed by FSDP.
        leaf: the parameter's name in it.
    """

    owner: nn.Module
    leaf: str

    @property
    def is_exact(self) -> bool:
        return True

    def pack(self, weight: Tensor) -> NoReturn:
        raise NotImplementedError

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        weight: Any = self.owner._parameters[self.leaf]
        weight = weight.detach()
        # A collective operation: every process of the mesh gets here, since all run the same program.
        whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return whole.to(dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.unpack(parts, shape, dtype))


def of_fsdp(tensor: Tensor, owner: nn.Module, leaf: str) -> Quantized:
    """The value of a parameter that FSDP manages."""
    device = tensor.device
    return Quantized.of(
        Source(Live(owner, leaf), tensor.shape, tensor.dtype), (torch.empty(0, dtype=tensor.dtype, device=device),)
    )


def managed(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of parameters that `fully_shard` manages: "" for all.

    Raises:
        UnsupportedError: a part of the model is a `FullyShardedDataParallel`, the first version of FSDP.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without its import, which is slow
    if fsdp is None:
        return ()
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise UnsupportedError(
                f"{name or 'the model'!r} is a FullyShardedDataParallel, which joins several weights into one flat "
                "parameter. Divide the model with torch.distributed.fsdp.fully_shard instead."
            )
        if isinstance(module, fsdp.FSDPModule):
            found.append(f"{name}." if name else "")
    return tuple(found)

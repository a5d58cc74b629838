"""Weights of a model that `fully_shard` has divided: read from the model when they are used.

FSDP's hooks gather the weights of a layer before it runs, forward and backward, and free them after it. A bound copy
of the model runs these hooks too, so it finds the gathered weight in the module that FSDP manages.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._quant.packing import Packing, Parts
from funclora._quant.source import Source
from funclora._quant.tensor import Quantized
from funclora._torch.functions import is_sharded
from funclora._torch.mesh import whole
from funclora.errors import UnsupportedError


class OfFsdp(Packing):
    """A weight of such a model. It has no parts but an empty tensor, which tells the device."""

    @property
    def is_exact(self) -> bool:
        return True

    @abstractmethod
    def now(self) -> Tensor:
        """The weight, whole or divided."""

    @abstractmethod
    def at_rest(self) -> Tensor:
        """The weight as it is while the model does not run: a DTensor."""

    def pack(self, weight: Tensor) -> NoReturn:
        raise NotImplementedError

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # A collective operation: every process of the mesh gets here, since all run the same program.
        return whole(self.now()).to(dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.unpack(parts, shape, dtype))


@dataclass(frozen=True)
class Live(OfFsdp):
    """The weight that a module holds when it is read: the whole one between FSDP's hooks, else it is gathered.

    Attributes:
        owner: the module whose parameter it is.
        leaf: the parameter's name in it.
        manager: the module that `fully_shard` was applied to, which gathers and frees it.
    """

    owner: nn.Module
    leaf: str
    manager: Any

    def now(self) -> Tensor:
        weight: Any = self.owner._parameters[self.leaf]
        return weight.detach()  # type: ignore[no-any-return]

    def at_rest(self) -> Tensor:
        self.manager.reshard()  # after a call, FSDP keeps the weights of its root whole
        return self.now()


@dataclass(frozen=True, eq=False)
class Still(OfFsdp):
    """A divided weight that is not the model's own: another value for it.

    Attributes:
        weight: a DTensor.
    """

    weight: Tensor

    def now(self) -> Tensor:
        return self.weight

    def at_rest(self) -> Tensor:
        return self.weight


def of_fsdp(tensor: Tensor, packing: OfFsdp) -> Quantized:
    """The value of a parameter that FSDP manages."""
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return Quantized.of(Source(packing, tensor.shape, tensor.dtype), (like,))


def at_rest(weight: Tensor) -> Tensor:
    """A weight of a model that FSDP manages, divided as it is while the model does not run; any other one unchanged."""
    if isinstance(weight, Quantized) and isinstance(weight.source.packing, OfFsdp):
        return weight.source.viewed(weight.source.packing.at_rest().to(weight.dtype))
    return weight


def gathering(model: nn.Module, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The params; DTensors for weights that FSDP manages are gathered when they are used, as those weights are."""
    prefixes = tuple(managed(model))
    return {
        name: of_fsdp(weight, Still(weight.detach()))
        if prefixes and is_sharded(weight) and name.startswith(prefixes)
        else weight
        for name, weight in params.items()
    }


def managed(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `fully_shard` was applied to, by the prefix of the names of their parameters: "" for all.

    Raises:
        UnsupportedError: a part of the model is a `FullyShardedDataParallel`, the first version of FSDP.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without its import, which is slow
    if fsdp is None:
        return {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise UnsupportedError(
                f"{name or 'the model'!r} is a FullyShardedDataParallel, which joins several weights into one flat "
                "parameter. Divide the model with torch.distributed.fsdp.fully_shard instead."
            )
        if isinstance(module, fsdp.FSDPModule):
            found[f"{name}." if name else ""] = module
    return found


def manager_of(name: str, managers: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module that manages a parameter, of the modules that `managed` has found; None if none does."""
    prefixes = [prefix for prefix in managers if name.startswith(prefix)]
    return managers[max(prefixes, key=len)] if prefixes else None

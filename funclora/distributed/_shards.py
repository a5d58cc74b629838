"""Base weights of which each process holds a flat part: gathered one at a time, where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from funclora._api.arguments import check_params
from funclora._quant.packing import Packing, Parts
from funclora._quant.source import Source
from funclora._quant.tensor import Quantized
from funclora._torch.memory import place_of
from funclora.errors import ConfigError

# Smaller tensors stay whole: to gather them takes as long, and they take no memory to speak of.
LEAST = 1024


@dataclass(frozen=True)
class Dense(Packing):
    """The weight itself."""

    @property
    def is_exact(self) -> bool:
        return True

    def pack(self, weight: Tensor) -> Parts:
        return (weight,)

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, parts[0]).to(dtype)


@dataclass(frozen=True)
class Sharded(Packing):
    """The parts of another packing, each cut into flat pieces, one for each process of a group.

    Attributes:
        shapes: the shapes of the whole parts; None for a part that every process holds whole.
        inner: the other packing.
        group: the process group; None for all processes.
    """

    shapes: tuple[torch.Size | None, ...]
    inner: Packing
    group: Any = field(compare=False)

    @property
    def is_exact(self) -> bool:
        return self.inner.is_exact

    def pack(self, weight: Tensor) -> NoReturn:
        raise NotImplementedError

    def whole(self, parts: Parts) -> Parts:
        """The whole parts, from all processes."""
        return tuple(
            part if shape is None else _gathered(part, shape, self.group)
            for part, shape in zip(parts, self.shapes, strict=True)
        )

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.inner.unpack(self.whole(parts), shape, dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        return self.inner.rows(self.whole(parts), shape, ids, dtype)

    def linear(self, x: Tensor, parts: Parts, shape: torch.Size) -> Tensor:
        return self.inner.linear(x, self.whole(parts), shape)


def shard(params: Mapping[str, Tensor], *, group: Any = None) -> dict[str, Tensor]:
    """The params with the weights divided among the processes of a group: each holds about 1/n of the bytes.

    A weight is gathered where it is used, one at a time, in forward and again in backward, and then freed. `apply`,
    training steps, stacks and `torch.func` accept the result like any params; weights of few bits stay so. Every one
    must pass the same params, and run the same calls in the same order.

    Args:
        params: full name -> tensor, the same in every process.
        group: a process group; by default all processes.

    Returns:
        A new dict. Tensors of fewer than 1024 elements and integers are shared, not divided.

    Raises:
        ConfigError: torch.distributed is not initialised.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> params = shard({"weight": torch.ones(64, 64), "bias": torch.zeros(64)})
        >>> params["weight"], params["weight"].nbytes
        (Quantized([64, 64], torch.float32, sharded), 16384)
        >>> dist.destroy_process_group()
    """
    check_params(params)
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "shard: the processes are not connected. Call torch.distributed.init_process_group() first, under torchrun."
        )
    divided = dict(params)
    done: dict[Any, Quantized] = {}  # tied weights stay tied
    for name, weight in params.items():
        if isinstance(weight, Quantized):
            parts, source = weight.parts, weight.source
            place: Any = tuple(map(place_of, parts))
        else:
            parts, source = (weight.detach(),), Source(Dense(), weight.shape, weight.dtype)
            place = place_of(weight) or name
        if isinstance(source.packing, Sharded) or not weight.is_floating_point() or weight.numel() < LEAST:
            continue
        if place not in done:
            done[place] = _divided(source, parts, group)
        divided[name] = done[place]
    return divided


def _divided(source: Source, parts: Parts, group: Any) -> Quantized:
    shapes = tuple(part.shape if part.numel() >= LEAST // 8 else None for part in parts)
    packing = Sharded(shapes, source.packing, group)
    own = tuple(part if shape is None else _cut(part, group) for part, shape in zip(parts, shapes, strict=True))
    return Quantized.of(source._replace(packing=packing), own)


def _cut(part: Tensor, group: Any) -> Tensor:
    """This process's piece of a tensor, all of one length: the last ones end with zeros."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    width = -(-part.numel() // size)
    piece = part.reshape(-1)[rank * width : (rank + 1) * width]
    return torch.cat([piece, piece.new_zeros(width - piece.numel())])


def _gathered(piece: Tensor, shape: torch.Size, group: Any) -> Tensor:
    size = dist.get_world_size(group)
    whole = piece.new_empty(size, piece.numel())
    dist.all_gather(list(whole), piece, group=group)
    return whole.view(-1)[: shape.numel()].view(shape)

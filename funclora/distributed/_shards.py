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
from funclora._quant.tensor import Quantized, place_of_weight
from funclora._torch.functions import is_sharded
from funclora._torch.mesh import placed_as
from funclora.distributed._gatherer import Counts, Gatherer
from funclora.distributed._live import OfFsdp
from funclora.errors import ConfigError

# Smaller tensors stay whole: to gather them takes as long, and they take no memory to speak of.
LEAST = 1024


@dataclass(frozen=True)
class Dense(Packing):
    """The weight itself; its part may be flat."""

    @property
    def is_exact(self) -> bool:
        return True

    def pack(self, weight: Tensor) -> Parts:
        return (weight,)

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return parts[0].view(shape).to(dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, parts[0].view(shape)).to(dtype)

    def unit(self, shape: torch.Size) -> int:
        return 1

    def lengths(self, parts: Parts) -> tuple[int | None, ...]:
        return (1,)


@dataclass(frozen=True)
class Sharded(Packing):
    """The parts of another packing, each cut into pieces along its first dimension, one for each process of a group.

    Attributes:
        counts: the lengths of the whole parts; None for a part that every process holds whole.
        inner: the other packing.
        number: the weight's number for the gatherer.
        gatherer: it gathers all weights of the base.
    """

    counts: Counts
    inner: Packing
    number: int = field(compare=False)
    gatherer: Gatherer = field(compare=False)

    @property
    def is_exact(self) -> bool:
        return self.inner.is_exact

    def pack(self, weight: Tensor) -> NoReturn:
        raise NotImplementedError

    def whole(self, parts: Parts) -> Parts:
        """The whole parts, from all processes."""
        return self.gatherer.whole(self.number, parts, self.counts)

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.inner.unpack(self.whole(parts), shape, dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        return self.inner.rows(self.whole(parts), shape, ids, dtype)

    def linear(self, x: Tensor, parts: Parts, shape: torch.Size) -> Tensor:
        return self.inner.linear(x, self.whole(parts), shape)


def whole_parts(weight: Quantized) -> Parts:
    """The parts of a weight as they are without processes; a collective operation, if it is divided."""
    packing = weight.source.packing
    return packing.whole(weight.parts) if isinstance(packing, Sharded) else weight.parts


def divided_as(weight: Tensor, like: Tensor) -> Tensor:
    """A weight that every process has, divided as another one; unchanged if that is not divided."""
    packing = like.source.packing if isinstance(like, Quantized) else None
    if not isinstance(packing, Sharded):
        return placed_as(weight, like)
    return _divided(Source(Dense(), weight.shape, weight.dtype), (weight.reshape(-1),), packing.gatherer)


def shard(params: Mapping[str, Tensor], *, group: Any = None) -> dict[str, Tensor]:
    """The params with the weights divided among the processes of a group: each holds about 1/n of the bytes.

    A weight is gathered where it is used, one at a time, in forward and again in backward, and then freed. `apply`,
    training steps, stacks and `torch.func` accept the result like any params; weights of few bits stay so. Every one
    must pass the same params, and run the same calls in the same order.

    Args:
        params: full name -> tensor, the same in every process.
        group: a process group, or a mesh of one dimension; by default all processes.

    Returns:
        A new dict. Tensors of fewer than 1024 elements and integers are shared, not divided.

    Raises:
        ConfigError: torch.distributed is not initialised, or the mesh has several dimensions.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        >>> params = shard({"weight": torch.ones(64, 64), "bias": torch.zeros(64)})
        >>> params["weight"], params["weight"].nbytes
        (Quantized([64, 64], torch.float32, sharded), 16384)
        >>> dist.destroy_process_group()
    """
    check_params(params)
    gatherer = Gatherer(group_of(group))
    divided = dict(params)
    done: dict[object, Quantized] = {}  # tied weights stay tied
    for name, weight in params.items():
        if is_sharded(weight):
            raise ConfigError(f"shard: {name!r} is a DTensor: it is divided already. Pass whole params.")
        if isinstance(weight, Quantized):
            parts, source = weight.parts, weight.source
        else:
            parts, source = (weight.detach().reshape(-1),), Source(Dense(), weight.shape, weight.dtype)
        if isinstance(source.packing, (Sharded, OfFsdp)) or not weight.is_floating_point() or weight.numel() < LEAST:
            continue
        place = place_of_weight(weight) or name
        if place not in done:
            done[place] = _divided(source, parts, gatherer)
        divided[name] = done[place]
    return divided


class Division:
    """How the values of a weight are divided: into as many units for each process, of which the last may get fewer.

    Args:
        packing: how the weight is stored.
        shape: the shape of the weight.
        gatherer: of the base.

    Attributes:
        units: the number of units that each process holds.
        first: the first value of this process, in the order of memory.
        last: the value after its last one; there may be none.
        width: the number of values that each process holds, with those that fill up the last piece.
    """

    def __init__(self, packing: Packing, shape: torch.Size, gatherer: Gatherer) -> None:
        self._packing, self._shape, self._gatherer = packing, shape, gatherer
        self._size = packing.unit(shape)
        self._rank = dist.get_rank(gatherer.group)
        n = shape.numel()
        self.units = -(-n // (self._size * dist.get_world_size(gatherer.group)))
        self.width = self.units * self._size
        self.first = min(n, self._rank * self.width)
        self.last = min(n, self.first + self.width)

    def counts(self, parts: Parts) -> Counts:
        """The length of each whole part, from parts of any length; None if units share it."""
        n = self._shape.numel()
        lengths = self._packing.lengths(parts)
        return tuple(None if length is None else -(-n * length // self._size) for length in lengths)

    def cut(self, part: Tensor, length: int) -> Tensor:
        """This process's piece of a whole part, of which a unit has `length` slices."""
        width = self.units * length
        piece = part[self._rank * width : (self._rank + 1) * width]
        return torch.cat([piece, piece.new_zeros(width - len(piece), *piece.shape[1:])])

    def weight(self, pieces: Parts, dtype: torch.dtype) -> Quantized:
        """The weight that these pieces are this process's share of."""
        packing = Sharded(self.counts(pieces), self._packing, self._gatherer.number(), self._gatherer)
        return Quantized.of(Source(packing, self._shape, dtype), pieces)


def group_of(group: Any) -> Any:
    """The process group that an argument names: a group, a mesh of one dimension, or None for all processes.

    Raises:
        ConfigError: torch.distributed is not initialised, or the mesh has several dimensions.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "the processes are not connected. Call torch.distributed.init_process_group() first, under torchrun."
        )
    if not hasattr(group, "get_group"):
        return group
    if group.ndim != 1:
        raise ConfigError(
            f"group: expected a process group or a mesh of one dimension, got {group}. Name the dimension over which "
            "the weights are divided: mesh['shard']."
        )
    return group.get_group()


def _divided(source: Source, parts: Parts, gatherer: Gatherer) -> Quantized:
    division = Division(source.packing, source.stored, gatherer)
    lengths = source.packing.lengths(parts)
    pieces = tuple(part if n is None else division.cut(part, n) for part, n in zip(parts, lengths, strict=True))
    weight = division.weight(pieces, source.dtype)
    return Quantized.of(weight.source._replace(steps=source.steps), pieces)

"""Tensors that are divided among processes: DTensor, whose module is slow to import, and collective operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funclora._torch.functions import is_sharded


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of one that is divided over a mesh, a collective operation; any other tensor unchanged."""
    divided: Any = tensor
    return waited(divided.full_tensor()) if is_sharded(tensor) else tensor


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, divided as another one; unchanged if that is not divided."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    divided: Any = like
    return _on_mesh(tensor, divided.device_mesh).redistribute(placements=divided.placements)  # type: ignore[no-any-return]


def shared(tensor: Tensor, mesh: Any) -> Tensor:
    """A tensor that every process has, and uses for its part of a result: the gradient is the sum of theirs."""
    from torch.distributed.tensor import Partial

    local: Tensor = _on_mesh(tensor, mesh).to_local(grad_placements=[Partial()] * mesh.ndim)
    return local


def waited(x: Any) -> Any:
    """A tensor whose values are there: collective operations return some that are still on their way."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    if not isinstance(x, AsyncCollectiveTensor):
        return x
    return x.clone() if x.requires_grad else x.wait()  # what `wait` returns is outside of the graph


def gathered_in_graph(piece: Tensor, group: Any) -> Tensor:
    """The pieces of all processes, one after the other, by an operation that torch.compile can trace."""
    from torch.distributed._functional_collectives import all_gather_tensor

    found: Any = group or dist.group.WORLD
    return all_gather_tensor(piece, 0, found)


def same_in_mesh(number: int, tensors: Iterable[Tensor]) -> int:
    """The number of the first process of the mesh over which one of the tensors is divided; without one, the number."""
    for tensor in tensors:
        if type(tensor) is not Tensor and is_sharded(tensor):
            divided: Any = tensor
            first = torch.tensor(number, device=divided.device)
            for dim in range(divided.device_mesh.ndim):
                dist.broadcast(first, group=divided.device_mesh.get_group(dim), group_src=0)
            return int(first)
    return number


def is_cut_once(weight: Any) -> bool:
    """Whether a tensor is divided over a mesh of one dimension, along one of its own or not at all."""
    from torch.distributed.tensor import Replicate, Shard

    return weight.device_mesh.ndim == 1 and type(weight.placements[0]) in (Shard, Replicate)


class Cut:
    """How a tensor is divided over a mesh of one dimension, and what belongs to this process.

    Args:
        weight: the divided tensor, with `is_cut_once`.

    Attributes:
        dim: the dimension along which it is cut; None if every process has all of it.
        start: the first slice of this process.
        length: the number of its slices.
        local: the slices.
        mesh: the mesh.
    """

    def __init__(self, weight: Any) -> None:
        (placement,) = weight.placements
        self.mesh = weight.device_mesh
        self.local: Tensor = waited(weight.to_local())
        self.dim: int | None = placement.dim if placement.is_shard() else None
        self.start = self.length = 0
        if self.dim is not None:
            n = weight.shape[self.dim]
            self.start = min(n, self.mesh.get_local_rank() * -(-n // self.mesh.size()))
            self.length = self.local.shape[self.dim]

    def all_of(self, x: Any, *, in_parts: bool = False) -> Tensor:
        """The whole of a tensor; one that is not of the mesh is whole.

        Args:
            x: the tensor.
            in_parts: each process computes a part of the results from it, and of its gradient.
        """
        from torch.distributed.tensor import Partial, Replicate

        if not is_sharded(x):
            return waited(x)  # type: ignore[no-any-return]
        grad = [Partial()] if in_parts and self.dim is not None else None
        return waited(x.redistribute(placements=[Replicate()]).to_local(grad_placements=grad))  # type: ignore[no-any-return]

    def part_of(self, x: Any, dim: int) -> Tensor:
        """This process's part of a tensor that is cut along a dimension; one that is not of the mesh is that part."""
        from torch.distributed.tensor import Shard

        local: Tensor = waited(x.redistribute(placements=[Shard(dim)]).to_local() if is_sharded(x) else x)
        return local

    def replicated(self, x: Tensor) -> Tensor:
        """A tensor of the mesh of which every process has all."""
        return _on_mesh(x, self.mesh)  # type: ignore[no-any-return]

    def summed(self, x: Tensor) -> Tensor:
        """A tensor of the mesh that is the sum of those of all processes, not added up yet."""
        from torch.distributed.tensor import DTensor, Partial

        return DTensor.from_local(x, self.mesh, [Partial()], run_check=False)

    def joined(self, x: Tensor, n: int) -> Tensor:
        """A tensor of the mesh whose last dimension, of length n, is cut into those of all processes."""
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((*x.shape[:-1], n))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, self.mesh, [Shard(x.dim() - 1)], run_check=False, shape=shape, stride=stride)


def _on_mesh(tensor: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)

"""Weighted sums of tensors that are first made sparse: the common part of all merging methods.

They are applied to one tensor of every adapter: a factor, or the change of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from funclora.errors import ConfigError

Pruning = Literal["magnitude", "random"]
SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Mixing:
    """A function from tensors and their weights to one tensor.

    Attributes:
        pruning: how each tensor is made sparse before it is weighted, if at all. "magnitude" keeps the largest
            entries. "random" keeps each with probability `density` and divides by it (DARE, arXiv 2311.03099,
            section 3.2), which preserves the expectation.
        elect: for each entry, add only the values with the majority's sign, and divide by their number (TIES, arXiv
            2306.01708, section 4).
        density: the share that pruning keeps.
        majority_sign_method: "total" weighs the votes by their size, "frequency" counts them.
        generator: of random pruning.
    """

    pruning: Pruning | None = None
    elect: bool = False
    density: float = 1.0
    majority_sign_method: str = "total"
    generator: Generator | None = None

    def __call__(self, where: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combination.

        Args:
            where: a description of the tensors, for messages.
            tensors: the tensors, all of the same shape.
            weights: one for each tensor. They have no effect on the election, as in PEFT.
        """
        tensors = [self._sparse(where, tensor) for tensor in tensors]
        if not self.elect:
            return _total([tensor * weight for tensor, weight in zip(tensors, weights, strict=True)])
        votes = _total(tensors if self.majority_sign_method == "total" else [tensor.sign() for tensor in tensors])
        majority = torch.where(votes >= 0, 1.0, -1.0)
        kept = [tensor.sign() == majority for tensor in tensors]
        total = _total([t * weight * keep for t, weight, keep in zip(tensors, weights, kept, strict=True)])
        return total / _total([keep.to(total.dtype) for keep in kept]).clamp(min=1)

    def _sparse(self, where: str, tensor: Tensor) -> Tensor:
        if self.pruning is None or self.density == 1:
            return tensor
        if self.pruning == "random":
            # On the generator's device: the same numbers on every device of the adapter.
            device = tensor.device if self.generator is None else self.generator.device
            chance = torch.full_like(tensor, self.density, device=device)
            mask = torch.bernoulli(chance, generator=self.generator).to(tensor.device)
            return tensor * mask / self.density
        k = int(self.density * tensor.numel())
        if k == 0:
            raise ConfigError(f"density: {self.density:g} of the {tensor.numel()} entries of {where} is no entry.")
        mask = torch.zeros_like(tensor).flatten()
        mask[tensor.abs().flatten().topk(k).indices] = 1
        return tensor * mask.reshape(tensor.shape)


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total

"""How members are trained and when they are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from funclora.optim import GradientTransformation, adamw, chain, clip_by_global_norm, warmup_cosine


@dataclass(frozen=True)
class SearchSettings:
    """How the members are trained and compared.

    Attributes:
        steps: training steps of a member that is never dropped.
        batch: windows in each step of a member.
        every: steps between evaluations; each is also a checkpoint.
        halving: at each rung the best 1/halving are kept; below 2, all are kept.
        rungs: number of evaluations that decide, including the last one.
        warmup: steps of warmup.
        clip: maximum norm of a member's gradient.
        weight_decay: AdamW's.
        budget: memory in bytes; None for most of the free memory.
        population: maximum number of members trained together; None for as many as fit.
    """

    steps: int = 81
    batch: int = 2
    every: int = 9
    halving: int = 3
    rungs: int = 3
    warmup: int = 4
    clip: float = 1.0
    weight_decay: float = 0.0
    budget: int | None = None
    population: int | None = None

    def cuts(self, n: int) -> list[int]:
        """The steps at which n members are cut, in order."""
        if self.halving < 2:
            return []
        rungs = min(self.rungs, 1 + int(math.log(n, self.halving) + 1e-9)) if n > 1 else 1
        cuts = {round(self.steps / self.halving**k) for k in range(1, rungs)}
        return sorted(step for step in cuts if 0 < step < self.steps)

    def points(self, n: int) -> list[int]:
        """The steps at which members are evaluated."""
        return sorted({*range(self.every, self.steps, self.every), *self.cuts(n), self.steps})

    def optimizer(self) -> Callable[..., Any]:
        """`lr -> optimizer` of one member."""

        def build(lr: Tensor) -> Any:
            # Shifted by one step: the rate of step 0 is 0, which would waste a step.
            schedule = warmup_cosine(lr, min(self.warmup, self.steps), self.steps + 1)
            decayed = adamw(lambda step: schedule(step + 1), weight_decay=self.weight_decay)
            return flat(chain(clip_by_global_norm(self.clip), decayed))

        return build


def flat(optimizer: Any) -> GradientTransformation:
    """An optimizer on all leaves as one vector: many small operations become a few, and take a quarter of the time.

    For optimizers whose result does not change by this: elementwise ones, and those that use the global norm.
    """

    def joined(tree: Any) -> dict[str, Tensor]:
        return {"leaves": torch.cat([leaf.flatten() for leaf in optree.tree_leaves(tree)])}

    def init(params: Any) -> Any:
        return optimizer.init(joined(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves: list[Tensor]
        leaves, spec = optree.tree_flatten(grads)
        updates, state = optimizer.update(joined(grads), state, params=None if params is None else joined(params))
        parts = updates["leaves"].split([leaf.numel() for leaf in leaves])
        return spec.unflatten([part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]), state

    return GradientTransformation(init, update)

"""When members are compared, and how many are trained together."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchSettings:
    """How the members are compared.

    Attributes:
        steps: training steps of a member that is never dropped.
        every: steps between evaluations; each is also a checkpoint.
        halving: at each rung the best 1/halving are kept; below 2, all are kept.
        rungs: number of evaluations that decide, including the last one.
        patience: a member stops after this many evaluations without improvement; 0: never.
        keeps_best: the adapter of a member's best evaluation counts; otherwise that of the last one.
        budget: memory in bytes; None for most of the free memory.
        population: maximum number of members trained together; None for as many as fit.
    """

    steps: int = 81
    every: int = 9
    halving: int = 3
    rungs: int = 3
    patience: int = 0
    keeps_best: bool = True
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

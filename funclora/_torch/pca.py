"""Principal components of inputs that arrive in batches, in memory that does not grow with their number."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from funclora._torch.linalg import randomized_svd, svd

# Randomized decompositions look for so many directions per component, and go to and fro so often, as in PEFT.
_OVERSAMPLING = 2
_ITERATIONS = 4


class IncrementalPca:
    """The leading principal components of all rows so far (Ross et al., IJCV 77, 2008, section 3.1).

    Attributes:
        components: `[n, in]` with orthonormal rows, by descending variance; None before the first batch. The entry of
            the largest magnitude in each is positive.
        singular: the singular values of the centred rows, `[n]`.
        variation: ‖rows − mean‖² of all rows.
    """

    def __init__(self, name: str, n: int, generator: Generator) -> None:
        self.name = name
        self.n = n
        self.generator = generator
        self.components: Tensor | None = None
        self.singular = self.mean = torch.empty(0)
        self.variation = 0.0
        self.count = 0

    def update(self, rows: Tensor) -> None:
        """Take in a batch `[rows, in]` of at least n rows."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        n, mean = len(rows), rows.mean(0, dtype=torch.float64)
        centred = rows - mean.to(rows.dtype)
        variation = float(centred.double().square().sum())
        total = self.count + n
        if self.components is None:
            self.mean, stacked = mean, centred
        else:
            shift, weight = mean - self.mean, self.count * n / total
            known = self.singular.unsqueeze(-1) * self.components
            stacked = torch.cat([known, centred, (weight**0.5 * shift).to(rows.dtype).unsqueeze(0)])
            variation += weight * float(shift.square().sum())
            self.mean = self.mean + shift * (n / total)
        self.variation += variation
        self.count = total
        _, s, vh = self._decomposed(stacked)
        vh = vh[: self.n]
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        self.components, self.singular = vh * largest.sign(), s[: self.n]

    def _decomposed(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted = _OVERSAMPLING * self.n
        if wanted >= min(matrix.shape):
            return svd(self.name, matrix)
        return randomized_svd(self.name, matrix, wanted, _ITERATIONS, self.generator)

    @property
    def explained(self) -> Tensor:
        """The share of each component in the variance of all rows, `[n]`."""
        return self.singular.double().square() / self.variation

"""Singular value decompositions, exact and by random projection, and principal components of batches."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from funclora.errors import NonFiniteError


def svd(name: str, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `[*lead, out, k]`, S `[*lead, k]` in descending order and Vᵀ `[*lead, k, in]` with k = min(out, in).

    Args:
        name: of the parameter, for messages.
        matrix: `[*lead, out, in]`.

    Raises:
        NonFiniteError: the matrix has no decomposition, because it holds NaN or infinity.
    """
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(f"{name!r} has no singular value decomposition: {error}") from error
    return u, s, vh


def randomized_svd(
    name: str, matrix: Tensor, rank: int, iterations: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular values and vectors, approximately, for about `rank / min(out, in)` of the work.

    Randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1), as in
    `torch.svd_lowrank`, but with random numbers from the given generator.

    Args:
        name: of the parameter, for messages.
        matrix: `[*lead, out, in]`.
        rank: at most min(out, in).
        iterations: the number of times the matrix is applied to the subspace in both directions.
        generator: of the random projection. Numbers are drawn on its device.

    Returns:
        U `[*lead, out, rank]`, S `[*lead, rank]`, Vᵀ `[*lead, rank, in]`.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        u, s, vh = randomized_svd(name, matrix.mT, rank, iterations, generator)
        return vh.mT, s, u.mT
    drawn = torch.randn(matrix.shape[-1], rank, dtype=matrix.dtype, device=generator.device, generator=generator)
    basis = torch.linalg.qr(matrix @ drawn.to(matrix.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = svd(name, basis.mT @ matrix)
    return basis @ u, s, vh


# The directions per component, and the iterations, of randomized decompositions; as in PEFT.
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
        """Update the components with a batch `[rows, in]` of at least n rows."""
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

"""Singular value decompositions of weights and activations, exact and by random projection."""

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
    """The leading `rank` singular values and vectors, nearly, for about `rank / min(out, in)` of the work.

    Randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1), as in
    `torch.svd_lowrank`, but with random numbers of the given generator.

    Args:
        name: of the parameter, for messages.
        matrix: `[*lead, out, in]`.
        rank: at most min(out, in).
        iterations: how often the matrix is applied to the subspace in both directions.
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

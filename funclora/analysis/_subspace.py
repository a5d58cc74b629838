"""The overlap of the subspaces of two adapters: φ in the LoRA paper (arXiv 2106.09685, section 7.2)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_tensor
from funclora._torch.linalg import svd
from funclora.analysis._changes import Change, Tuned, paired, refuse_nonfinite
from funclora.analysis._data import Data
from funclora.analysis._figure import StrPath, draw_heatmap, mean_grid, new_figure, write_figure
from funclora.errors import ConfigError, ParamsError
from funclora.rules.base import Params
from funclora.rules.low_rank import LowRank

Of = Literal["A", "B", "right", "left"]
"""The matrix whose subspaces are compared, see `subspace_similarity`."""

# Directions with singular values below this fraction of the largest are rounding errors.
_NOISE = 2.0**-23


@dataclass(frozen=True)
class Similarity(Data):
    """φ of one parameter.

    Attributes:
        name: full name of the parameter.
        of: the matrix whose subspaces are compared, as given to `subspace_similarity`.
        grids: one for each matrix of the parameter: `grids[m][i - 1][j - 1]` is φ(i, j), between 0 (orthogonal) and 1
            (the other subspace contains the smaller one). One row and column for each direction whose singular value
            is not a rounding error, at most k; an empty grid if a side is zero.
        whole: φ of all directions of both sides, for each matrix; None if a side is zero.
        chance: what two random subspaces of full size would give: max(i, j) / dimension of the space.
    """

    name: str
    of: Of
    grids: tuple[tuple[tuple[float, ...], ...], ...]
    whole: tuple[float | None, ...]
    chance: tuple[float, ...]


@dataclass(frozen=True)
class Similarities(Data):
    """The result of `subspace_similarity`.

    Attributes:
        rows: one for each parameter.
    """

    rows: tuple[Similarity, ...]

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the mean of the grids, i over j, as a PNG.

        Raises:
            UnsupportedError: matplotlib is not installed.
            ParamsError: every grid is empty.
        """
        plot_similarities(self, file)


def phi(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) = ‖Uᵢᵀ·Vⱼ‖² / min(i, j), for all i and j (arXiv 2106.09685, equation 4; Frobenius norm).

    Args:
        first: `[*lead, dim, m]`, orthonormal columns; Uᵢ are the first i.
        second: `[*lead, dim, n]`, the same; Vⱼ are the first j.

    Returns:
        `[*lead, m, n]`; element (i − 1, j − 1) is φ(i, j).

    Examples:
        >>> phi(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        tensor([[0.0000, 0.0000],
                [1.0000, 0.5000]])
    """
    check_tensor(first, "first", "[*lead, dim, m]")
    check_tensor(second, "second", "[*lead, dim, n]")
    if first.dim() < 2 or second.dim() < 2 or first.shape[:-1] != second.shape[:-1]:
        raise ParamsError(
            f"first and second: expected [*lead, dim, m] and [*lead, dim, n], got {list(first.shape)} and "
            f"{list(second.shape)}."
        )
    overlap = (first.mT @ second).square().cumsum(-1).cumsum(-2)
    m, n = overlap.shape[-2:]
    i, j = (torch.arange(1, k + 1, dtype=overlap.dtype, device=overlap.device) for k in (m, n))
    return (overlap / torch.minimum(i.unsqueeze(-1), j)).clamp(max=1.0)


@torch.no_grad()
def subspace_similarity(
    first: Tuned,
    second: Tuned,
    *,
    of: Of = "A",
    k: int = 64,
    params: Params | None = None,
    model: nn.Module | None = None,
) -> Similarities:
    """φ(i, j) between two adapters, for each parameter that both have.

    The subspaces are spanned by the leading i and j singular vectors of

    - "A": the factor A, right singular vectors, as in the paper. The base is not needed.
    - "B": the factor B, left singular vectors.
    - "right" and "left": ΔW. If it is the product of the factors, they are used; for `DoRA`, `Full` and tuned weights
      the difference of the weights is decomposed.

    Directions with singular values below 2⁻²³ of the largest are left out, because they are rounding errors.

    Args:
        first: full parameter name -> rule, or -> tuned weight.
        second: the other one.
        of: the matrix whose subspaces are compared.
        k: the largest number of directions in the grids.
        params: the base weights, needed for "right" and "left" unless the rule is `LoRA` or `Delta`.
        model: gives the layouts of weights whose rule does not have one, as in `spectra`.

    Returns:
        A row for each parameter that both have. Rules without factors have no row for "A" and "B".

    Raises:
        ConfigError: `of` or `k` has another value.
        ParamsError: no parameter is in both, the parameters differ in shape, or a base weight is missing.
        NonFiniteError: a weight or a factor holds NaN or infinity.

    Examples:
        >>> from funclora import LoRA
        >>> one, two = (LoRA(a, torch.ones(2, 1)) for a in torch.eye(3)[:2].split(1))
        >>> subspace_similarity({"weight": one}, {"weight": two}).rows[0].grids
        (((0.0,),),)
        >>> round(subspace_similarity({"weight": one}, {"weight": two}, of="B").rows[0].whole[0], 6)
        1.0
    """
    if of not in ("A", "B", "right", "left"):
        raise ConfigError(f"of: expected 'A', 'B', 'right' or 'left', got {of!r}.")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ConfigError(f"k: expected a positive number of directions, got {k!r}.")
    rows = [similar(one, two, of, k) for one, two in paired(first, second, params, model) if one and two]
    if not rows:
        raise ParamsError(
            f"no parameter is in both adapters: one has {', '.join(list(first)[:3])}, ..., the other "
            f"{', '.join(list(second)[:3])}, ... They are not of one model."
        )
    found = tuple(row for row in rows if row is not None)
    if not found:
        what = "factors" if of in ("A", "B") else "a matrix that is known (model=)"
        raise ParamsError(f"of={of!r}: no parameter that both adapters change has {what}.")
    return Similarities(found)


def similar(one: Change, two: Change, of: Of, k: int) -> Similarity | None:
    """The row of one parameter; None if it has no such matrix."""
    bases = [directions(change, of) for change in (one, two)]
    if bases[0] is None or bases[1] is None:
        return None
    grids, whole, chance = [], [], []
    for u, v in zip(*bases, strict=True):
        grid = phi(u, v)
        grids.append(tuple(tuple(row) for row in grid[:k, :k].tolist()) if grid.numel() else ())
        whole.append(float(grid[-1, -1]) if grid.numel() else None)
        chance.append(max(u.shape[-1], v.shape[-1]) / u.shape[-2])
    return Similarity(one.name, of, tuple(grids), tuple(whole), tuple(chance))


def directions(change: Change, of: Of) -> list[Tensor] | None:
    """The singular vectors of each matrix, `[dim, n]`, the largest first; None if there is no such matrix."""
    if of in ("A", "B"):
        if not isinstance(change.given, LowRank):
            return None
        a, b = change.given.layout.factors(change.given.a.detach().double(), change.given.b.detach().double())
        refuse_nonfinite(change.name, a, b)
        u, s, vh = svd(change.name, a if of == "A" else b)
        vectors = vh.mT if of == "A" else u
    elif not change.is_matrix:
        return None
    elif change.core is not None:
        q, core, p = change.core
        u, s, vh = svd(change.name, core)
        vectors = q @ u if of == "left" else p @ vh.mT
    else:
        u, s, vh = svd(change.name, change.dense())
        vectors = (u if of == "left" else vh.mT).double()
    vectors, s = vectors.reshape(-1, *vectors.shape[-2:]), s.reshape(-1, s.shape[-1])
    counts = (s > _NOISE * s[:, :1]).sum(-1).tolist()
    return [each[:, :n] for each, n in zip(vectors, counts, strict=True)]


def plot_similarities(found: Similarities, file: StrPath) -> None:
    """The mean of the grids φ(i, j), over the parameters and matrices that have such i and j."""
    grids = [grid for row in found.rows for grid in row.grids if grid]
    if not grids:
        raise ParamsError("there is nothing to draw: one of the adapters is zero in every parameter.")
    figure, (axis,) = new_figure(1, [5.6], 4.6)
    draw_heatmap(axis, mean_grid(grids))
    axis.set_title(f"φ(i, j) of {found.rows[0].of}, mean of {len(grids)}")
    figure.colorbar(axis.images[0], ax=axis)
    write_figure(figure, file)

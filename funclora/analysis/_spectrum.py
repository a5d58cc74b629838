"""The size of an update and the number of its directions: norms, singular values, effective ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_tensor
from funclora._api.deprecated import old_positions
from funclora.analysis._changes import Change, Tuned, changes, describe
from funclora.analysis._data import Data
from funclora.analysis._figure import MOST_KINDS, Layers, StrPath, colors_of, write_figure
from funclora.errors import NonFiniteError
from funclora.rules.base import Params
from funclora.rules.dora import NORM_BLOCK


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of the singular values, as shares of their sum (Roy and Vetterli, EUSIPCO 2007).

    It is k where k singular values are equal and the others zero, and between 1 and k otherwise; 0 for a zero matrix.

    Args:
        singular_values: `[*, k]`, none negative.

    Returns:
        `[*]`.

    Examples:
        >>> effective_rank(torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([2., 1., 0.])
    """
    check_tensor(singular_values, "singular_values", "[*, k]")
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / torch.where(total > 0, total, 1.0)
    entropy = torch.special.entr(share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


def stable_rank(singular_values: Tensor) -> Tensor:
    """‖ΔW‖² / σ₁², the squared Frobenius norm divided by the squared spectral norm (arXiv math/0503442).

    It is at most the rank, and small singular values hardly change it; 0 for a zero matrix.

    Args:
        singular_values: `[*, k]`.

    Returns:
        `[*]`.

    Examples:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
        tensor(2.2500)
    """
    check_tensor(singular_values, "singular_values", "[*, k]")
    largest = singular_values.amax(-1, keepdim=True)
    share = singular_values / torch.where(largest > 0, largest, 1.0)
    return share.square().sum(-1)


@dataclass(frozen=True)
class Spectrum(Data):
    """The update of one parameter.

    Attributes:
        name: full name of the parameter.
        rule: the kind of its rule; "Full" for a tuned weight.
        of: the measured matrix: "ΔW", the change of the weight, or "s·B·A", the update of the direction, for `DoRA`
            without the base.
        shape: `[*lead, out, in]`, the matrices in the parameter (lead: experts); `[1, n]` for a vector.
        r: the rank of a low-rank rule, else None.
        scaling: s, where the rule has one.
        norm: ‖ΔW‖, over all matrices (Frobenius norm).
        base_norm: ‖W‖; None without the base.
        share: ‖ΔW‖ / ‖W‖, the relative size of the change; None without the base or for W = 0.
        singular_values: for each matrix, largest first; at most r for a low-rank update, as the others are zero. None
            for a vector, or if it is unknown which dimensions are the matrix.
        effective_rank: of each matrix, by `effective_rank`.
        stable_rank: of each matrix, by `stable_rank`.
    """

    name: str
    rule: str
    of: str
    shape: tuple[int, ...]
    r: int | None
    scaling: float | None
    norm: float
    base_norm: float | None
    share: float | None
    singular_values: tuple[tuple[float, ...], ...] | None
    effective_rank: tuple[float, ...] | None
    stable_rank: tuple[float, ...] | None


@dataclass(frozen=True)
class Spectra(Data):
    """The result of `spectra`.

    Attributes:
        rows: one for each parameter.
    """

    rows: tuple[Spectrum, ...]

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the singular values, and the relative change of each weight (or its norm), as a PNG.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        plot_spectra(self, file)


@old_positions("tuned", "params")
@torch.no_grad()
def spectra(tuned: Tuned, *, params: Params | None = None, model: nn.Module | None = None) -> Spectra:
    """Norms and singular values of the change of each weight.

    For `LoRA` the factors are enough: with `B = Q₁R₁` and `Aᵀ = Q₂R₂`, s·B·A has the same singular values as
    `s·R₁R₂ᵀ`, which is `[r, r]`. The change by `DoRA`, m·(W + s·B·A)/‖W + s·B·A‖ − W, usually has full rank: with the
    base this change is decomposed, one weight at a time; without the base s·B·A is (see `Spectrum.of`).
    For `Full`, `Delta`, `TrainableTokens` and tuned weights the dense difference is decomposed.

    All is computed in float64. The singular values of dense differences of more than 2²⁰ elements are roots of
    eigenvalues of M·Mᵀ, exact to 10⁻⁸ of the largest.

    Args:
        tuned: full parameter name -> rule, or -> tuned weight. A mapping that reads on demand is read item by item.
        params: the base weights. `LoRA`, `DoRA` and `Delta` do not need them.
        model: gives the dimensions of the matrix in a tuned weight, `Full` or `Delta`. Without it two dimensions are a
            matrix, more than three are a convolution, and three give no singular values.

    Returns:
        A row for each parameter.

    Raises:
        ParamsError: a base weight is missing, or does not fit.
        NonFiniteError: a weight or a factor holds NaN or infinity.

    Examples:
        >>> from funclora import LoRA
        >>> rule = LoRA(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]), scaling=2.0)
        >>> (row,) = spectra({"weight": rule}, params={"weight": torch.full((2, 2), 10.0)}).rows
        >>> round(row.norm, 6), round(row.share, 6), row.singular_values[0], row.effective_rank
        (10.0, 0.5, (10.0,), (1.0,))
    """
    return Spectra(tuple(measured(change) for change in changes(tuned, params, model)))


def measured(change: Change, *, singular: bool = True) -> Spectrum:
    """The row of one parameter, without its singular values and ranks if not `singular`."""
    kind, r, scaling = describe(change.given)
    base_norm, values = change.base_norm(), singular_values(change) if singular else None
    norm = change.norm()
    flat = None if values is None else values.reshape(-1, values.shape[-1])
    return Spectrum(
        name=change.name,
        rule=kind,
        of=change.of,
        shape=change.shape,
        r=r,
        scaling=scaling,
        norm=norm,
        base_norm=base_norm,
        share=norm / base_norm if base_norm else None,
        singular_values=None if flat is None else tuple(tuple(row) for row in flat.tolist()),
        effective_rank=None if flat is None else tuple(effective_rank(flat).tolist()),
        stable_rank=None if flat is None else tuple(stable_rank(flat).tolist()),
    )


def singular_values(change: Change) -> Tensor | None:
    """`[*lead, k]` in float64, largest first; None if the parameter is not known to be a matrix."""
    if not change.is_matrix or min(change.shape) < 1:
        return None
    try:
        if change.core is not None:
            values: Tensor = torch.linalg.svdvals(change.core[1])
        else:
            values = _of_dense(change.dense())
    except torch.linalg.LinAlgError as error:
        raise NonFiniteError(f"{change.name!r} has no singular values: {error}") from error
    return values


def _of_dense(matrix: Tensor) -> Tensor:
    """The singular values of a matrix `[*lead, out, in]` in float64, or of a large one in float32.

    For a large matrix they are the roots of the eigenvalues of M·Mᵀ or Mᵀ·M (the smaller one) in float64: ten times
    faster, and exact to 10⁻⁸ of the largest.
    """
    if not matrix.any():
        return torch.zeros(*matrix.shape[:-2], min(matrix.shape[-2:]), dtype=torch.float64)
    if matrix.dtype == torch.float64:
        found: Tensor = torch.linalg.svdvals(matrix)
        return found
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    n = wide.shape[-2]
    gram = wide.new_zeros(*wide.shape[:-2], n, n, dtype=torch.float64)
    for columns in wide.split(max(1, NORM_BLOCK * wide.shape[-1] // wide.numel()), -1):
        block = columns.double()
        gram += block @ block.mT
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt().flip(-1)


def plot_spectra(found: Spectra, file: StrPath) -> None:
    """Singular values relative to the largest, by kind of module, and the relative change of each weight."""
    layers = Layers([row.name for row in found.rows])
    figure, (right, left) = layers.figure(1, [6.5])
    kinds = list(dict.fromkeys(layers.kinds))
    for kind, color in zip(kinds, colors_of(len(kinds)), strict=True):
        rows = [row for row, own in zip(found.rows, layers.kinds, strict=True) if own == kind]
        _draw_spectra(left, [values for row in rows for values in row.singular_values or ()], color, kind)
    left.set_yscale("log")
    left.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    left.set_xlabel("i")
    left.set_ylabel("σᵢ / σ₁")
    if left.lines and len(kinds) <= MOST_KINDS:
        left.legend(fontsize=7)
    what = "‖" + ", ".join(dict.fromkeys(row.of for row in found.rows)) + "‖"
    of = "weights" if what == "‖W‖" else "updates"
    left.set_title(f"singular values of the {of}: median, and from the least to the greatest", fontsize=10)
    with_base = all(row.base_norm is not None for row in found.rows)
    sizes = [row.share if with_base else row.norm for row in found.rows]
    title, form = ("‖ΔW‖ / ‖W‖", ".1%") if with_base else (what, ".3g")
    layers.draw(right, sizes, title, form, cmap="viridis", vmin=0)
    write_figure(figure, file)


def _draw_spectra(axis: Any, spectra: Sequence[Sequence[float]], color: Any, label: str) -> None:
    """The median of some spectra as a line, and what lies between the least and the greatest as a band."""
    kept = [[x / values[0] for x in values if x > 1e-9 * values[0]] for values in spectra if values and values[0]]
    places = range(max(map(len, kept), default=0))
    columns = [sorted(values[i] for values in kept if i < len(values)) for i in places]
    if columns:
        x = [i + 1 for i in places]
        marker = "o" if len(columns) == 1 else None
        axis.plot(x, [column[len(column) // 2] for column in columns], color=color, label=label, marker=marker)
        axis.fill_between(x, [c[0] for c in columns], [c[-1] for c in columns], color=color, alpha=0.1, linewidth=0)

"""Comparison of the updates of two adapters: norms, angle and distance."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funclora._api.deprecated import old_positions
from funclora.analysis._changes import Change, Tuned, paired
from funclora.analysis._data import Data
from funclora.analysis._figure import Layers, StrPath, draw_heatmap, write_figure
from funclora.rules.base import Params


@dataclass(frozen=True)
class ComparedUpdate(Data):
    """Two updates of one parameter.

    Attributes:
        name: full name of the parameter.
        of: the measured matrix: "ΔW", or "s·B·A" if the base is missing and one side is `DoRA`.
        norms: ‖ΔW₁‖ and ‖ΔW₂‖; None for an adapter that does not change the parameter.
        cosine: ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖; None if a side is zero or missing.
        distance: ‖ΔW₁ − ΔW₂‖; None if a side is missing.
        relative_distance: distance / ‖ΔW₁‖; None if ‖ΔW₁‖ is zero or a side is missing.
    """

    name: str
    of: str
    norms: tuple[float | None, float | None]
    cosine: float | None
    distance: float | None
    relative_distance: float | None


@dataclass(frozen=True)
class Comparison(Data):
    """The result of `compare`.

    Attributes:
        rows: one for each parameter that an adapter changes.
        norms: of both adapters' changes as a whole, all parameters together.
        cosine: of the changes as a whole, each one long vector; a parameter that is missing does not change.
        relative_distance: ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ of the changes as a whole.
    """

    rows: tuple[ComparedUpdate, ...]
    norms: tuple[float, float]
    cosine: float | None
    relative_distance: float | None

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw norms, cosines and relative distances by parameter, as a PNG.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        plot_comparison(self, file)


@old_positions("first", "second", "params")
@torch.no_grad()
def compare(first: Tuned, second: Tuned, *, params: Params | None = None, model: nn.Module | None = None) -> Comparison:
    """Norms, cosine and distance of the changes of each weight by two adapters.

    Two `LoRA` updates are compared by their factors alone: ⟨s₁B₁A₁, s₂B₂A₂⟩ = ⟨s₁s₂·B₂ᵀB₁, A₂A₁ᵀ⟩, and the norm of the
    difference is the norm of a small matrix from the QR decompositions of [s₁B₁, −s₂B₂] and [A₁; A₂], which is accurate
    also for nearly equal updates. If a side is `DoRA`, `Full` or a tuned weight, the rewritten weights are compared
    block by block.

    Args:
        first: full parameter name -> rule, or -> tuned weight.
        second: the other one.
        params: the base weights. `LoRA` and `Delta` do not need them; without them only s·B·A of `DoRA` is compared.
        model: gives the layouts of weights whose rule does not have one, as in `spectra`.

    Returns:
        A row for each parameter that an adapter changes: first those of the first adapter, then the others.

    Raises:
        ParamsError: a base weight is missing, or the adapters' parameters differ in shape.
        NonFiniteError: a weight or a factor holds NaN or infinity.

    Examples:
        >>> from funclora import LoRA
        >>> one = {"weight": LoRA(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))}
        >>> two = {"weight": LoRA(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0]]))}
        >>> row = compare(one, two).rows[0]
        >>> round(row.cosine, 6), round(row.relative_distance, 6)
        (0.707107, 1.0)
    """
    return joined([compared(one, two) for one, two in paired(first, second, params, model)])


def compared(one: Change | None, two: Change | None) -> ComparedUpdate:
    """The row of one parameter."""
    if one is None or two is None:
        only = one or two
        assert only is not None
        norms = (only.norm(), None) if two is None else (None, only.norm())
        return ComparedUpdate(only.name, only.of, norms, None, None, None)
    first, second, dot, distance = _products(one, two)
    cosine = max(-1.0, min(1.0, dot / (first * second))) if first and second else None
    of = one.of if one.low_rank_part else two.of
    return ComparedUpdate(one.name, of, (first, second), cosine, distance, distance / first if first else None)


def joined(rows: Sequence[ComparedUpdate]) -> Comparison:
    """The rows, and the totals over all rows."""
    first, second = (math.hypot(*(row.norms[side] or 0.0 for row in rows)) for side in (0, 1))
    dot = sum(row.cosine * (row.norms[0] or 0.0) * (row.norms[1] or 0.0) for row in rows if row.cosine is not None)
    distance = math.hypot(*(_apart(row) for row in rows))
    cosine = max(-1.0, min(1.0, dot / (first * second))) if first and second else None
    return Comparison(tuple(rows), (first, second), cosine, distance / first if first else None)


def _apart(row: ComparedUpdate) -> float:
    """The distance; a missing update counts as zero."""
    return row.distance if row.distance is not None else sum(norm or 0.0 for norm in row.norms)


def _products(one: Change, two: Change) -> tuple[float, float, float, float]:
    """‖ΔW₁‖, ‖ΔW₂‖, ⟨ΔW₁, ΔW₂⟩ and ‖ΔW₁ − ΔW₂‖."""
    if one.factors is not None and two.factors is not None:
        (a1, b1), (a2, b2) = one.factors, two.factors
        dot = ((b2.mT @ b1) * (a2 @ a1.mT)).sum()
        _, r1 = torch.linalg.qr(torch.cat([b1, -b2], -1))
        _, r2 = torch.linalg.qr(torch.cat([a1, a2], -2).mT)
        return one.norm(), two.norm(), float(dot), float(torch.linalg.vector_norm(r1 @ r2.mT))
    if one.weight is None or two.weight is None:
        blocks: Iterable[tuple[Tensor, Tensor]] = [(one.dense().double(), two.dense().double())]
    else:
        both = zip(one.blocks(), two.blocks(), strict=True)
        blocks = ((x - before, y - before) for (before, x), (_, y) in both)
    sums = torch.zeros(4, dtype=torch.float64)
    for x, y in blocks:
        parts = (x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).square().sum())
        sums += torch.stack(parts).cpu()
    first, second, dot, distance = sums.tolist()
    return first**0.5, second**0.5, dot, distance**0.5


def plot_comparison(
    found: Comparison,
    file: StrPath,
    grids: Sequence[tuple[str, Any]] = (),
    sides: tuple[str, str] = ("the first", "the second"),
) -> None:
    """Norms, cosine and relative distance of each parameter; grids of φ beside them, by title."""
    layers = Layers([row.name for row in found.rows])
    figure, axes = layers.figure(4, [4.4] * len(grids))
    norms = [[row.norms[i] for row in found.rows] for i in (0, 1)]
    greatest = max((norm for side in norms for norm in side if norm is not None), default=0.0) or 1.0
    for axis, side, values in zip(axes, sides, norms, strict=False):
        layers.draw(axis, values, f"‖ΔW‖ of {side}", ".3g", cmap="viridis", vmin=0, vmax=greatest)
    layers.draw(axes[2], [row.cosine for row in found.rows], "cosine", "+.2f", cmap="RdBu", vmin=-1, vmax=1)
    distances = [row.relative_distance for row in found.rows]
    layers.draw(axes[3], distances, "relative distance", ".2f", cmap="viridis", vmin=0)
    for axis, (title, grid) in zip(axes[4:], grids, strict=True):
        draw_heatmap(axis, grid)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"j, directions of {sides[1]}")
        axis.set_ylabel(f"i, directions of {sides[0]}")
        figure.colorbar(axis.images[0], ax=axis, shrink=min(1.0, 4.4 / figure.get_figheight()))
    write_figure(figure, file)

"""Magnitude and direction: how far a weight moved in each (section 3.2 of the DoRA paper, arXiv 2402.09353)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from funclora._api.arguments import check_params
from funclora._api.deprecated import old_positions
from funclora.analysis._changes import Change, Tuned, changes
from funclora.analysis._data import Data
from funclora.analysis._figure import StrPath, colors_of, new_figure, write_figure
from funclora.errors import ConfigError, ParamsError
from funclora.rules.base import Params

Per = Literal["output", "input"]
"""The units whose vectors are compared, see `magnitude_direction`."""

# The dimension of `[out, in]` along which the vector of a unit is.
_ACROSS: dict[Per, int] = {"output": -1, "input": -2}


@dataclass(frozen=True)
class Movement(Data):
    """How one weight moved.

    Attributes:
        name: full name of the parameter.
        label: the label given to `magnitude_direction`, usually the method.
        step: the step of training.
        delta_m: ΔM, the mean over units of |‖v‖ − ‖w‖|, with w a unit's vector in the base and v in the tuned weight.
        delta_d: ΔD, the mean over units of 1 − cos(v, w).
        magnitude: the mean of ‖w‖: ΔM / magnitude compares layers whose weights differ in size.
        units: how many vectors there are.
    """

    name: str
    label: str
    step: int | None
    delta_m: float
    delta_d: float
    magnitude: float
    units: int

    def height(self, *, relative: bool) -> float:
        """ΔM, or ΔM / magnitude."""
        return self.delta_m / self.magnitude if relative and self.magnitude else self.delta_m


@dataclass(frozen=True)
class Trend(Data):
    """The straight line through some movements, ΔM over ΔD.

    Attributes:
        n: how many points.
        correlation: Pearson's; None for fewer than three points, or where one side does not vary.
        slope: of the least-squares line of ΔM over ΔD; None like `correlation`.
        intercept: of that line.
    """

    n: int
    correlation: float | None
    slope: float | None
    intercept: float | None


@dataclass(frozen=True)
class Movements(Data):
    """The result of `magnitude_direction`. `+` joins the results of several methods and steps.

    Attributes:
        rows: one for each parameter, step and label.
        per: the units whose vectors are compared, "output" or "input".
    """

    rows: tuple[Movement, ...]
    per: Per

    def __add__(self, other: Movements) -> Movements:
        if not isinstance(other, Movements):
            return NotImplemented
        if other.per != self.per:
            raise ConfigError(f"per: one of the movements is per {self.per}, the other per {other.per}: give the same.")
        return Movements(self.rows + other.rows, self.per)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the rows."""
        return tuple(dict.fromkeys(row.label for row in self.rows))

    def of(self, label: str) -> Movements:
        """The rows of one label."""
        return Movements(tuple(row for row in self.rows if row.label == label), self.per)

    def trend(self, *, relative: bool = False) -> Trend:
        """The straight line through all rows, ΔM over ΔD.

        Args:
            relative: take ΔM / magnitude for ΔM.
        """
        return trend([(row.delta_d, row.height(relative=relative)) for row in self.rows])

    def plot(self, file: str | os.PathLike[str], *, relative: bool = False) -> None:
        """Draw ΔM over ΔD as the paper's figure 2 does, a panel for each label, as a PNG.

        Args:
            file: where to write.
            relative: draw ΔM / magnitude.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        plot_movements(self, file, relative=relative)


@old_positions("params", "tuned")
@torch.no_grad()
def magnitude_direction(
    tuned: Tuned,
    *,
    params: Params,
    per: Per = "output",
    label: str = "",
    step: int | None = None,
    model: nn.Module | None = None,
) -> Movements:
    """ΔM and ΔD between base and tuned weights (arXiv 2402.09353, section 3.2, equations 3 and 4).

    The paper writes W ∈ R^{d×k} as m·V/‖V‖_c with the norms of its k columns. In its h = W·x, with W = W₀ + B·A, B ∈
    R^{d×r} and A ∈ R^{r×k}, a column belongs to one *input*: it is also a column of torch's `[out, in]`. The authors'
    code and PEFT take the norm of each row of `[out, in]`, one per *output* unit, and so does DoRA's magnitude in
    funclora. So `per="output"` is the default, and `per="input"` is the definition in the paper.

    1 − cos(v, w) is computed as ½·‖v/‖v‖ − w/‖w‖‖² in float64, which is accurate for close directions.
    A unit that is zero on both sides did not move; one that is zero on one side only counts as orthogonal (1).

    Args:
        tuned: full parameter name -> rule of any kind, or -> tuned weight. Vectors (biases, norms) have no units and
            are left out.
        params: the base weights.
        per: the units whose vectors are compared: "output" or "input" dimensions of the matrix.
        label: the label of the rows, usually the method.
        step: the training step of the rows.
        model: gives the layouts of weights whose rule does not have one: embeddings and transformers' Conv1D are `[in,
            out]`. Without it, tuned weights, `Full` and `Delta` are read as `[out, in]`, and as a convolution if they
            have four or more dimensions.

    Returns:
        A row for each parameter. `+` joins the results of several steps and methods.

    Raises:
        ParamsError: a base weight is missing, does not fit, or has three dimensions that only a `model` can explain; or
            nothing is left to compare.
        ConfigError: `per` is neither "output" nor "input".
        NonFiniteError: a weight or a factor holds NaN or infinity.

    Examples:
        >>> base = {"weight": torch.tensor([[3.0, 4.0], [1.0, 0.0]])}
        >>> (row,) = magnitude_direction({"weight": torch.tensor([[6.0, 8.0], [0.0, 1.0]])}, params=base).rows
        >>> round(row.delta_m, 6), round(row.delta_d, 6)
        (2.5, 0.5)
    """
    check_params(params)
    if per not in ("output", "input"):
        raise ConfigError(f"per: expected 'output' or 'input', got {per!r}.")
    rows = []
    for change in changes(tuned, params, model):
        if change.is_matrix:
            rows.append(_moved(change, per, label, step))
        elif change.weight is not None and change.weight.shape[-2] > 1:
            raise ParamsError(
                f"{change.name!r} has three dimensions, which may be experts or a convolution. Say which: model=."
            )
    if not rows:
        raise ParamsError("none of the tuned parameters is a matrix: there is no direction to compare.")
    return Movements(tuple(rows), per)


def trend(points: Iterable[tuple[float, float]]) -> Trend:
    """The straight line through points (x, y)."""
    found = torch.tensor([*points], dtype=torch.float64).reshape(-1, 2)
    n = len(found)
    if n < 3:
        return Trend(n, None, None, None)
    x, y = found.unbind(-1)
    dx, dy = x - x.mean(), y - y.mean()
    xx, yy, xy = float(dx @ dx), float(dy @ dy), float(dx @ dy)
    if xx == 0 or yy == 0:
        return Trend(n, None, None, None)
    slope = xy / xx
    return Trend(n, xy / (xx * yy) ** 0.5, slope, float(y.mean()) - slope * float(x.mean()))


def _moved(change: Change, per: Per, label: str, step: int | None) -> Movement:
    old, new = _unit_norms(change, per)
    directions = _direction_distances(change, per, old, new)
    return Movement(
        name=change.name,
        label=label,
        step=step,
        delta_m=float((new - old).abs().mean()),
        delta_d=float(directions.mean()),
        magnitude=float(old.mean()),
        units=old.numel(),
    )


def _unit_norms(change: Change, per: Per) -> tuple[Tensor, Tensor]:
    """The norms of all units before and after, `[*lead, units]`."""
    before, after = list[Tensor](), list[Tensor]()
    for old, new in change.blocks():
        before.append(old.square().sum(_ACROSS[per]))
        after.append(new.square().sum(_ACROSS[per]))
    return _joined(before, per).sqrt(), _joined(after, per).sqrt()


def _joined(parts: list[Tensor], per: Per) -> Tensor:
    """Sums over blocks of rows, as sums over the matrix: a unit that is an input has a part in each."""
    return torch.cat(parts, -1) if per == "output" else torch.stack(parts).sum(0)


def _direction_distances(change: Change, per: Per, old: Tensor, new: Tensor) -> Tensor:
    """1 − cos of each unit's vectors, `[*lead, units]`."""
    found, start = list[Tensor](), 0
    one_over_old, one_over_new = (torch.where(norm > 0, 1 / norm, 0.0) for norm in (old, new))
    for before, after in change.blocks():
        n = before.shape[-2]
        if per == "output":
            w, v = (over[..., start : start + n].unsqueeze(-1) for over in (one_over_old, one_over_new))
        else:
            w, v = one_over_old.unsqueeze(-2), one_over_new.unsqueeze(-2)
        found.append((v * after - w * before).square().sum(_ACROSS[per]))
        start += n
    total = _joined(found, per)
    # A zero vector has no direction: with one zero vector the sum is 1, as for orthogonal vectors.
    return torch.where((old > 0) == (new > 0), total / 2, 1.0)


_MARKERS = "os^Dv<>P*X"


def plot_movements(found: Movements, file: StrPath, *, relative: bool) -> None:
    """ΔM over ΔD: a panel for each label, a colour for each parameter, a marker for each step."""
    labels = found.labels
    names = list(dict.fromkeys(row.name for row in found.rows))
    steps = sorted({row.step for row in found.rows if row.step is not None})
    figure, axes = new_figure(1, [4.6] * max(1, len(labels)), 4.2)
    colors = colors_of(len(names))
    for axis, label in zip(axes, labels, strict=True):
        of_label = found.of(label)
        for row in of_label.rows:
            marker = _MARKERS[steps.index(row.step) % len(_MARKERS)] if row.step is not None else "o"
            color = colors[names.index(row.name)]
            axis.scatter(row.delta_d, row.height(relative=relative), color=color, marker=marker, s=26, alpha=0.85)
        line = of_label.trend(relative=relative)
        title = label or "all"
        if line.slope is not None and line.intercept is not None:
            ends = [min(row.delta_d for row in of_label.rows), max(row.delta_d for row in of_label.rows)]
            axis.plot(ends, [line.intercept + line.slope * x for x in ends], color="black", linewidth=1)
            title += f": correlation {line.correlation:+.2f}"
        axis.set_title(title)
        axis.set_xlabel("ΔD, mean of 1 − cos")
        axis.set_ylabel("ΔM / mean magnitude" if relative else "ΔM")
        axis.ticklabel_format(scilimits=(-3, 4))
    for i, step in enumerate(steps):
        axes[-1].scatter([], [], color="gray", marker=_MARKERS[i % len(_MARKERS)], label=f"step {step}")
    if steps:
        axes[-1].legend(loc="best", fontsize=8)
    figure.suptitle(f"Magnitude and direction, one point for each weight{' and step' if steps else ''}")
    write_figure(figure, file)

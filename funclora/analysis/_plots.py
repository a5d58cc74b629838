"""Pictures of the results, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funclora._files.atomic import replace_files
from funclora.errors import ParamsError, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from funclora.analysis._compare import Comparison
    from funclora.analysis._direction import Movements
    from funclora.analysis._spectrum import Spectra
    from funclora.analysis._subspace import Similarities

StrPath = str | os.PathLike[str]
_MARKERS = "os^Dv<>P*X"
# With more names than that on an axis, they would not be readable.
_NAMES = 60


def needs_matplotlib() -> None:
    """Raise `UnsupportedError` if there is no matplotlib; to be called before the work."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError("plots need matplotlib. Type: pip install 'funclora[demo]'") from error


def plot_movements(found: Movements, file: StrPath, *, relative: bool) -> None:
    """ΔM over ΔD: a panel for each label, a colour for each parameter, a marker for each step."""
    labels = found.labels
    names = list(dict.fromkeys(row.name for row in found.rows))
    steps = sorted({row.step for row in found.rows if row.step is not None})
    figure, axes = _figure(1, max(1, len(labels)), 4.6, 4.2)
    colors = _colors(len(names))
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
    _write(figure, file)


def plot_spectra(found: Spectra, file: StrPath) -> None:
    """Singular values as parts of the largest, and how far each weight moves."""
    figure, (left, right) = _figure(1, 2, 6.5, max(4.2, 0.16 * min(len(found.rows), _NAMES)))
    colors = _colors(len(found.rows))
    for row, color in zip(found.rows, colors, strict=True):
        for values in row.singular_values or ():
            kept = [value / values[0] for value in values if values[0] and value > 1e-9 * values[0]]
            left.plot(range(1, len(kept) + 1), kept, color=color, linewidth=0.9, alpha=0.8)
    left.set_yscale("log")
    left.set_xlabel("i")
    left.set_ylabel("σᵢ / σ₁")
    what = "‖" + ", ".join(dict.fromkeys(row.of for row in found.rows)) + "‖"
    left.set_title("singular values of each weight" if what == "‖W‖" else "singular values of each update")
    with_base = all(row.base_norm is not None for row in found.rows)
    sizes = [(row.share if with_base else row.norm) or 0.0 for row in found.rows]
    right.barh(range(len(sizes)), sizes, color=colors)
    right.invert_yaxis()
    _name(right, [row.name for row in found.rows])
    right.set_title("‖ΔW‖ / ‖W‖" if with_base else what)
    _write(figure, file)


def plot_similarities(found: Similarities, file: StrPath) -> None:
    """The mean of the grids φ(i, j), over the parameters and matrices that have such i and j."""
    grids = [grid for row in found.rows for grid in row.grids if grid]
    if not grids:
        raise ParamsError("there is nothing to draw: one of the adapters is zero in every parameter.")
    figure, (axis,) = _figure(1, 1, 5.6, 4.6)
    _heatmap(axis, mean_grid(grids))
    axis.set_title(f"φ(i, j) of {found.rows[0].of}, mean of {len(grids)}")
    figure.colorbar(axis.images[0], ax=axis)
    _write(figure, file)


def plot_comparison(found: Comparison, file: StrPath, grids: Sequence[tuple[str, Any]] = ()) -> None:
    """Norms, cosine and relative distance of each parameter; grids of φ beside them, by title."""
    figure, axes = _figure(1, 3 + len(grids), 4.4, max(4.2, 0.2 * min(len(found.rows), _NAMES)))
    places = range(len(found.rows))
    for side, name, offset in ((0, "first", -0.2), (1, "second", 0.2)):
        norms = [row.norms[side] or 0.0 for row in found.rows]
        axes[0].barh([place + offset for place in places], norms, height=0.4, label=name)
    axes[0].legend(fontsize=8)
    axes[0].set_title("norm of the update")
    for axis, title, values in (
        (axes[1], "cosine", [row.cosine for row in found.rows]),
        (axes[2], "relative distance", [row.relative_distance for row in found.rows]),
    ):
        axis.barh(places, [value or 0.0 for value in values], color="tab:green")
        axis.set_title(title)
    axes[1].set_xlim(-1, 1)
    for axis in axes[:3]:
        axis.invert_yaxis()
        axis.set_yticks([])
    _name(axes[0], [row.name for row in found.rows])
    for axis, (title, grid) in zip(axes[3:], grids, strict=True):
        _heatmap(axis, grid)
        axis.set_title(title)
        figure.colorbar(axis.images[0], ax=axis)
    _write(figure, file)


def mean_grid(grids: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean of grids of unequal size, each place over those that have it."""
    m, n = max(len(grid) for grid in grids), max(len(grid[0]) for grid in grids)
    found = []
    for i in range(m):
        columns = [[grid[i][j] for grid in grids if i < len(grid) and j < len(grid[0])] for j in range(n)]
        found.append([sum(column) / len(column) if column else float("nan") for column in columns])
    return found


def _heatmap(axis: Any, grid: Sequence[Sequence[float]]) -> None:
    m, n = len(grid), len(grid[0])
    axis.imshow(
        grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower", extent=(0.5, n + 0.5, 0.5, m + 0.5)
    )
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    axis.set_xlabel("j, directions of the second")
    axis.set_ylabel("i, directions of the first")


def _name(axis: Any, names: Sequence[str]) -> None:
    """Put the names at the rows of a chart, every one or every so many."""
    every = -(-len(names) // _NAMES)
    axis.set_yticks(range(0, len(names), every), list(names)[::every], fontsize=7)


def _colors(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / max(1, n - 1)) for i in range(n)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure that no window shows, and its axes."""
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _write(figure: Figure, file: StrPath) -> None:
    path = Path(file)
    replace_files(path.parent, {path.name: lambda draft: figure.savefig(draft, dpi=110, format="png")})

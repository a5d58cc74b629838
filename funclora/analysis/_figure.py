"""Drawing functions for all plots: a figure without a window, heatmaps, names along an axis, colours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funclora._files.atomic import replace_files
from funclora.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
# More names on an axis would not be readable.
MOST_NAMES = 60


def needs_matplotlib() -> None:
    """Raise `UnsupportedError` if there is no matplotlib; to be called before the work."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UnsupportedError("plots need matplotlib. Type: pip install 'funclora[demo]'") from error


def mean_grid(grids: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean of grids of unequal size, each place over those that have it."""
    m, n = max(len(grid) for grid in grids), max(len(grid[0]) for grid in grids)
    found = []
    for i in range(m):
        columns = [[grid[i][j] for grid in grids if i < len(grid) and j < len(grid[0])] for j in range(n)]
        found.append([sum(column) / len(column) if column else float("nan") for column in columns])
    return found


def draw_heatmap(axis: Any, grid: Sequence[Sequence[float]]) -> None:
    m, n = len(grid), len(grid[0])
    axis.imshow(
        grid, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower", extent=(0.5, n + 0.5, 0.5, m + 0.5)
    )
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True)
    axis.set_xlabel("j, directions of the second")
    axis.set_ylabel("i, directions of the first")


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Label the rows of a chart with names: all of them, or every n-th."""
    every = -(-len(names) // MOST_NAMES)
    axis.set_yticks(range(0, len(names), every), list(names)[::every], fontsize=7)


def colors_of(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / max(1, n - 1)) for i in range(n)]


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure without a window, and its axes."""
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def write_figure(figure: Figure, file: StrPath) -> None:
    path = Path(file)
    replace_files(path.parent, {path.name: lambda draft: figure.savefig(draft, dpi=110, format="png")})

"""Drawing functions for all plots: a figure without a window, heatmaps, layers by modules, colours."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funclora._files.atomic import replace_files
from funclora.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]
# More names on an axis, or numbers in a heatmap, would not be readable.
MOST_NAMES, MOST_NUMBERS = 60, 80
MOST_KINDS = 20  # lines in a legend
_LAYER = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")


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
    """A grid of φ, with square cells."""
    m, n = len(grid), len(grid[0])
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1, origin="lower", extent=(0.5, n + 0.5, 0.5, m + 0.5))
    for side in (axis.xaxis, axis.yaxis):
        side.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_xlabel("j, directions of the second")
    axis.set_ylabel("i, directions of the first")


class Layers:
    """Weights in a table: a row for each layer, a column for each module in it.

    Args:
        names: full parameter names.

    Attributes:
        rows: names of the layers. What they all begin with is left out.
        columns: names of the modules in a layer.

    Examples:
        >>> found = Layers(["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "lm_head.weight"])
        >>> found.rows, found.columns, found.grid([0.1, 0.2, 0.3])
        (['0', '1', ''], ['q_proj', 'lm_head'], [[0.1, nan], [0.2, nan], [nan, 0.3]])
    """

    def __init__(self, names: Sequence[str]) -> None:
        parts = [_layer(name.removesuffix(".weight")) for name in names]
        layers = list(dict.fromkeys(layer for layer, _ in parts))
        self.columns = list(dict.fromkeys(module for _, module in parts))
        self._places = [(layers.index(layer), self.columns.index(module)) for layer, module in parts]
        before = {layer[0] for layer in layers if layer is not None}
        self.rows = [
            "" if layer is None else layer[1] if len(before) == 1 else ".".join(filter(None, layer)) for layer in layers
        ]
        self.kinds = [re.sub(r"\d+", "*", module) for _, module in parts]

    def grid(self, values: Sequence[float | None]) -> list[list[float]]:
        """The values of the weights, in their places; NaN where there is none."""
        grid = [[float("nan")] * len(self.columns) for _ in self.rows]
        for (row, column), value in zip(self._places, values, strict=True):
            grid[row][column] = float("nan") if value is None else value
        return grid

    def figure(self, panels: int, more: Sequence[float] = ()) -> tuple[Figure, list[Any]]:
        """A figure for so many heatmaps side by side, with further panels of these widths in inches."""
        width = 1.7 + max(1.4, min(0.42 * len(self.columns), 12.0))
        height = 1.9 + max(2.2, min(0.2 * len(self.rows), 16.0))
        return new_figure(1, [width] * panels + list(more), height)

    def draw(self, axis: Any, values: Sequence[float | None], title: str, form: str, **colors: Any) -> None:
        """A heatmap of a value for each weight, with the numbers where they are few.

        Args:
            axis: of `figure`.
            values: one for each name.
            title: what they are.
            form: of a number.
            **colors: cmap, vmin and vmax of `imshow`.
        """
        grid = self.grid(values)
        image = axis.imshow(grid, aspect="auto", **colors)
        for side, names in ((axis.yaxis, self.rows), (axis.xaxis, self.columns)):
            every = -(-len(names) // MOST_NAMES)
            side.set_ticks(range(0, len(names), every), names[::every], fontsize=7)
        axis.tick_params(axis="x", rotation=90)
        axis.set_ylabel("layer" if self.rows != [""] else "")
        axis.set_title(title, fontsize=10)
        axis.figure.colorbar(image, ax=axis)
        if len(self.rows) * len(self.columns) <= MOST_NUMBERS:
            for i, row in enumerate(grid):
                for j, value in enumerate(row):
                    if value == value:
                        red, green, blue, _ = image.cmap(image.norm(value))
                        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                        text = format(value, form)
                        axis.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _layer(name: str) -> tuple[tuple[str, str] | None, str]:
    """The layer of a module, as its list and its number, and the module's name in it."""
    found = _LAYER.fullmatch(name)
    return (None, name) if found is None else ((found[1] or "", found[2]), found[3])


def colors_of(n: int) -> list[Any]:
    from matplotlib import colormaps

    if n <= 10:
        return [colormaps["tab10"](i) for i in range(n)]
    return [colormaps["turbo"](0.05 + 0.9 * i / max(1, n - 1)) for i in range(n)]


def new_figure(rows: int, widths: Sequence[float], height: float) -> tuple[Figure, list[Any]]:
    """A figure without a window, and its axes: columns of these widths in inches, rows of this height."""
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sum(widths), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths).flat)


def write_figure(figure: Figure, file: StrPath) -> None:
    path = Path(file)
    replace_files(path.parent, {path.name: lambda draft: figure.savefig(draft, dpi=110, format="png")})

"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from funclora.analysis._figure import new_figure, write_figure

MOST_NUMBERS = 20  # classes with a number in each cell
MOST_NAMES = 60  # names on an axis


def plot_confusions(
    panels: Sequence[tuple[str, Sequence[Sequence[int]]]], classes: Sequence[str], file: Path, *, columns: int = 1
) -> None:
    """Draw confusions as a PNG. Colours are shares of each right class, numbers are counts.

    Args:
        panels: titles and counts, `[class][predicted class]`, row by row.
        classes: their names.
        file: where to write.
        columns: panels in a row.
    """
    side = 2.2 + 0.3 * min(len(classes), MOST_NAMES)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, [side + 0.6] * columns, side)
    every = -(-len(classes) // MOST_NAMES)
    for axis, (title, table) in zip(axes, panels, strict=False):
        shares = [[count / (sum(row) or 1) for count in row] for row in table]
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_ticks(range(0, len(classes), every), list(classes)[::every], fontsize=7)
        axis.tick_params(axis="x", rotation=90)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_ylabel("right", fontsize=8)
        for i, row in enumerate(table if len(classes) <= MOST_NUMBERS else ()):
            for j, count in enumerate(row):
                if count:
                    color = "white" if shares[i][j] > 0.5 else "black"
                    axis.text(j, i, f"{count:,}", ha="center", va="center", fontsize=7, color=color)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    write_figure(figure, file)

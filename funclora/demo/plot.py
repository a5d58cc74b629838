"""Pictures: which adapter helps on which text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt

from funclora._files.atomic import replace_files
from funclora.demo.run import METHODS, Results

# With more rows or columns than that, numbers would not be readable.
NUMBERS = 40


def gains(results: Results, file: Path) -> None:
    """Draw held-out loss minus the base model's, adapters by domains, as a PNG.

    Args:
        results: what `run` returned.
        file: where to write.
    """
    domains = results.settings.names
    panels = {
        f"{method}, rank {results.settings.r}": [
            [results.losses[t.name][d] - results.base[d] for d in domains]
            for t in results.trained
            if t.method == method
        ]
        for method in METHODS
    }
    heatmap(
        panels,
        domains,
        domains,
        file,
        label="loss minus base loss, nats per byte (lower is better)",
        title="What each adapter gains over the frozen model (bold: best of its column)",
        x="held-out text of",
        y="adapter trained on",
    )


def heatmap(
    panels: Mapping[str, Sequence[Sequence[float]]],
    rows: Sequence[str],
    columns: Sequence[str],
    file: Path,
    *,
    label: str,
    title: str,
    x: str = "",
    y: str = "",
) -> None:
    """Draw tables of numbers around zero side by side, lower is better, as a PNG.

    Args:
        panels: title -> values, `values[row][column]`.
        rows: labels.
        columns: labels.
        file: where to write.
        label: what the numbers are.
        title: above all.
        x: what the columns are.
        y: what the rows are.
    """
    size = (2.4 + 0.6 * max(8, min(len(columns), 80))) * len(panels), 1.6 + 0.6 * max(8, min(len(rows), 200))
    figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    limit = max((abs(v) for values in panels.values() for row in values for v in row), default=0.0) or 1.0
    for axis, (name, values) in zip(grid[0], panels.items(), strict=True):
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for i, row in enumerate(values if max(len(rows), len(columns)) <= NUMBERS else ()):
            for j, value in enumerate(row):
                best = value == min(other[j] for other in values)
                weight, color = ("bold" if best else "normal"), ("white" if abs(value) > 0.6 * limit else "black")
                axis.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=8, weight=weight, color=color)
        axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(name)
    figure.colorbar(grid[0, 0].images[0], ax=list(grid[0]), label=label, shrink=0.8)
    figure.suptitle(title)
    replace_files(file.parent, {file.name: lambda draft: figure.savefig(draft, dpi=110, format="png")})
    plt.close(figure)

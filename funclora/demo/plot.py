"""The demo's picture: which adapter helps on which domain."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt

from funclora.demo.run import METHODS, Results


def heatmap(results: Results, file: Path) -> None:
    """Draw held-out loss minus the base model's, adapters by domains, as a PNG.

    Args:
        results: what `run` returned.
        file: where to write.
    """
    domains = results.settings.names
    figure, axes = plt.subplots(1, len(METHODS), figsize=(7.2 * len(METHODS), 6.4), layout="constrained")
    gains = {
        method: [
            [results.losses[t.name][d] - results.base[d] for d in domains]
            for t in results.trained
            if t.method == method
        ]
        for method in METHODS
    }
    limit = max(abs(g) for rows in gains.values() for row in rows for g in row)
    for axis, method in zip(axes, METHODS, strict=True):
        axis.imshow(gains[method], cmap="RdBu_r", vmin=-limit, vmax=limit)
        for i, row in enumerate(gains[method]):
            for j, gain in enumerate(row):
                best = gain == min(other[j] for other in gains[method])
                weight, color = (
                    ("bold" if best else "normal"),
                    ("white" if abs(gain) > 0.6 * limit else "black"),
                )
                axis.text(j, i, f"{gain:+.2f}", ha="center", va="center", fontsize=8, weight=weight, color=color)
        axis.set_xticks(range(len(domains)), domains, rotation=40, ha="right")
        axis.set_yticks(range(len(domains)), domains)
        axis.set_xlabel("held-out text of")
        axis.set_ylabel("adapter trained on")
        axis.set_title(f"{method}, rank {results.settings.r}")
    figure.colorbar(
        axes[0].images[0], ax=axes, label="loss minus base loss, nats per byte (lower is better)", shrink=0.8
    )
    figure.suptitle("What each adapter gains over the frozen model (bold: best of its column)")
    figure.savefig(file, dpi=110)
    plt.close(figure)

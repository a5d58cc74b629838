"""The results of a search: the leaderboard, three plots, and the best adapters with their settings."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from funclora._apps.sweep.search import Search
from funclora._apps.sweep.space import Member
from funclora._apps.sweep.store import LIVE, STOPPED
from funclora._apps.train.finish import write_adapter
from funclora._apps.train.loop import FINISHED, PATIENCE, Outcome
from funclora._apps.train.reading import write as write_settings
from funclora._apps.train.settings import RUN_FILE
from funclora._files.atomic import replace_files
from funclora._files.staging import staged_folder
from funclora.analysis._figure import colors_of

COLORS = mpl.colormaps["viridis"]  # the darker, the lower the loss
SPREAD = 0.05
AXES = ("lr", "rank", "alpha", "targets", "method", "init", "dropout", "beta", "seed")
NAMED = 6  # members with a colour
MOST_LINES = 20  # in a legend


def write(search: Search, save: int) -> None:
    """Write the results into the search's folder, and mark the search as done.

    Args:
        search: a finished search.
        save: number of the best adapters to write, each with the settings of a run that trains it alone.
    """
    store = search.store
    board = search.leaderboard()
    for row in board[:save]:
        member, progress = search.members[row["member"]], search.progress[row["member"]]
        if progress.files:
            name = f"{row['place']:02d}-member-{member.id:03d}"
            _write_member(search, member, store.folder / "adapters" / name)
    writers = {
        "learning_curves.png": partial(learning_curves, store.state.records),
        "learning_rates.png": partial(learning_rates, board),
        "parallel_coordinates.png": partial(parallel_coordinates, board),
        "leaderboard.json": partial(_write_json, board),
    }
    replace_files(store.folder, writers)
    for progress in search.progress.values():
        progress.file = progress.best_file = None
    store.state.done = True
    store.commit()


def _write_member(search: Search, member: Member, folder: Path) -> None:
    task, progress, records = search.task, search.progress[member.id], search.store.state.records
    settings = replace(
        task.member_settings(member),
        steps=search.settings.steps,
        eval_every=search.settings.every,
        out=search.store.folder / f"member-{member.id:03d}",
    )
    own = [record for record in records if record["member"] == member.id and record["heldout_loss"] is not None]
    best = None if progress.best_step is None else (progress.best_step, float(progress.best_loss or 0.0))
    outcome = Outcome(
        search.adapters(member.id),
        progress.best_step if search.settings.keeps_best and progress.best_step else progress.step,
        progress.step,
        {
            "train": [(record["step"], record["train_loss"]) for record in own],
            "validation": [(record["step"], record["heldout_loss"]) for record in own],
        },
        best,
        PATIENCE if progress.status == STOPPED else FINISHED if progress.status == LIVE else progress.status,
    )
    with staged_folder(folder, replace=True) as draft:
        write_adapter(draft, task.start(member), outcome, task.data, settings)
        write_settings(settings, draft / RUN_FILE)


def _write_json(value: Any, file: Path) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def learning_curves(records: list[dict[str, Any]], file: Path) -> None:
    """Draw held-out loss by step, one line for each member, the best ones in colours and with their options."""
    curves: dict[int, list[tuple[int, float]]] = {}
    options: dict[int, dict[str, Any]] = {}
    for record in records:
        options[record["member"]] = record
        if record["heldout_loss"] is not None:
            curves.setdefault(record["member"], []).append((record["step"], record["heldout_loss"]))
    order = sorted(curves, key=lambda i: (-curves[i][-1][0], curves[i][-1][1]))
    varied = _varied([*options.values()])
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for place, i in reversed([*enumerate(order)]):
        steps, losses = zip(*curves[i], strict=True)
        if place < NAMED:
            said = ", ".join(f"{name} {_short(options[i][name])}" for name in varied)
            look: dict[str, Any] = {"color": f"C{place}", "linewidth": 1.8, "label": f"{i}: {losses[-1]:.4g}; {said}"}
        else:
            look = {"color": "0.7", "linewidth": 0.8}
        axes.plot(steps, losses, marker="o", markersize=3, **look)
    if curves:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], title="member: last loss; options", fontsize=8, loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
        axes.set_ylim(*_sensible([loss for curve in curves.values() for _, loss in curve]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per label")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def learning_rates(board: list[dict[str, Any]], file: Path) -> None:
    """Draw held-out loss by learning rate, one line for each combination of the other options.

    Only members that were trained for equally many steps are compared: the longest-trained ones of each line. Seeds are
    averaged.
    """
    last = max((row["step"] for row in board if row["heldout_loss"] is not None), default=0)
    rows = [row for row in board if row["heldout_loss"] is not None and row["step"] == last]
    varied = [name for name in _varied(rows) if name not in ("lr", "seed")]
    lines: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: [str(row[name]).zfill(12) for name in varied]):
        line = lines.setdefault(tuple(row[name] for name in varied), {})
        line.setdefault(row["lr"], []).append(row["heldout_loss"])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = colors_of(len(lines))
    for color, (values, line) in zip(colors, lines.items(), strict=True):
        rates = sorted(line)
        means = [math.fsum(line[rate]) / len(line[rate]) for rate in rates]
        said = ", ".join(f"{name} {_short(value)}" for name, value in zip(varied, values, strict=True))
        axes.plot(rates, means, marker="o", markersize=4, color=color, label=said)
        axes.plot(rates[means.index(min(means))], min(means), marker="o", markersize=9, color=color, fillstyle="none")
    if rows:
        axes.set_ylim(*_sensible([loss for line in lines.values() for losses in line.values() for loss in losses]))
        axes.set_xscale("log")
    if varied and len(lines) <= MOST_LINES:
        axes.legend(fontsize=8)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats per label")
    axes.set_title(f"Members that were trained for {last} steps; a ring is the best rate of a line")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _varied(rows: list[dict[str, Any]]) -> list[str]:
    """The options that differ between rows."""
    return [name for name in AXES if len({row[name] for row in rows}) > 1]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensible(losses: list[float]) -> tuple[float, float]:
    """Limits of an axis, such that a diverging member does not compress all others into one line."""
    losses = sorted(losses)
    low, middle = losses[0], losses[len(losses) // 2]
    high = min(losses[-1], middle + 3 * (middle - low)) + 1e-3
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def parallel_coordinates(board: list[dict[str, Any]], file: Path) -> None:
    """Draw one vertical axis for each option that was varied and one for the loss, and a line for each member."""
    rows = [row for row in board if row["heldout_loss"] is not None]
    varied = _varied(board)
    names = [*varied, "heldout_loss"]
    places = {name: _places([row[name] for row in rows], name) for name in names}
    norm = _norm([row["heldout_loss"] for row in rows])
    figure, axes = plt.subplots(figsize=(2 + 1.7 * len(names), 5), layout="constrained")
    last = max((row["step"] for row in rows), default=0)
    for k, row in reversed([*enumerate(rows)]):
        # Lines through the same value are side by side, the best one lowest.
        aside = SPREAD * (k / max(1, len(rows) - 1) - 0.5)
        heights = [places[name][0][row[name]] + (aside if name != "heldout_loss" else 0) for name in names]
        finished = row["step"] == last
        axes.plot(
            *_curve(heights), color=COLORS(norm(row["heldout_loss"])), linewidth=1.8 if finished else 0.9,
            alpha=0.95 if finished else 0.5,
        )  # fmt: skip
    for x, name in enumerate(names):
        _axis(axes, x, places[name][1])
    axes.set_xticks(range(len(names)), [name.replace("heldout_loss", "held-out loss") for name in names])
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(names) - 0.4)
    axes.set_ylim(-0.04, 1.04)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("Thick lines: trained to the end; thin lines: dropped on the way")
    if rows:
        figure.colorbar(ScalarMappable(norm, COLORS), ax=axes, label="held-out loss, nats per label")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _curve(heights: list[float]) -> tuple[list[float], list[float]]:
    """A smooth line through a height on each axis: level where it crosses one, so that it can be followed."""
    xs, ys = [0.0], heights[:1]
    for x, (here, there) in enumerate(itertools.pairwise(heights)):
        for k in range(1, 21):
            u = k / 20
            xs.append(x + u)
            ys.append(here + (there - here) * (3 - 2 * u) * u * u)
    return xs, ys


def _axis(axes: Axes, x: int, ticks: list[tuple[float, str]]) -> None:
    axes.axvline(x, color="0.35", linewidth=0.9, zorder=3)
    for height, text in ticks:
        axes.plot([x - 0.02, x + 0.02], [height, height], color="0.35", linewidth=0.9, zorder=3)
        axes.text(
            x + 0.04, height, text, fontsize=8, va="center", zorder=4,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _places(values: list[Any], name: str) -> tuple[dict[Any, float], list[tuple[float, str]]]:
    """The height in [0, 1] of every value on its axis, and the axis's ticks."""
    distinct = sorted(set(values))
    if not distinct:
        return {}, []
    if name == "heldout_loss":
        norm = _norm(values)
        heights = {v: float(norm(v)) for v in distinct}
        ticks = [(k / 4, f"{norm.inverse(k / 4):.4g}") for k in range(5)]
        more = bool(distinct[-1] > norm.inverse(1.0))
        return heights, [*ticks[:-1], (1.0, ticks[-1][1] + " and more" * more)]
    if name != "seed" and len(distinct) > 8 and not isinstance(distinct[0], str):
        low, high = math.log(distinct[0]), math.log(distinct[-1])
        heights = {v: (math.log(v) - low) / (high - low) for v in distinct}
        return heights, [(k / 4, f"{math.exp(low + (high - low) * k / 4):.4g}") for k in range(5)]
    heights = {v: k / max(1, len(distinct) - 1) for k, v in enumerate(distinct)}
    return heights, [(height, v if isinstance(v, str) else f"{v:g}") for v, height in heights.items()]


def _norm(losses: list[float]) -> Normalize:
    """Colours from the best loss to one that a few bad members cannot push away."""
    losses = sorted(losses) or [0.0]
    low, middle = losses[0], losses[len(losses) * 3 // 4]
    return Normalize(low, middle if middle > low else low + 1e-3, clip=True)

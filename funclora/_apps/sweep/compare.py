"""Two searches side by side: their best members, and members that differ only in what the searches differ in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funclora._apps.sweep.report import AXES
from funclora._apps.sweep.store import CONFIG
from funclora._files.atomic import read_json
from funclora.errors import ConfigError, FormatError

BOARD = "leaderboard.json"


@dataclass(frozen=True)
class Side:
    """One search.

    Attributes:
        folder: its folder.
        members: how many it has.
        best_member: the first of its leaderboard.
        best_loss: held-out; None if no member has one.
        best_options: the member's options.
    """

    folder: str
    members: int
    best_member: int
    best_loss: float | None
    best_options: dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """Two searches.

    Attributes:
        sides: the searches.
        fixed: options that have one value in each search, and another in the other.
        settings: other settings that differ.
        differences: held-out loss of the second minus that of the first, for members that are equal in all other
            options and were trained for equally many steps.
    """

    sides: tuple[Side, Side]
    fixed: dict[str, tuple[Any, Any]]
    settings: dict[str, tuple[Any, Any]]
    differences: list[float]

    @property
    def mean(self) -> float | None:
        """The mean difference."""
        return math.fsum(self.differences) / len(self.differences) if self.differences else None

    def tree(self) -> dict[str, Any]:
        """All of it, by name."""
        one, two = self.sides
        return {
            "searches": [vars(one), vars(two)],
            "options": self.fixed,
            "settings": self.settings,
            "pairs": len(self.differences),
            "mean_difference": self.mean,
            "second_is_better": sum(x < 0 for x in self.differences),
            "differences": self.differences,
        }

    def words(self) -> list[str]:
        """The comparison of pairs, in lines."""
        one, two = (side.folder for side in self.sides)
        lines = [
            f"{name}: {first} in {one}, {second} in {two}"
            for name, (first, second) in {**self.fixed, **self.settings}.items()
        ]
        if not self.differences:
            return [*lines, "No members are equal in all other options and were trained for equally many steps."]
        better = sum(x < 0 for x in self.differences)
        low, high = min(self.differences), max(self.differences)
        pairs = (
            f"{len(self.differences)} pairs of members are equal in all other options: the loss in {two} minus that in "
            f"{one} is {self.mean:+.4f} on average, from {low:+.4f} to {high:+.4f}; {two} is better in {better}"
        )
        return [*lines, pairs]


def compared(folders: Sequence[Path]) -> Compared:
    """Compare two finished searches.

    Raises:
        ConfigError: there are not two of them, or they have different data or bases.
        FormatError: a folder contains no finished search.
    """
    if len(folders) != 2:
        raise ConfigError(f"--compare: expected two folders of searches, got {len(folders)}. Type: --compare A,B")
    configs = [_config(folder) for folder in folders]
    boards = [_board(folder) for folder in folders]
    for key, words in (("data", "data"), ("base", "base model"), ("rows", "held-out rows")):
        if configs[0].get(key) != configs[1].get(key):
            raise ConfigError(
                f"--compare: {folders[0]} and {folders[1]} have different {words}, so their losses cannot be compared."
            )
    ignored = ("members", "data", "base", "rows", "source", "model", "device")
    settings = {
        key: (configs[0].get(key), configs[1].get(key))
        for key in configs[0]
        if key not in ignored and configs[0].get(key) != configs[1].get(key)
    }
    values = [{name: {row[name] for row in board} for name in AXES} for board in boards]
    fixed = {
        name: (*values[0][name], *values[1][name])
        for name in AXES
        if len(values[0][name]) == len(values[1][name]) == 1 and values[0][name] != values[1][name]
    }
    by_options = [
        {(row["step"], *(row[name] for name in AXES if name not in fixed)): row["heldout_loss"] for row in board}
        for board in boards
    ]
    pairs = [(loss, by_options[1].get(key)) for key, loss in by_options[0].items()]
    differences = [other - loss for loss, other in pairs if loss is not None and other is not None]
    sides = tuple(_side(folder, board) for folder, board in zip(folders, boards, strict=True))
    return Compared((sides[0], sides[1]), {k: (v[0], v[1]) for k, v in fixed.items()}, settings, differences)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise FormatError(f"--compare: {folder} contains no {CONFIG}, so it is not the folder of a search.")
    return read_json(folder / CONFIG)


def _board(folder: Path) -> list[dict[str, Any]]:
    file = folder / BOARD
    if not file.is_file():
        raise FormatError(
            f"--compare: {folder} contains no {BOARD}: the search is not finished. Give its command again to finish it."
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        known = all({"member", "heldout_loss", "step", *AXES} <= row.keys() for row in rows)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{file} is broken: {error}.") from error
    if not rows or not known:
        raise FormatError(f"{file}: expected the members of a search with their options.")
    return list(rows)


def _side(folder: Path, board: list[dict[str, Any]]) -> Side:
    best = board[0]
    return Side(str(folder), len(board), best["member"], best["heldout_loss"], {name: best[name] for name in AXES})

"""Two adapters' folders side by side, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from funclora.analysis import ComparedUpdate, Similarity
from funclora.analysis._changes import Change, describe, paired
from funclora.analysis._compare import compared, joined
from funclora.analysis._data import Data
from funclora.analysis._subspace import similar
from funclora.cli._folders import AdapterFolder
from funclora.cli._inspect import facts, opened_base

SIDES = ("A", "B")


@dataclass(frozen=True)
class Side(Data):
    """One adapter's rule for one parameter: its kind, rank and scaling."""

    rule: str
    r: int | None
    scaling: float | None


@dataclass(frozen=True)
class DiffRow(Data):
    """One parameter.

    Attributes:
        sides: the rule of each adapter; None if it has none.
        update: norms, cosine and distance.
        similarity: φ of both adapters' factors A and factors B, by "A" and "B"; empty unless both have factors.
    """

    sides: tuple[Side | None, Side | None]
    update: ComparedUpdate
    similarity: dict[str, Similarity]


@dataclass(frozen=True)
class Difference(Data):
    """What `diff_folders` found.

    Attributes:
        folders: the adapters.
        base: the folder of the base model, if given.
        configs: the main fields of each configuration.
        norms: of both updates, all parameters together.
        cosine: of the updates as long vectors; a parameter without a rule has the update 0.
        relative_distance: ‖first − second‖ / ‖first‖, in the same way.
        rows: one for each parameter.
        notes: remarks for the user.
    """

    folders: tuple[str, str]
    base: str | None
    configs: tuple[dict[str, Any], dict[str, Any]]
    norms: tuple[float, float]
    cosine: float | None
    relative_distance: float | None
    rows: tuple[DiffRow, ...]
    notes: tuple[str, ...]

    def plot(self, file: Path) -> None:
        """Draw norms, cosines, distances and the mean of φ as a PNG."""
        from funclora.analysis._compare import plot_comparison
        from funclora.analysis._figure import mean_grid

        grids = []
        for of in SIDES:
            found = [grid for row in self.rows if of in row.similarity for grid in row.similarity[of].grids if grid]
            if found:
                grids.append((f"φ of the factors {of}, mean of {len(found)}", mean_grid(found)))
        plot_comparison(joined([row.update for row in self.rows]), file, grids, SIDES)


@torch.no_grad()
def diff_folders(
    first: Path, second: Path, base: Path | None = None, *, progress: Callable[[int, int], None] | None = None
) -> Difference:
    """Compare two PEFT folders.

    Args:
        first: a PEFT folder.
        second: another one.
        base: the folder of the model that both are for.
        progress: called with the number of finished weights and of all weights.

    Raises:
        FormatError: a folder is missing or broken, or does not fit the base.
        TargetError: a configuration does not fit the base.
        ParamsError: the adapters belong to different models.
        UnsupportedError: an adapter needs the base, which is not given; or transformers is needed and not installed.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    with opened_base(base, first, second) as model:
        one, two = AdapterFolder(first, model), AdapterFolder(second, model)
        params, layouts = (None, None) if model is None else (model.params, model.structure.model)
        total = len({*one.rules, *two.rules})
        rows = []
        for done, (a, b) in enumerate(paired(one.rules, two.rules, params, layouts), start=1):
            rows.append(DiffRow((_side(a), _side(b)), compared(a, b), _similarity(a, b)))
            if progress is not None:
                progress(done, total)
    whole = joined([row.update for row in rows])
    return Difference(
        folders=(str(first), str(second)),
        base=None if base is None else str(base),
        configs=(facts(one), facts(two)),
        norms=whole.norms,
        cosine=whole.cosine,
        relative_distance=whole.relative_distance,
        rows=tuple(rows),
        notes=(*one.notes, *two.notes),
    )


def _side(change: Change | None) -> Side | None:
    return None if change is None else Side(*describe(change.given))


def _similarity(one: Change | None, two: Change | None) -> dict[str, Similarity]:
    if one is None or two is None:
        return {}
    found = {"A": similar(one, two, "A", 64), "B": similar(one, two, "B", 64)}
    return {of: row for of, row in found.items() if row is not None}

"""`funclora diff`: two adapters side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._output import AsJson
from funclora.cli._report import Plot, bar, between, check_plot, number, short, tell, weights, words

if TYPE_CHECKING:
    from funclora.cli._diff import Difference


def diff(
    a: Annotated[Path, typer.Argument(help="First PEFT folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Second PEFT folder.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the base model; needed for the whole change of DoRA, experts, biases and modules_to_save.",
            show_default=False,
        ),
    ] = None,
    plot: Plot = None,
    json: AsJson = False,
) -> None:
    """Compare what two adapters do to each weight: targets, norms, angle, distance, and overlap of their subspaces.

    cosine is the cosine of the angle between the updates; dist. is ‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖. φ(A) and φ(B) measure how
    much of the smaller subspace of the factors is contained in the larger one, from 0 to 1 (LoRA paper, section 7.2);
    for random factors this is about r divided by the width of the layer. For DoRA without --base, s·B·A is compared.

    Examples:
        funclora diff adapters/math adapters/code
        funclora diff adapters/math adapters/code --base models/llama --plot diff.png
        funclora diff adapters/math adapters/math-v2 --json
    """
    check_plot(plot)
    with bar("weights") as progress:
        from funclora.cli._diff import diff_folders

        found = diff_folders(a, b, base, progress=progress)
    tell(found, plot, as_json=json, show=_print)


def _print(found: Difference, plot: Path | None) -> None:
    from rich.markup import escape

    from funclora._apps.train.console import Console

    console = Console()
    rules = [["–" if side is None else words(side.rule, side.r, None) for side in row.sides] for row in found.rows]
    kinds = [{rule[side] for rule in rules} - {"–"} for side in (0, 1)]
    alike = all(len(kind) == 1 for kind in kinds)  # then it is said once, and the names have more room
    for letter, folder, kind in zip("AB", found.folders, kinds, strict=True):
        console.print(
            escape(f"{letter}: {folder}{', ' + kind.pop() if alike else ''}"), highlight=False, soft_wrap=True
        )
    table = weights()
    for column in (*("AB" if not alike else ""), "‖ΔW_A‖", "‖ΔW_B‖", "cosine", "dist.", "φ(A)", "φ(B)"):
        table.add_column(column, justify="left" if column in ("A", "B") else "right")
    for row, rule in zip(found.rows, rules, strict=True):
        overlap = [between(row.similarity[of].whole) if of in row.similarity else "–" for of in ("A", "B")]
        numbers = (number(row.update.cosine, "+.3f"), number(row.update.relative_distance, ".3f"))
        norms = (number(norm) for norm in row.update.norms)
        table.add_row(escape(short(row.update.name)), *(rule if not alike else ()), *norms, *numbers, *overlap)
    console.print(table)
    only = [sum(row.sides[other] is None for row in found.rows) for other in (1, 0)]
    lines = [
        f"{len(found.rows) - sum(only)} weights in both, {only[0]} in A only, {only[1]} in B only",
        f"as a whole: ‖ΔW_A‖ {found.norms[0]:.4g}, ‖ΔW_B‖ {found.norms[1]:.4g}",
    ]
    lines[1] += f", cosine {number(found.cosine, '+.3f')}, distance {number(found.relative_distance, '.3f')}"
    if any(row.update.of == "s·B·A" for row in found.rows):
        lines.append("for DoRA, only s·B·A is compared. Give --base to compare the whole change.")
    if plot is not None:
        lines.append(f"wrote {plot}")
    console.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)

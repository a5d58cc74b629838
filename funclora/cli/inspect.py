"""`funclora inspect`: what is in the folder of an adapter or of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._output import AsJson
from funclora.cli._report import Plot, bar, between, check_plot, number, same, short, size, tell, weights, words

if TYPE_CHECKING:
    from rich.table import Table

    from funclora.analysis import Spectrum
    from funclora.cli._inspect import Inspection

MANY = 8  # names of a field that are shown


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="PEFT folder, folder of mlx-lm, LoRA file, or folder of a transformers model.", show_default=False
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model of the adapter or of the fine-tuned model.", show_default=False),
    ] = None,
    norms: Annotated[bool, typer.Option(help="Compute norms only; singular values take most of the time.")] = False,
    plot: Plot = None,
    json: AsJson = False,
) -> None:
    """Show targets, ranks, scalings, norms and effective ranks of an adapter or model, and the change of each weight.

    The share is ‖ΔW‖ / ‖W‖ and needs --base. The effective rank is exp of the entropy of the singular values (Roy and
    Vetterli 2007). JSON also contains the singular values and the stable rank ‖ΔW‖² / σ₁². For DoRA without --base, the
    numbers describe s·B·A only, not the whole change. For a model without --base, they describe the weights themselves.
    Weights are read one at a time.

    Examples:
        funclora inspect adapters/math
        funclora inspect adapters/math --base models/llama --plot math.png
        funclora inspect models/tuned --base models/llama --norms --json
    """
    check_plot(plot)
    with bar("weights") as progress:
        from funclora.cli._inspect import inspect_folder

        found = inspect_folder(path, base, singular=not norms, progress=progress)
    tell(found, plot, as_json=json, show=_print)


def _print(found: Inspection, plot: Path | None) -> None:
    from rich.markup import escape

    from funclora._apps.train.console import Console

    console = Console()
    if found.kind == "adapter":
        console.print(escape(_configuration(found.config)), highlight=False, soft_wrap=True)
    update = same(_update(row) for row in found.rows) if found.kind == "adapter" else ""
    if update:
        console.print(f"every weight: {update}", highlight=False)
    console.print(_table(found, with_update=found.kind == "adapter" and not update))
    unchanged = sum(row.of == "ΔW" and row.norm == 0 for row in found.rows)
    what = "‖W‖" if found.kind == "model" and found.base is None else "‖ΔW‖"
    share = "" if found.share is None else f", {found.share:.3%} of their ‖W‖"
    lines = [f"{len(found.rows)} weights, {found.parameters:,} parameters; {what} of all: {found.norm:.4g}{share}"]
    if unchanged:
        lines.append(f"{unchanged} of them do not change{' and are not shown' if found.kind == 'model' else ''}")
    if any(row.of == "s·B·A" for row in found.rows):
        lines.append("norms and ranks of DoRA describe s·B·A only. Give --base for the whole change.")
    if found.skipped:
        lines.append(f"left out, because they are integers: {', '.join(found.skipped)}")
    if plot is not None:
        lines.append(f"wrote {plot}")
    console.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)


def _update(row: Spectrum) -> str:
    return words(row.rule, row.r, row.scaling)


def _table(found: Inspection, *, with_update: bool) -> Table:
    from rich.markup import escape

    adapter, with_base = found.kind == "adapter", found.base is not None
    table = weights()
    if with_update:
        table.add_column("update")
    for column in ("shape", "‖ΔW‖" if adapter or with_base else "‖W‖", *(["share"] if with_base else []), "eff. rank"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        if adapter or not with_base or row.norm:
            update = [_update(row)] if with_update else []
            share = [number(row.share, ".2%")] if with_base else []
            ranks = between(row.effective_rank)
            table.add_row(escape(short(row.name)), *update, size(row.shape), number(row.norm), *share, ranks)
    return table


def _configuration(config: dict[str, Any]) -> str:
    """The fields that are set, in a line. The weights of many targets are in the table."""
    return ", ".join(
        f"{name}={f'({len(value)} names)' if isinstance(value, list | tuple) and len(value) > MANY else repr(value)}"
        for name, value in config.items()
        if value not in (None, False, {}, (), "none")
    )

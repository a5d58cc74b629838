"""`funclora extract`: an adapter from a fully fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._output import AsJson, print_json
from funclora.cli._report import bar

if TYPE_CHECKING:
    from funclora._apps.train.console import Console
    from funclora.io.hf.extract import ExtractReport


def extract(
    base: Annotated[Path, typer.Argument(help="Folder of the base model.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="Folder of the fine-tuned model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="New PEFT folder.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Rank of every update.", show_default=False)],
    targets: Annotated[
        Sequence[str] | None, typer.Option(help="Names of the modules to adapt.", show_default="all linear layers")
    ] = None,
    target_parameters: Annotated[
        Sequence[str] | None,
        typer.Option(help="Names of parameters to adapt, such as experts.down_proj.", show_default=False),
    ] = None,
    save_rest: Annotated[bool, typer.Option(help="Save all other parameters that differ in the adapter.")] = False,
    ignore_rest: Annotated[bool, typer.Option(help="Ignore all other parameters that differ.")] = False,
    niter: Annotated[
        int | None,
        typer.Option(
            min=0, help="Power iterations of a randomised decomposition.", show_default="an exact decomposition"
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Extract the low-rank adapter that is nearest to a fully fine-tuned model, with the error for each weight.

    Examples:
        funclora extract base tuned -o adapter --rank 16
        funclora extract base tuned -o adapter --rank 16 --targets q_proj,v_proj --save-rest
    """
    from funclora._apps.train.console import Console
    from funclora.errors import ConfigError

    if save_rest and ignore_rest:
        raise ConfigError("--save-rest and --ignore-rest exclude each other. Give one of them.")
    with bar("weights") as progress:
        from funclora.io.hf.extract import extract_adapter

        report = extract_adapter(
            base,
            tuned,
            out,
            r=rank,
            target_modules=targets or "all-linear",
            target_parameters=target_parameters,
            rest="save" if save_rest else "ignore" if ignore_rest else "error",
            niter=niter,
            progress=progress,
        )
    if json:
        print_json({"out": out, "r": rank} | asdict(report))
    else:
        _print(report, Console(), out)


def _print(report: ExtractReport, console: Console, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Error of the adapter", caption="residual: ‖Δ − B·A‖ / ‖Δ‖")
    table.add_column("weight")
    for column in ("shape", "‖Δ‖", "residual"):
        table.add_column(column, justify="right")
    for w in report.weights:
        table.add_row(escape(w.name), " × ".join(map(str, w.shape)), f"{w.norm:.4g}", f"{w.residual:.2%}")
    console.print(table)
    lines = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("targets that are equal in both models", report.same),
            ("saved completely", report.saved),
            ("different, but ignored", report.ignored),
        )
        if names
    ]
    console.print("\n".join(map(escape, [*lines, f"wrote {out}"])), highlight=False)

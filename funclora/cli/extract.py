"""`funclora extract`: an adapter from a model that was trained in full."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._output import AsJson, print_json
from funclora.cli._report import bar

if TYPE_CHECKING:
    from rich.console import Console

    from funclora.io.hf.extract import ExtractReport


def extract(
    base: Annotated[Path, typer.Argument(help="Folder of the base model.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="Folder of the model trained from it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PEFT folder to make.", show_default=False)],
    rank: Annotated[int, typer.Option(min=1, help="Rank of every update.", show_default=False)],
    targets: Annotated[
        list[str] | None, typer.Option(help="Name of modules that get an update; repeat for more. Else all linear.")
    ] = None,
    target_parameters: Annotated[
        list[str] | None,
        typer.Option(help="Name of parameters that get one (experts.down_proj); repeat for more."),
    ] = None,
    save_rest: Annotated[
        bool, typer.Option("--save-rest", help="Put what else differs into the adapter in full.")
    ] = False,
    ignore_rest: Annotated[bool, typer.Option("--ignore-rest", help="Leave out what else differs.")] = False,
    niter: Annotated[
        int | None, typer.Option(min=0, help="Power iterations of a randomised decomposition; else the exact one.")
    ] = None,
    json: AsJson = False,
) -> None:
    """The low-rank adapter that is nearest to a full fine-tuning, and what it leaves out of each weight.

    Examples:
        funclora extract base tuned -o adapter --rank 16
        funclora extract base tuned -o adapter --rank 16 --targets q_proj --targets v_proj --save-rest
    """
    from rich.console import Console

    from funclora.errors import ConfigError

    if save_rest and ignore_rest:
        raise ConfigError("--save-rest and --ignore-rest: give one of them.")
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

    table = Table(title="What the adapter leaves out", caption="residual: ‖Δ − B·A‖ / ‖Δ‖")
    table.add_column("weight")
    for column in ("shape", "‖Δ‖", "residual"):
        table.add_column(column, justify="right")
    for w in report.weights:
        table.add_row(escape(w.name), " × ".join(map(str, w.shape)), f"{w.norm:.4g}", f"{w.residual:.2%}")
    console.print(table)
    lines = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("targets that are the same in both models", report.same),
            ("saved in full", report.saved),
            ("differs, and is left out", report.ignored),
        )
        if names
    ]
    console.print("\n".join(map(escape, [*lines, f"wrote {out}"])), highlight=False)

"""`funclora eval`: the loss of saved adapters on texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from funclora._apps.train.console import Console
    from funclora.cli._losses import Losses


def evaluate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders, or folders of them.", show_default=False)],
    data: Annotated[
        Sequence[Path],
        typer.Option(help="Text files, or .jsonl files with a text in each line.", show_default=False),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a transformers model with its tokenizer.", show_default="the demo's model"),
    ] = None,
    field: Annotated[str, typer.Option(help="Name of the field with the text in a .jsonl file.")] = "text",
    context: Annotated[int, typer.Option(min=1, help="Number of tokens that the model sees at a time.")] = 256,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of passages from each file, spread over it.", show_default="all"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="Memory budget of a pass in MiB, without model and adapters.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1.")] = "cpu",
    json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and, with several files, heatmap.png.")] = None,
) -> None:
    """Evaluate saved adapters on texts, all of them in one pass: loss in nats per token, and perplexity.

    Every token of a text except the first is predicted once, from at most --context tokens before it. The first row is
    the base model. For the demo's model the tokens are bytes.

    Examples:
        funclora eval adapters --data heldout.txt
        funclora eval code prose --data code.jsonl --data prose.jsonl --model model --rows 64 --out results
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from funclora._apps.train.console import Console

    if out is not None and len(data) > 1:
        try:
            import matplotlib  # noqa: F401 -- before the work, not after
        except ModuleNotFoundError as error:
            from funclora.errors import UnsupportedError

            raise UnsupportedError(
                "--out draws a heatmap of several files, which needs matplotlib. Type: pip install 'funclora[demo]'"
            ) from error
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        from funclora.cli._losses import losses

        def progress(description: str, total: int) -> None:
            bar.update(task, total=total, advance=1, description=description)

        found = losses(
            adapters,
            data,
            model=model,
            field=field,
            context=context,
            rows=rows,
            memory=None if memory is None else memory << 20,
            device=device,
            progress=progress,
        )
        if out is not None:
            found.write(out)
    if json:
        print_json(found.tree())
    else:
        _report(found, Console())


def _report(found: Losses, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from funclora.cli._losses import perplexity

    tokens = " + ".join(f"{n:,}" for n in found.tokens)
    console.print(
        f"loss in nats per token / perplexity, on {tokens} tokens; the best of a file is bold", soft_wrap=True
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter")
    for file in found.files:
        table.add_column(escape(file), justify="right")
    best = [min(column) for column in zip(*found.losses, strict=True)]
    for name, row in zip(("(base)", *found.adapters), (found.base, *found.losses), strict=True):
        cells = [f"{loss:.3f} / {perplexity(loss):,.2f}" for loss in row]
        bold = [name != "(base)" and loss == least for loss, least in zip(row, best, strict=True)]
        table.add_row(escape(name), *(f"[bold]{c}[/]" if b else c for c, b in zip(cells, bold, strict=True)))
    console.print(table)

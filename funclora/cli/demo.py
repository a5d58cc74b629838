"""`funclora demo`: adapters for many domains of one frozen model, from training to merging."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from funclora.demo.run import Results


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all files.")] = Path("funclora-demo"),
    domains: Annotated[int, typer.Option(min=2, help="Number of domains.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each adapter.")] = 36,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of initial values and batches.")] = 0,
    json: AsJson = False,
) -> None:
    """Train LoRA and DoRA adapters of a small language model on the source code of Python's standard library.

    One adapter of each kind is trained for every domain, evaluated on all domains and saved as a PEFT folder. One of
    them is merged, and two continue a prompt. This takes two to three minutes on two cores; nothing is downloaded.

    Examples:
        funclora demo
        funclora demo --out quick --domains 3 --steps 9 --rank 4
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from funclora._apps.train.console import Console

    console = Console(stderr=json)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading", total=None)
        from funclora.demo.plot import gains
        from funclora.demo.run import DemoSettings, as_json, run

        settings = DemoSettings(domains=domains, steps=steps, r=rank, seed=seed)
        bar.update(task, total=settings.ticks)

        shown = ""

        def progress(description: str) -> None:
            nonlocal shown
            bar.update(task, advance=1, description=description)
            stage = description.rstrip("0123456789.")  # without the loss of the step
            if not console.is_terminal and stage != shown:  # where no bar is drawn, a line for each stage
                console.print(description)
                shown = stage

        results = run(out, settings, progress)
    gains(results, out / "heatmap.png")
    if json:
        print_json(as_json(results) | {"out": out})
        return
    _report(results, console)
    console.print(f"\nEverything is in [bold]{out}[/]: results.json, heatmap.png, merged.safetensors, adapters/")


def _report(results: Results, console: object) -> None:
    from rich.markup import escape
    from rich.table import Table

    from funclora._apps.train.console import Console

    assert isinstance(console, Console)
    table = Table(title="Loss on held-out text, nats per byte")
    for column in ("domain", "base", "LoRA", "DoRA", "trainable"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain in results.settings.names:
        own = {t.method: t for t in results.trained if t.domain == domain}
        losses = [results.base[domain], *(results.losses[t.name][domain] for t in own.values())]
        table.add_row(
            domain,
            *(f"{loss:.3f}" for loss in losses),
            " / ".join(f"{t.trainable:,}" for t in own.values()),
        )
    console.print(table)
    console.print(f"{len(results.trained)} adapters trained in {results.seconds:.1f} seconds, as one population.")
    best = sum(
        results.losses[t.name][t.domain]
        == min(results.losses[other.name][t.domain] for other in results.trained if other.method == t.method)
        for t in results.trained
    )
    console.print(f"{best} of {len(results.trained)} adapters are the best of their method on their own domain.")
    console.print(f"{results.merged}, merged into a plain model: logits differ by at most {results.merge_error:.1e}.")
    for name, text in results.continuations.items():
        console.print(f"\n[bold]{name}[/] continues {results.prompt!r}:\n{escape(text)}")

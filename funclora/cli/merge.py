"""`funclora merge`: adapters merged into a folder of a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from funclora.io.merge.merge import MergeReport

_DTYPES = ("float32", "float16", "bfloat16", "float64")


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of a transformers model.", show_default=False)],
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.", show_default=False)],
    weight: Annotated[
        list[float] | None, typer.Option(help="Factor of an adapter's update, one for each in order; else 1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=f"One of {', '.join(_DTYPES)}; else each tensor keeps its.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Size of a file at most, as 5GB; else the files are those of the base.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result again and compare it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, and write nothing.")] = False,
    json: AsJson = False,
) -> None:
    """Merge adapters into a model's folder, block by block: the model is never in memory.

    The result is a complete folder, with configuration and tokenizer, or nothing: it gets its name at the end.

    Examples:
        funclora merge model adapter -o merged --verify
        funclora merge model code prose -o merged --weight 0.7 --weight 0.3 --dtype bfloat16
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from funclora.errors import ConfigError

    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}.")
    columns = (
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the adapters", total=None)

        def progress(done: int, total: int) -> None:
            words = "merging" if done < total else "checking" if verify else "finishing"
            bar.update(task, completed=done, total=total, description=words)

        import torch

        from funclora.io.merge.merge import merge_checkpoint

        report = merge_checkpoint(
            base,
            adapters,
            out,
            weights=weight or None,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_size=max_shard_size,
            verify=verify,
            dry_run=dry_run,
            progress=progress,
        )
    if json:
        print_json(_plain(report, out, dry_run=dry_run))
    else:
        _print(report, Console(), out, dry_run=dry_run)


def _plain(report: MergeReport, out: Path, *, dry_run: bool) -> dict[str, Any]:
    checked = report.verification
    return {
        "out": None if dry_run else str(out),
        "model": report.model,
        "bytes": report.nbytes,
        "weights": [
            {
                "name": w.name,
                "keys": list(w.keys),
                "shape": list(w.shape),
                "change": w.change,
                "before": str(w.before).removeprefix("torch."),
                "after": str(w.after).removeprefix("torch."),
                "bytes": w.nbytes,
            }
            for w in report.weights
        ],
        "unchanged": report.unchanged,
        "files": report.files,
        "untied": list(report.untied),
        "carried": list(report.carried),
        "skipped": list(report.skipped),
        "verification": None
        if checked is None
        else {
            "deviations": dict(checked.deviations),
            "unchanged": checked.unchanged,
            "logits": checked.logits,
            "skipped": checked.skipped,
        },
    }


def _print(report: MergeReport, console: Console, out: Path, *, dry_run: bool) -> None:
    from rich.markup import escape

    from funclora.cli._report import same, short, size, weights

    checked = report.verification
    every = same(w.change for w in report.weights)
    console.print(
        f"{escape(report.model)}: what {'would change' if dry_run else 'changed'}"
        + (f", each weight by {escape(every)}" if every else ""),
        highlight=False,
        soft_wrap=True,
    )
    table = weights()
    if not every:
        table.add_column("change")
    for column in ("shape", "dtype", "MB", *(["deviation"] if checked is not None else [])):
        table.add_column(column, justify="left" if column == "dtype" else "right", no_wrap=True)
    for w in report.weights:
        before, after = (str(dtype).removeprefix("torch.") for dtype in (w.before, w.after))
        cells = [
            escape(short(w.name)),
            *([] if every else [escape(w.change)]),
            size(w.shape),
            after if before == after else f"{before} → {after}",
            f"{w.nbytes / 1e6:,.1f}",
        ]
        if checked is not None:
            cells.append(f"{checked.deviations[w.name]:.3f}")
        table.add_row(*cells)
    console.print(table)
    changed = sum(w.nbytes for w in report.weights)
    lines = [
        f"{len(report.weights)} weights, {changed / 1e9:,.3f} of {report.nbytes / 1e9:,.3f} GB",
        f"{report.unchanged} other tensors as they are; {len(report.files) + len(report.carried)} files",
    ]
    if report.untied:
        lines.append(f"no longer tied (tie_word_embeddings is false): {', '.join(report.untied)}")
    if report.skipped:
        lines.append(f"not carried over: {', '.join(report.skipped)}")
    if checked is not None:
        worst = max(checked.deviations.values())
        lines.append(f"largest deviation from float64: {worst:.3f} units of rounding; all other tensors are the base's")
        lines.append(
            f"logits on a probe input: not compared, {checked.skipped}"
            if checked.logits is None
            else f"logits on a probe input: within {checked.logits:.2e} of the largest, of the base under the adapters"
        )
    lines.append("nothing was written" if dry_run else f"wrote {out}")
    console.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)

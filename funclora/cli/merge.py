"""`funclora merge`: adapters merged into a folder of a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._output import AsJson, print_json

if TYPE_CHECKING:
    from funclora._apps.train.console import Console
    from funclora.io.merge.merge import MergeReport


class Dtype(str, Enum):
    """The dtype of every tensor of the result."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of a transformers model.", show_default=False)],
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder.", show_default=False)],
    weights: Annotated[
        Sequence[float] | None,
        typer.Option("--weights", "--weight", help="One weight for each adapter's update.", show_default="1 for each"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the result.", show_default="each tensor's own dtype")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Maximum size of a file, such as 5GB.", show_default="the files of the base")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the result again and compare it.")] = False,
    fsync: Annotated[
        bool, typer.Option(help="Wait until the result is on the disk, and safe from a power failure.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Show what would change, and write nothing.")] = False,
    json: AsJson = False,
) -> None:
    """Merge adapters into the folder of a model, block by block; the whole model is never in memory.

    The result is a complete folder with configuration and tokenizer. It gets its name at the end, so a merge that fails
    leaves nothing behind.

    Examples:
        funclora merge model adapter -o merged --verify
        funclora merge model code prose -o merged --weights 0.7,0.3 --dtype bfloat16
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from funclora._apps.train.console import Console

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
            weights=weights,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            max_shard_size=max_shard_size,
            verify=verify,
            fsync=fsync,
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
        "left_out": list(report.left_out),
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
        f"{report.unchanged} other tensors unchanged; {len(report.files) + len(report.carried)} files",
    ]
    if report.untied:
        lines.append(f"no longer tied (tie_word_embeddings is false): {', '.join(report.untied)}")
    if report.left_out:
        lines.append(f"tensors that a {report.model} does not have: {', '.join(report.left_out)}")
    if report.skipped:
        lines.append(f"not copied: {', '.join(report.skipped)}")
    if checked is not None:
        worst = max(checked.deviations.values())
        lines.append(f"largest deviation from float64: {worst:.3f} units of rounding; other tensors equal the base's")
        lines.append(
            f"logits on a probe input: not compared, {checked.skipped}"
            if checked.logits is None
            else f"logits on a probe input: relative difference {checked.logits:.2e} from the base with the adapters"
        )
    lines.append("nothing was written" if dry_run else f"wrote {out}")
    console.print("\n".join(map(escape, lines)), highlight=False, soft_wrap=True)

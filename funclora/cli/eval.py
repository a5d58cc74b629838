"""`funclora eval`: scores of saved adapters, with the loss that they were trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._base import Device, Dtype, Quantize, Threshold
from funclora.cli._output import AsJson, print_json
from funclora.cli._settings import setting
from funclora.distributed._ranks import is_first

if TYPE_CHECKING:
    from funclora._apps.train.console import Console
    from funclora._apps.train.scores import Score
    from funclora.cli._scores import Scores

# What the table shows of a score, and how.
SHOWN = {
    "loss": "{:.3f}",
    "perplexity": "{:,.2f}",
    "accuracy": "{:.1%}",
    "micro_f1": "{:.1%}",
    "macro_f1": "{:.1%}",
    "span_f1": "{:.1%}",
    "recall_at_1": "{:.1%}",
    "recall_at_10": "{:.1%}",
    "pearson": "{:.3f}",
    "spearman": "{:.3f}",
    "rewards/accuracies": "{:.1%}",
    "rewards/margins": "{:.3f}",
}
WORDS = {
    "loss": "loss in nats per {}", "micro_f1": "micro F1", "macro_f1": "macro F1", "span_f1": "F1 of spans",
    "pearson": "Pearson", "spearman": "Spearman", "recall_at_1": "recall at 1", "recall_at_10": "recall at 10",
    "rewards/accuracies": "accuracy", "rewards/margins": "margin",
}  # fmt: skip


def evaluate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders, or folders of them.", show_default=False)],
    data: Annotated[
        Sequence[Path], typer.Option(help="Files of texts or records, as for training.", show_default=False)
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a transformers model with its tokenizer.", show_default="the demo's model"),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of the adapters.", show_default="that they were trained for")
    ] = None,
    fields: Annotated[Sequence[str] | None, setting("fields")] = None,
    roles: Annotated[Sequence[str] | None, setting("roles")] = None,
    text_field: Annotated[str | None, setting("text_field")] = None,
    label_field: Annotated[str | None, setting("label_field")] = None,
    problem: Annotated[str | None, setting("problem")] = None,
    threshold: Threshold = 0.5,
    train_on: Annotated[str | None, setting("train_on")] = None,
    turns: Annotated[str | None, setting("turns")] = None,
    chat_template: Annotated[Path | None, setting("chat_template")] = None,
    loss: Annotated[str | None, setting("loss")] = None,
    beta: Annotated[str | None, setting("beta")] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What preferences are compared with: the base, or a PEFT folder.", show_default="the base"),
    ] = None,
    label_smoothing: Annotated[str | None, setting("label_smoothing")] = None,
    gamma: Annotated[str | None, setting("gamma")] = None,
    desirable: Annotated[str | None, setting("desirable")] = None,
    undesirable: Annotated[str | None, setting("undesirable")] = None,
    context: Annotated[
        int, typer.Option(min=1, help="Maximum length of an example in tokens; longer plain texts are split.")
    ] = 512,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of examples from each file, spread over it.", show_default="all"),
    ] = None,
    memory: Annotated[
        int | None, typer.Option(min=1, help="Memory budget of a pass in MiB, without model and adapters.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the base weights; auto keeps the folder's.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="Quantise the base weights.")] = Quantize.none,
    device: Device = "auto",
    json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Folder for eval.json and pictures.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing eval.json in --out.")] = False,
) -> None:
    """Score saved adapters on files, with the loss that they were trained on: all adapters in one pass over the base.

    Data is read as for training: the loss of a chat or of a prompt with its completion is that of the answers. Texts
    have loss and perplexity; classes also have accuracy and F1, tags the F1 of their spans, texts with several classes
    micro and macro F1, and numbers Pearson's and Spearman's correlations. The first row is the base model, if it has a
    head for the task. With --task preference, two answers are compared: is the better one also likelier than it was
    for the base, or for the adapter of --reference? --out gets eval.json, heatmap.png for several files, and
    confusion.png for classes.

    Examples:
        funclora eval adapters --data heldout.txt
        funclora eval english french --model model --data chats.jsonl,pairs.jsonl --out results
        funclora eval preferred --task preference --data pairs.jsonl --model model --reference tuned/adapter
        funclora eval code prose --data code.jsonl --data prose.jsonl --model model --rows 64
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from funclora._apps.train.console import Console

    out = out if is_first() else None
    if out is not None:
        from funclora.analysis._figure import needs_matplotlib

        needs_matplotlib()  # before the work, not after
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with (
        contextlib.nullcontext() if out is None else _claimed(out, overwrite=overwrite),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        shown = bar.add_task("loading", total=None)
        from funclora._apps.train.reading import read
        from funclora._apps.train.tasks import trained_task
        from funclora.cli._adapters import adapter_folders
        from funclora.cli._scores import evaluated

        def progress(description: str, total: int) -> None:
            bar.update(shown, total=total, advance=1, description=description)

        folders = adapter_folders(adapters)
        given: dict[str, Any] = {
            "model": model, "task": trained_task(folders, model, task), "context": context, "dtype": dtype.value,
            "quantize": quantize.value, "device": device, "data": list(data[:1]),
        }  # fmt: skip
        read_as = {
            "fields": fields, "roles": roles, "text_field": text_field, "label_field": label_field, "problem": problem,
            "train_on": train_on, "turns": turns, "chat_template": chat_template, "loss": loss, "beta": beta,
            "reference": reference, "label_smoothing": label_smoothing, "gamma": gamma, "desirable": desirable,
            "undesirable": undesirable,
        }  # fmt: skip
        given |= {key: value for key, value in read_as.items() if value is not None}
        found = evaluated(
            folders,
            data,
            read(None, given),
            rows=rows,
            memory=None if memory is None else memory << 20,
            threshold=threshold,
            progress=progress,
        )
        if out is not None:
            found.write(out)
    if json:
        print_json(found.tree())
    else:
        _report(found, Console())


@contextlib.contextmanager
def _claimed(out: Path, *, overwrite: bool) -> Iterator[None]:
    """Keep other processes from the folder, before anything is computed for it."""
    from funclora._files.locks import claimed_folder
    from funclora.cli._scores import EVAL_FILE
    from funclora.errors import ConfigError

    busy = ConfigError(f"--out: another process is using {out}. Wait for it to end, or give another folder.")
    with claimed_folder(out, busy):
        if (out / EVAL_FILE).exists() and not overwrite:
            raise ConfigError(f"--out: {out} already contains {EVAL_FILE}. Give another folder, or --overwrite.")
        yield


def _report(found: Scores, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    first = found.scores[0]
    counted = " + ".join(f"{score.labels:,}" for score in first)
    metrics = [name for name in SHOWN if name in found.metrics]
    unit = found.unit
    words = " / ".join(WORDS.get(name, name).format(unit) for name in metrics)
    if unit in ("pair", "answer"):
        words = words.replace("loss in nats per", "loss of each")
    if "pearson" in metrics:
        words = words.replace("loss in nats per label", "mean squared error")
    console.print(
        f"{words}, on {counted} {unit}s; the lowest loss on each file is bold", soft_wrap=True, highlight=False
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter")
    for file in found.files:
        table.add_column(escape(file), justify="right")
    best = [min(score.values["loss"] for score in column) for column in zip(*found.scores, strict=True)]
    for name, row in found.rows().items():
        cells = [" / ".join(SHOWN[metric].format(score.values[metric]) for metric in metrics) for score in row]
        bold = [name != "(base)" and _loss(score) == least for score, least in zip(row, best, strict=True)]
        table.add_row(escape(name), *(f"[bold]{c}[/]" if b else c for c, b in zip(cells, bold, strict=True)))
    console.print(table)
    for file, notes in found.notes.items():
        for note in notes:
            console.print(f"{file}: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _loss(score: Score) -> float:
    return score.values["loss"]

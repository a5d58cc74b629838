"""`funclora predict`: classes and tags of the records of a file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._base import Device, Dtype, Quantize, Threshold
from funclora.cli._output import AsJson, print_json, say_text
from funclora.cli._report import Plot, check_plot
from funclora.cli._settings import setting
from funclora.distributed._ranks import is_first

if TYPE_CHECKING:
    from funclora._apps.train.scores import Score
    from funclora._apps.train.settings import Settings


def predict(
    data: Annotated[Path, typer.Option(help="File of records to classify.", show_default=False)],
    adapters: Annotated[
        list[Path] | None, typer.Argument(help="PEFT folders, or folders of them.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a transformers model with its tokenizer.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter for records that name none.", show_default="the only adapter given, or the base model"
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of the adapters.", show_default="that they were trained for")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Name of the field with the text.", show_default="text")
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(help="Name of the field with the right class or classes, if there is one.", show_default="label"),
    ] = None,
    fields: Annotated[Sequence[str] | None, setting("fields")] = None,
    problem: Annotated[str | None, setting("problem")] = None,
    threshold: Threshold = 0.5,
    context: Annotated[int, typer.Option(min=1, help="Maximum length of a text in tokens.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Number of records that run together.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the base weights; auto keeps the folder's.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="Quantise the base weights.")] = Quantize.none,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the predictions.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file --out.")] = False,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="File for the embeddings of the texts: .npy, .safetensors or .jsonl.", show_default=False),
    ] = None,
    plot: Plot = None,
    json: AsJson = False,
) -> None:
    """Classify texts, tag their words, or embed them; each row of a batch can use a different adapter.

    A record has a text, perhaps a second one under text_pair, or words under tokens, and optionally adapter; null is
    the base model. The result is the record with the predicted class and the scores of all classes, with all classes
    from --threshold on, with the number of a regression, or with the predicted tags and the score of each. Where
    records have the right answer too, its metrics are computed: accuracy, F1 by class and, for tags such as B-PER, of
    spans, or Pearson's and Spearman's correlations. --plot draws how often each class was predicted as which. For
    adapters that embed texts, --embeddings gets a row for each record: as a table, or in .jsonl the records with it.

    Examples:
        funclora predict adapter --model model --data reviews.jsonl --out predicted.jsonl
        funclora predict topics moods --model model --data mixed.jsonl --plot confusion.png
        funclora predict search --model model --data passages.jsonl --embeddings passages.npy
    """
    out, plot = (out, plot) if is_first() else (None, None)
    check_plot(plot)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from funclora._apps.train.console import Console
    from funclora._apps.train.reading import read
    from funclora._apps.train.settings import EMBEDDING, SINGLE
    from funclora.cli._adapters import adapter_folders
    from funclora.cli._converse import BASE
    from funclora.cli._output import claimed_out, write_lines
    from funclora.cli._predict import Predictor, task_of
    from funclora.cli._prompts import known
    from funclora.errors import ConfigError

    folders = adapter_folders(adapters or [])
    default = known(adapter, list(folders), "--adapter")
    if default is None and len(folders) == 1:
        (default,) = folders
    given: dict[str, Any] = {
        "model": model, "data": [data], "task": task_of(folders, model, task), "context": context, "dtype": dtype.value,
        "quantize": quantize.value, "device": device,
    }  # fmt: skip
    read_as = {"text_field": text_field, "label_field": label_field, "fields": fields, "problem": problem}
    given |= {key: value for key, value in read_as.items() if value is not None}
    if (given["task"] == EMBEDDING) != (embeddings is not None):
        raise ConfigError(
            f"--embeddings: the task is {given['task']}. "
            + ("Give a file for the embeddings." if embeddings is None else "Leave it out.")
        )
    if embeddings is not None:
        if out is not None or plot is not None:
            raise ConfigError(f"--{'out' if out else 'plot'}: with --embeddings nothing is classified. Leave it out.")
        _embed(folders, read(None, given), data, default, embeddings, batch, overwrite=overwrite, as_json=json)
        return
    with contextlib.nullcontext() if out is None else claimed_out(out, overwrite=overwrite):
        predictor = Predictor(folders, read(None, given), threshold)
        if plot is not None and predictor.problem != SINGLE:
            raise ConfigError(f"--plot: draws single classes, and the problem is {predictor.problem}. Leave it out.")
        rows = predictor.rows(data, default)
        if folders and not {row.adapter for row in rows} & folders.keys():
            raise ConfigError(f"{data}: no record names one of the given adapters: {', '.join(folders)}.")
        labelled = sum(row.right is not None for row in rows)
        if plot is not None and not labelled:
            raise ConfigError(f"--plot: no record of {data} has the right class under --label-field. Leave it out.")
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            shown = bar.add_task("", total=len(rows))
            found = predictor.predict(rows, batch, lambda n: bar.update(shown, advance=n))
        results = [predictor.result(row, each) for row, each in zip(rows, found, strict=True)]
        if out is not None:
            write_lines(out, results)
    score = predictor.agreement(rows, found)
    if plot is not None and score is not None:
        from funclora.cli._confusion import plot_confusions

        plot_confusions([(f"{labelled:,} of {len(rows):,} records", score.confusion)], predictor.classes, plot)
    facts: dict[str, Any] = {
        "model": model, "classes": predictor.classes, "records": len(rows), "compared": labelled,
        "metrics": None if score is None else _metrics(score), "notes": predictor.notes.lines(),
    }  # fmt: skip
    if json:
        print_json(facts | ({"results": results} if out is None else {"out": out}))
        return
    if out is None:
        for row, result in zip(rows, results, strict=True):
            typer.secho(f"{row.record.where} under {row.adapter or BASE}", bold=True)
            say_text(_words(row.words, result))
    else:
        typer.echo(f"{out}: {len(rows):,} records")
    if score is not None:
        _report(score, labelled, len(rows))
    for note in facts["notes"]:
        typer.echo(note)


def _embed(
    folders: Mapping[str, Path],
    settings: Settings,
    data: Path,
    default: str | None,
    out: Path,
    batch: int,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the embeddings of the texts of a file."""
    from funclora.cli._output import claimed_out
    from funclora.cli._vectors import check_suffix, vectors, write

    check_suffix(out)
    first = is_first()
    with claimed_out(out, overwrite=overwrite, option="--embeddings") if first else contextlib.nullcontext():
        found = vectors(folders, settings, data, default, batch)
        if first:
            write(out, found)
    n, size = found.values.shape
    if as_json:
        print_json({"embeddings": out, "records": n, "size": size, "notes": found.notes})
        return
    typer.echo(f"{out}: {n:,} embeddings of {size:,} numbers")
    for note in found.notes:
        typer.echo(note)


def _metrics(score: Score) -> dict[str, Any]:
    more = {"f1": score.by_class, "f1_of_spans": score.by_span, "confusion": score.confusion}
    return {**score.values, **{name: value for name, value in more.items() if value}}


def _words(words: Sequence[str], result: dict[str, Any]) -> str:
    """A prediction in a line."""
    predicted, scores = result["predicted"], result.get("scores")
    if predicted is None:
        return "?"
    if scores is None:
        return ", ".join(f"{number:.4g}" for number in (predicted if isinstance(predicted, list) else [predicted]))
    if isinstance(scores, list):
        return " ".join(f"{word}/{tag or '?'}" for word, tag in zip(words, predicted, strict=True))
    return ", ".join(
        f"{name} {scores[name]:.1%}" for name in (predicted if isinstance(predicted, list) else [predicted])
    )


def _report(score: Score, labelled: int, records: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from funclora._apps.train.console import Console

    console = Console()
    numbers = "pearson" in score.values
    named = ", ".join(
        f"{name.replace('_', ' ').replace('f1', 'F1')} {f'{value:.3f}' if numbers else f'{value:.1%}'}"
        for name, value in score.values.items()
    )
    what = "numbers" if numbers else "classes"
    console.print(
        f"{labelled:,} of {records:,} records have the right {what}: {named}", soft_wrap=True, highlight=False
    )
    if numbers:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("span" if score.by_span else "class")
    table.add_column("F1", justify="right")
    for name, value in (score.by_span or score.by_class).items():
        table.add_row(escape(name), f"{value:.1%}")
    console.print(table)

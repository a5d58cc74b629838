"""The answers of `funclora generate` to prompts that are all known: printed as they come, or written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from funclora._apps.train.base import Base
from funclora.cli._converse import BASE, write_text
from funclora.cli._generate import Answer, Generator, Sampling
from funclora.cli._output import print_json, say_text, write_lines
from funclora.cli._prompts import Prompt


def answer_one(generator: Generator, prompt: Prompt, base: Base, sampling: Sampling, *, json: bool) -> None:
    """The answer to one prompt: printed as it comes, or as JSON."""
    if json:
        ((answer,),) = generator.batches([prompt], 1)
        print_json({"model": base.name, "sampling": asdict(sampling), **_result(prompt, answer)})
        return
    generator.stream(prompt, write_text)
    write_text("\n")


def answer_all(
    generator: Generator,
    prompts: list[Prompt],
    rows: int,
    out: Path | None,
    base: Base,
    sampling: Sampling,
    *,
    json: bool,
) -> None:
    """The answers to several prompts: printed as they come, or as one JSON value, or written."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from funclora._apps.train.console import Console

    quiet = json or out is not None
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console, results = Console(stderr=True), []
    with Progress(*columns, console=console, transient=True, disable=not (quiet and console.is_terminal)) as bar:
        task = bar.add_task("generating", total=len(prompts))
        waiting = iter(prompts)
        for answers in generator.batches(prompts, rows):
            for answer in answers:
                prompt = next(waiting)
                results.append(_result(prompt, answer))
                if not quiet:
                    typer.secho(f"{prompt.where} under {prompt.adapter or BASE}", bold=True)
                    say_text(answer.text)
            bar.update(task, advance=len(answers))
    facts = {
        "model": base.name,
        "sampling": asdict(sampling),
        "prompts": len(results),
        "tokens": sum(result["tokens"] for result in results),
    }
    if out is not None:
        write_lines(out, results)
        facts["out"] = out
    if json:
        print_json(facts if out is not None else facts | {"results": results})
    elif out is not None:
        typer.echo(f"{out}: {facts['prompts']} answers, {facts['tokens']:,} tokens")


def _result(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        **prompt.fields,
        "adapter": prompt.adapter,
        "completion": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
    }

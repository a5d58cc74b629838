"""`funclora generate`: continues prompts with a model and adapters."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funclora.cli._converse import BASE, converse, refuse_bytes, spoken, write_text
from funclora.cli._output import AsJson, json_line, print_json, say_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from funclora._apps.train.base import Base
    from funclora._apps.train.settings import Settings
    from funclora.cli._generate import Answer, Generator, Sampling
    from funclora.cli._prompts import Prompt, Reader
# Logits divided by less would be infinite, or nearly so.
LEAST = 1e-3


class Dtype(str, Enum):
    """The dtype of the base weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(str, Enum):
    """How the base weights are quantised."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


def generate(
    adapters: Annotated[
        list[Path] | None, typer.Argument(help="PEFT folders, or folders of them.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a transformers model with its tokenizer.", show_default="the demo's model"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Continue this prompt, then exit.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Continue the prompt or messages of each record in this file."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Adapter for prompts that name none.", show_default="the only adapter given, or the base model"
        ),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Treat prompts as user messages, using the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens of this total probability."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many of the most likely tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samples.", show_default="0")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Number of records of --file that run together.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the base weights; auto keeps the folder's.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="Quantise the base weights.")] = Quantize.none,
    device: Annotated[str, typer.Option(help="Device to compute on: cpu, cuda, cuda:1.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the answers to --file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file --out.")] = False,
    json: AsJson = False,
) -> None:
    """Continue prompts with a model and adapters; each row of a batch can use a different adapter.

    Without --prompt and --file, the command asks for prompts, one per line, until the end of the input. /adapter NAME
    switches to another adapter, /base to the base model; Ctrl-C stops an answer.

    A record of --file has a field prompt or messages, and optionally adapter; null is the base model. With --out, each
    record is written with its completion, its number of tokens, and whether the model ended it.

    Examples:
        funclora generate adapter --model model --prompt "Once upon a time"
        funclora generate adapters --model model --file prompts.jsonl --out answers.jsonl
        funclora generate adapter --model model --chat --temperature 0.7 --top-p 0.9
    """
    from funclora.errors import ConfigError

    _check_options(prompt=prompt, file=file, out=out, overwrite=overwrite, chat=chat, json=json)
    _check_sampling(temperature, top_p, top_k, seed)
    from funclora.cli._adapters import adapter_folders
    from funclora.cli._prompts import known, read_prompts

    folders = adapter_folders(adapters or [])
    default = known(adapter, list(folders), "--adapter")
    if default is None and len(folders) == 1:
        (default,) = folders
    if default is None and folders and prompt is not None:
        raise ConfigError(f"--prompt: several adapters are given. Choose one with --adapter: {', '.join(folders)}.")

    from funclora.cli._generate import Generator, Sampling

    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed or 0)
    settings, reader = _reader(model, dtype.value, quantize.value, device)
    # What is asked is looked at before the weights are loaded, which can take minutes.
    prompts = []
    if file is not None:
        prompts = read_prompts(file, reader, list(folders), default)
        if folders and not {each.adapter for each in prompts} & folders.keys():
            raise ConfigError(f"{file}: no record names one of the given adapters: {', '.join(folders)}.")
    elif prompt is not None:
        prompts = [_asked(reader, prompt, default, "--prompt", chat=chat)]
    from funclora._apps.train.base import load_base

    base = load_base(settings, reader.tokenizer)
    generator = Generator(base, folders, sampling, model)
    if file is not None:
        _answer_file(generator, prompts, batch, out, base, sampling, json=json)
    elif prompt is not None:
        (row,) = prompts
        if json:
            ((answer,),) = generator.batches([row], 1)
            print_json({"model": base.name, "sampling": asdict(sampling), **_result(row, answer)})
        else:
            generator.stream(row, write_text)
            write_text("\n")
    else:
        converse(generator, reader, default, list(folders), base, chat=chat)


def _check_options(
    *, prompt: str | None, file: Path | None, out: Path | None, overwrite: bool, chat: bool, json: bool
) -> None:
    """Raise `ConfigError` for options that contradict each other."""
    from funclora.errors import ConfigError

    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --file exclude each other. Give one of them.")
    if out is not None and file is None:
        raise ConfigError("--out can only be used with --file. Leave it out, or give a file of prompts.")
    if chat and file is not None:
        raise ConfigError(
            '--chat cannot be used with --file. For chats, give its records "messages" in place of "prompt".'
        )
    if json and prompt is None and file is None:
        raise ConfigError("--json cannot be used in a conversation. Give --prompt or --file.")
    if out is not None and out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} already exists. Give another file, or --overwrite.")


def _check_sampling(temperature: float, top_p: float | None, top_k: int | None, seed: int | None) -> None:
    """Raise `ConfigError` for invalid sampling options."""
    from funclora.errors import ConfigError

    if 0 < temperature < LEAST:
        raise ConfigError(f"--temperature: expected 0, or at least {LEAST}, got {temperature!r}. Use 0 instead.")
    if seed is not None and not -(1 << 63) <= seed < 1 << 63:
        raise ConfigError(f"--seed: expected a number of 64 bits, got {seed}.")
    if temperature == 0:
        for name, value in (("--top-p", top_p), ("--top-k", top_k), ("--seed", seed)):
            if value is not None:
                raise ConfigError(f"{name} needs sampling. Give a --temperature above 0, or leave it out.")
    if top_p == 0:
        raise ConfigError("--top-p: expected a number above 0. To always take the most likely token, leave it out.")


def _reader(model: Path | None, dtype: str, quantize: str, device: str) -> tuple[Settings, Reader]:
    """How the model is loaded, and what makes prompts for it."""
    from funclora._apps.train.base import load_tokenizer, vocabulary
    from funclora._apps.train.folder import empty_model, load_config, longest_context
    from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, Settings
    from funclora.cli._prompts import Reader

    task = SEQ2SEQ if model is not None and load_config(model).is_encoder_decoder else CAUSAL
    settings = Settings(model=model, task=task, dtype=dtype, quantize=quantize, device=device)
    tokenizer = load_tokenizer(settings)
    if model is None:  # which sees the end of what is too long for it
        return settings, Reader(tokenizer, len(tokenizer), None, decoder=True)
    structure = empty_model(model, task)
    return settings, Reader(tokenizer, vocabulary(structure), longest_context(structure), decoder=task == CAUSAL)


def _asked(reader: Reader, text: str, adapter: str | None, where: str, *, chat: bool) -> Prompt:
    refuse_bytes(text, where)
    if chat:
        return reader.messages(spoken([{"role": "user", "content": text}], where), adapter)
    return reader.text(text, adapter, where)


def _result(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    return {
        **prompt.fields,
        "adapter": prompt.adapter,
        "completion": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
    }


def _answer_file(
    generator: Generator,
    prompts: list[Prompt],
    rows: int,
    out: Path | None,
    base: Base,
    sampling: Sampling,
    *,
    json: bool,
) -> None:
    """All prompts of a file: printed as they come, or as one JSON value, or written."""
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
        _save(out, results)
        facts["out"] = out
    if json:
        print_json(facts if out is not None else facts | {"results": results})
    elif out is not None:
        typer.echo(f"{out}: {facts['prompts']} answers, {facts['tokens']:,} tokens")


def _save(out: Path, results: Sequence[Mapping[str, Any]]) -> None:
    from funclora._files.atomic import replace_files

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as stream:
            stream.writelines(json_line(result) + "\n" for result in results)

    replace_files(out.parent, {out.name: write})

"""`funclora generate`: continues prompts with a model and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from funclora.cli._base import Device, Dtype, Quantize
from funclora.cli._converse import BASE, converse, refuse_bytes, spoken
from funclora.cli._output import AsJson
from funclora.cli._settings import setting
from funclora.distributed import _ranks as ranks

if TYPE_CHECKING:
    from funclora._apps.train.settings import Settings
    from funclora.cli._prompts import Prompt, Reader
# Logits divided by less would be infinite, or nearly so.
LEAST = 1e-3


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
        Sequence[str] | None,
        typer.Option(
            help="Adapters for prompts that name none; with several, each prompt is answered under each of them. "
            "(base) is the base model.",
            show_default="the only adapter given, or the base model",
        ),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Treat prompts as user messages, using the chat template.")] = False,
    chat_template: Annotated[Path | None, setting("chat_template")] = None,
    fields: Annotated[Sequence[str] | None, setting("fields")] = None,
    roles: Annotated[Sequence[str] | None, setting("roles")] = None,
    continue_final_message: Annotated[
        bool, typer.Option(help="Continue the assistant's last message of a record, where there is one.")
    ] = False,
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
    batch: Annotated[int, typer.Option(min=1, help="Number of prompts that run together.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the base weights; auto keeps the folder's.")] = Dtype.auto,
    quantize: Annotated[Quantize, typer.Option(help="Quantise the base weights.")] = Quantize.none,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSONL file for the answers to --file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file --out.")] = False,
    json: AsJson = False,
) -> None:
    """Continue prompts with a model and adapters; each row of a batch can use a different adapter.

    Without --prompt and --file, the command asks for prompts, one per line, until the end of the input. /adapter NAME
    switches to another adapter, /base to the base model; Ctrl-C stops an answer.

    A record of --file has a field prompt or messages, and optionally adapter; null is the base model. With --out, each
    record is written with the model's completion, its number of tokens, and whether the model ended it. An answer in
    the record itself, as a completion or the assistant's last message, is not shown to the model but kept as reference.

    Examples:
        funclora generate adapter --model model --prompt "Once upon a time"
        funclora generate adapters --model model --adapter english,french --prompt "And the cow?" --chat
        funclora generate adapters --model model --file prompts.jsonl --out answers.jsonl
        funclora generate adapter --model model --chat --temperature 0.7 --top-p 0.9
    """
    from funclora.errors import ConfigError

    _check_options(prompt=prompt, file=file, out=out, chat=chat, json=json)
    of_records = {"--continue-final-message": continue_final_message, "--fields": fields, "--roles": roles}
    for option, given in of_records.items():
        if given and file is None:
            raise ConfigError(f"{option} can only be used with --file. Leave it out.")
    if chat_template is not None and model is None:
        raise ConfigError("--chat-template: the demo's base reads no chats. Give a --model, or leave it out.")
    if chat_template is not None and file is None and not chat:
        raise ConfigError("--chat-template can only be used with --chat, or with messages in a --file. Leave it out.")
    _check_sampling(temperature, top_p, top_k, seed)
    if ranks.size() > 1 and prompt is None and file is None:
        raise ConfigError("torchrun: a conversation is with one process. Give --file, or start it without torchrun.")
    out = out if ranks.is_first() else None
    import contextlib

    from funclora._apps.train.formats import Format
    from funclora.cli._adapters import adapter_folders
    from funclora.cli._output import claimed_out
    from funclora.cli._prompts import known, read_prompts

    folders = adapter_folders(adapters or [])
    names = list(folders)
    defaults = [known(None if name == BASE else name, names, "--adapter") for name in adapter or ()]
    if not defaults:
        defaults = [names[0] if len(names) == 1 else None]
        if len(names) > 1 and prompt is not None:
            raise ConfigError(f"--prompt: several adapters are given. Choose some with --adapter: {', '.join(names)}.")

    from funclora.cli._generate import Generator, Sampling

    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed or 0)
    settings, reader = _reader(
        model, dtype=dtype.value, quantize=quantize.value, device=device, chat_template=chat_template, fields=fields,
        roles=roles,
    )  # fmt: skip
    with contextlib.nullcontext() if out is None else claimed_out(out, overwrite=overwrite):
        # What is asked is looked at before the weights are loaded, which can take minutes.
        prompts: list[Prompt] = []
        if file is not None:
            form = Format.of(settings.fields, settings.roles, reader.tokenizer)
            prompts = read_prompts(file, reader, form, names, defaults, go_on=continue_final_message)
            if folders and not {each.adapter for each in prompts} & folders.keys():
                raise ConfigError(f"{file}: no record names one of the given adapters: {', '.join(names)}.")
            if chat_template is not None and not any("messages" in each.fields for each in prompts):
                raise ConfigError(f"--chat-template: no record of {file} has messages. Leave it out.")
        elif prompt is not None:
            prompts = [_asked(reader, prompt, each, "--prompt", chat=chat) for each in defaults]
        elif len(defaults) > 1:
            raise ConfigError("--adapter: a conversation is with one adapter at a time. Give one, or --prompt.")
        from funclora._apps.train.base import load_base
        from funclora.cli._answers import answer_all, answer_one

        base = load_base(settings, reader.tokenizer)
        generator = Generator(base, folders, sampling, model)
        if file is not None or len(prompts) > 1:
            answer_all(generator, prompts, batch, out, base, sampling, json=json)
        elif prompt is not None:
            answer_one(generator, prompts[0], base, sampling, json=json)
        else:
            converse(generator, reader, defaults[0], names, base, chat=chat)


def _check_options(*, prompt: str | None, file: Path | None, out: Path | None, chat: bool, json: bool) -> None:
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


def _reader(model: Path | None, **given: object) -> tuple[Settings, Reader]:
    """How the model is loaded and records are read, and what makes prompts for it."""
    from funclora._apps.train.base import load_tokenizer, vocabulary
    from funclora._apps.train.folder import empty_model, load_config, longest_context
    from funclora._apps.train.reading import from_option
    from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, Settings
    from funclora.cli._prompts import Reader

    task = SEQ2SEQ if model is not None and load_config(model).is_encoder_decoder else CAUSAL
    given |= {"model": model, "task": task}
    settings = Settings(**{key: from_option(key, value) for key, value in given.items() if value is not None})
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

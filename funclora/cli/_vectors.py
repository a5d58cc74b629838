"""The computation of `funclora predict --embeddings`: the texts of records, each embedded under its own adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import funclora as fl
from funclora._apps.train.base import context_limit, load_base, load_tokenizer
from funclora._apps.train.embedding import embedding, with_pooling
from funclora._apps.train.embedding_rows import collate, joined
from funclora._apps.train.formats import Format
from funclora._apps.train.notes import Notes
from funclora._apps.train.records import Record, read
from funclora._apps.train.settings import Settings
from funclora._apps.train.setup import check_vocabulary
from funclora._files.atomic import replace_files
from funclora.cli._loader import Loader
from funclora.cli._output import write_lines
from funclora.cli._predict import in_batches
from funclora.cli._prompts import adapter_of, refuse_taken
from funclora.errors import ConfigError, FormatError

NPY, SAFETENSORS, JSONL = SUFFIXES = (".npy", ".safetensors", ".jsonl")
NAME = "embedding"  # of the field of a record, and of the tensor of a file


@dataclass(frozen=True)
class Vectors:
    """Embeddings of records.

    Attributes:
        records: as in the file.
        adapters: the adapter of each; None for the base model.
        values: float32, `[records, dim]`.
        notes: what was cut off.
    """

    records: list[Record]
    adapters: list[str | None]
    values: Tensor
    notes: list[str]


def check_suffix(file: Path) -> None:
    """Raise `ConfigError` if embeddings cannot be written as this kind of file."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"--embeddings: expected a file whose name ends with {', '.join(SUFFIXES)}, got {file}.")


@torch.no_grad()
def vectors(folders: Mapping[str, Path], settings: Settings, file: Path, default: str | None, batch: int) -> Vectors:
    """The embeddings of the texts of a file.

    Args:
        folders: PEFT folders by name.
        settings: of the model and the fields.
        file: as for `records.read`.
        default: the adapter of records that name none.
        batch: number of texts that run together, each with its own adapter.

    Raises:
        FormatError: a record has no text, or a text no tokens.
        ConfigError: a record names an unknown adapter, or none names one of the given ones.
    """
    settings, tokenizer, notes = with_pooling(settings, folders), load_tokenizer(settings), Notes()
    limit = context_limit(settings)
    context = settings.context if limit is None else min(settings.context, limit)
    form = Format.of(settings.fields, (), tokenizer)
    records = list(read(file, settings.text_field))
    adapters = [adapter_of(record, list(folders), default) for record in records]
    if folders and not {*adapters} & folders.keys():
        raise ConfigError(f"{file}: no record names one of the given adapters: {', '.join(folders)}.")
    examples = []
    for record in records:
        refuse_taken(record, (NAME,))
        text = form.standard(record)[0].fields.get(settings.text_field)
        if not isinstance(text, str):
            raise FormatError(
                f"{record.where}: expected a text under {settings.text_field!r}, got {text!r:.60}. Give another field "
                "with --text-field."
            )
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > context:
            notes.count(f"cut off after {context} tokens", record.source)
            ids = tokenizer(text, truncation=True, max_length=context)["input_ids"]
        if not ids:
            raise FormatError(f"{record.where}: the text has no tokens, so it has no embedding. Remove the record.")
        examples.append(joined([ids], None, record.source))
    base = embedding(load_base(settings, tokenizer), settings)
    check_vocabulary(base, examples)
    loader = Loader(base, folders, settings.model)

    def compute(some: list[int]) -> Sequence[Tensor]:
        bound = fl.bind(base.model, base.params, loader.route([adapters[i] for i in some]))
        batch = collate([examples[i] for i in some], base.tokenizer.pad_token_id)
        return [*base.embedded(bound, batch)[0].float().cpu()]

    made = in_batches(adapters, [len(example.ids) for example in examples], batch, compute, lambda _: None)
    return Vectors(records, adapters, torch.stack(made), notes.lines())


def write(file: Path, found: Vectors) -> None:
    """Write embeddings as the suffix of a file says: completely or not at all.

    Raises:
        OSError: it cannot be written.
    """
    if file.suffix == JSONL:
        rows: list[dict[str, Any]] = [
            {**record.fields, "adapter": adapter, NAME: values}
            for record, adapter, values in zip(found.records, found.adapters, found.values.tolist(), strict=True)
        ]
        write_lines(file, rows)
        return

    def fill(draft: Path) -> None:
        if file.suffix == NPY:
            import numpy as np

            with draft.open("wb") as stream:
                np.save(stream, found.values.numpy())
            return
        from safetensors.torch import save_file

        save_file({NAME: found.values.contiguous()}, draft)

    replace_files(file.parent, {file.name: fill})

"""The data of a run as token ids: from settings and a tokenizer to training and validation examples."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from funclora._apps.train.notes import Notes
from funclora._apps.train.packing import pack
from funclora._apps.train.records import Record, read
from funclora._apps.train.rows import IGNORED as IGNORED
from funclora._apps.train.rows import Example as Example
from funclora._apps.train.settings import CAUSAL, SEQUENCE, TOKEN, Settings
from funclora._apps.train.tokens import class_name, reader, schema, word_classes
from funclora._init.fresh import generator_of
from funclora.errors import ConfigError, FormatError


@dataclass(frozen=True)
class Data:
    """All examples of a run.

    Attributes:
        train: the training examples.
        validation: the validation examples; may be empty.
        classes: names of the classes, by number; empty for tasks without.
        notes: what was cut off, skipped or held out, with numbers.
    """

    train: list[Example]
    validation: list[Example]
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of the examples and classes, in hexadecimal: equal if and only if a run sees the same data.

        The paths of the files do not matter, so the files may move.
        """
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (self.train, self.validation):
            digest.update(struct.pack("<q", len(part)))
            for example in part:
                for numbers in (example.ids, example.labels, example.lengths):
                    digest.update(struct.pack(f"<{len(numbers) + 1}q", len(numbers), *numbers))
        return digest.hexdigest()


def prepare(settings: Settings, tokenizer: Any, limit: int | None, known: Sequence[str] = ()) -> Data:
    """Read and tokenise the data of a run.

    Args:
        settings: the run's.
        tokenizer: transformers' tokenizer, or one with the same interface.
        limit: the model's maximum context in tokens; None if there is no limit.
        known: classes of the model's head, in its order. Data without other classes use the same numbers, so that the
            head names them correctly.

    Raises:
        ConfigError: a setting does not fit the data, the tokenizer or the model.
        FormatError: a file cannot be read; file and line are named.
        UnsupportedError: the tokenizer does not tell which tokens belong to the assistant, or to a word.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from funclora._apps.train.tokenizer import ByteTokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "pairs.jsonl")
        ...     _ = file.write_text('{"prompt": "1+1=", "completion": "2"}')
        ...     prepare(Settings(data=file), ByteTokenizer(), 256).train
        [Example(ids=[49, 43, 49, 61, 50], labels=[-100, -100, -100, -100, 50], lengths=(5,), source='pairs.jsonl:1')]
    """
    notes = Notes()
    context = _context(settings, limit, notes)
    if settings.data is None:
        raise ConfigError("data: no training data is given. Give a file, or a folder of files.")
    records = list(read(settings.data, settings.text_field))
    held = None if settings.validation is None else list(read(settings.validation, settings.text_field))
    together = records + (held or [])
    _one_schema(together, settings, notes)
    classes = _classes(together, settings, known, notes)
    if held is None:
        records, held = _held_out(records, settings)
    read_one = reader(settings, tokenizer, context, classes, notes)
    train, validation = ([example for record in part for example in read_one(record)] for part in (records, held))
    for part, file in ((train, settings.data), (validation, settings.validation)):
        if file is not None and not part:
            raise FormatError(f"{file}: no token is left to compute a loss on. {' '.join(notes.lines())}".rstrip())
    if settings.validation is None and settings.validation_split and not held:
        # With few long texts, the end of the last ones.
        n = round(len(train) * settings.validation_split)
        train, validation = train[: len(train) - n], train[len(train) - n :]
        if not train:
            raise ConfigError(f"validation_split: {settings.validation_split} of {n} leaves nothing to train on.")
    if settings.validation is None and settings.validation_split:
        of = len(train) + len(validation)
        notes.say(
            f"{len(validation)} of {of} examples {'is' if len(validation) == 1 else 'are'} held out for evaluation."
            if validation
            else f"No example is held out for evaluation: {of} are too few for a validation_split of "
            f"{settings.validation_split:g}. Give a larger one, or a file of validation data."
        )
    learned = {label for example in train for label in example.labels} if classes else set()
    if missing := [name for i, name in enumerate(classes) if i not in learned]:
        notes.say(f"No training example is of class {', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}.")
    if settings.packing:
        train, validation = (
            _packed(part, context, notes, name) for part, name in ((train, ""), (validation, "held-out "))
        )
    return Data(train, validation, classes, notes.lines())


def read_examples(
    file: Path, settings: Settings, tokenizer: Any, limit: int | None, classes: Sequence[str]
) -> tuple[list[Example], list[str]]:
    """All examples of a file, with the labels that training has, to score saved adapters on.

    Args:
        file: a file or folder, as for `records.read`.
        settings: of the task and of the fields; `context` is the maximum length of an example.
        tokenizer: as for `prepare`.
        limit: as for `prepare`.
        classes: the adapters'; empty for tasks without.

    Returns:
        The examples, and what was cut off or not read.

    Raises:
        FormatError: as for `prepare`; or nothing is left to compute a loss on, or a class is none of the adapters'.
        UnsupportedError: as for `prepare`.
    """
    notes = Notes()
    if limit is not None:
        settings = replace(settings, context=min(settings.context, limit))
    context = _context(settings, limit, notes)
    records = list(read(file, settings.text_field))
    _one_schema(records, settings, notes)
    read_one = reader(settings, tokenizer, context, classes, notes)
    examples = [example for record in records for example in read_one(record)]
    if not examples:
        raise FormatError(f"{file}: no token is left to compute a loss on. {' '.join(notes.lines())}".rstrip())
    return examples, notes.lines()


def _context(settings: Settings, limit: int | None, notes: Notes) -> int:
    """The maximum length of an example. Contradictory settings are refused."""
    context = settings.context if limit is None else min(settings.context, limit)
    if context < settings.context:
        notes.say(f"The context is {context} tokens, the model's maximum, instead of {settings.context}.")
    least = 2 if settings.task == CAUSAL else 1
    if context < least:
        raise ConfigError(f"context: expected at least {least} tokens, so that one can be predicted, got {context}.")
    if settings.packing and settings.model is None:
        raise ConfigError("packing: the demo's base cannot separate the examples of a row. Leave it out.")
    return context


def _one_schema(records: list[Record], settings: Settings, notes: Notes) -> None:
    """Refuse records of different kinds, and report fields that are not read."""
    fields = schema(records[0], settings)
    unused: dict[str, str] = {}
    for record in records:
        if (other := schema(record, settings)) != fields:
            raise FormatError(
                f"{record.where}: has {other[0]!r}, but {records[0].where} has {fields[0]!r}. All records must be of "
                "one kind."
            )
        unused.update((name, "") for name in record.fields if name not in fields)
    if unused:
        notes.say(f"Fields that are not read: {', '.join(unused)}.")


def _classes(records: list[Record], settings: Settings, known: Sequence[str], notes: Notes) -> tuple[str, ...]:
    """The names of all classes: the model's, if it has all of them; else sorted, numerically if they are numbers."""
    if settings.task not in (SEQUENCE, TOKEN):
        return ()
    names: dict[str, None] = {}
    kinds: dict[type, Record] = {}
    for record in records:
        value = record.fields[settings.label_field]
        if settings.task == SEQUENCE:
            names[class_name(value, record, settings.label_field)] = None
        else:
            names.update(dict.fromkeys(word_classes(record, settings.label_field)[1]))
        kinds.update((type(label), record) for label in (value if settings.task == TOKEN else [value]))
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise FormatError(
            f"{second.where}: {settings.label_field}: classes are of type {other.__name__} here, but "
            f"{one.__name__} in {first.where}. Give all as texts, or all as whole numbers."
        )
    if len(names) < 2:
        raise FormatError(
            f"{settings.data}: {settings.label_field}: expected at least two classes, got {', '.join(names) or 'none'}."
        )
    if names.keys() <= {*known}:
        classes = tuple(known)
    else:
        if known:
            notes.say(f"The model's head has other classes: {', '.join(known[:20])}{', ...' * (len(known) > 20)}.")
        try:
            classes = tuple(sorted(names, key=int))
        except ValueError:
            classes = tuple(sorted(names))
    notes.say(f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}.")
    return classes


def _held_out(records: list[Record], settings: Settings) -> tuple[list[Record], list[Record]]:
    """The records in two parts, each in order; the seed determines which ones are held out."""
    import torch

    n = round(len(records) * settings.validation_split)
    if n == len(records) and settings.validation_split:
        raise ConfigError(
            f"validation_split: {settings.validation_split} of {len(records)} leaves nothing to train on."
        )
    order = torch.randperm(len(records), generator=generator_of(settings.seed, "held-out part")).tolist()
    chosen = set(order[:n])
    return (
        [record for i, record in enumerate(records) if i not in chosen],
        [record for i, record in enumerate(records) if i in chosen],
    )


def _packed(examples: list[Example], context: int, notes: Notes, name: str) -> list[Example]:
    rows = pack(examples, context)
    if rows:
        full = sum(len(row.ids) for row in rows) / (len(rows) * context)
        notes.say(f"{len(examples)} {name}examples packed into {len(rows)} rows, which are {full:.0%} full.")
    return rows

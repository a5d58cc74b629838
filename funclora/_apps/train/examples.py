"""The data of a run as token ids: from settings and a tokenizer to training and validation examples."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from funclora._apps.train.batches import Shares
from funclora._apps.train.cache import Part, Tokenised, is_large, key_of, load, written
from funclora._apps.train.formats import Format
from funclora._apps.train.labels import Labels, Seen, decided, listed
from funclora._apps.train.notes import Notes
from funclora._apps.train.packing import pack, widths
from funclora._apps.train.records import Record
from funclora._apps.train.rows import IGNORED as IGNORED
from funclora._apps.train.rows import Example as Example
from funclora._apps.train.settings import AUTO, DECODERS, MULTI, REGRESSION, SEQUENCE, SINGLE, TOKEN, Settings
from funclora._apps.train.stored import digest
from funclora._apps.train.survey import Survey
from funclora._apps.train.tokens import reader
from funclora._init.fresh import generator_of
from funclora.errors import ConfigError, FormatError, UnsupportedError


@dataclass(frozen=True)
class Data:
    """All examples of a run.

    Attributes:
        train: the training examples.
        validation: the validation examples; may be empty.
        classes: names of the classes, by number; empty for tasks without.
        notes: what was cut off, skipped or held out, with numbers.
        shares: for files with weights, the number of training examples of each, and how often each is in an epoch.
        problem: what labels of texts are, one of `settings.PROBLEMS`.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    shares: Shares = ()
    problem: str = SINGLE

    def digest(self) -> str:
        """SHA-256 of the examples and classes, in hexadecimal: equal if and only if a run sees the same data.

        The paths of the files do not matter, so the files may move.
        """
        parts = [[len(part), digest(part)] for part in (self.train, self.validation)]
        return hashlib.sha256(json.dumps([self.classes, self.shares, parts]).encode()).hexdigest()


def prepare(
    settings: Settings, tokenizer: Any, limit: int | None, known: Sequence[str] = (), folder: Path | None = None
) -> Data:
    """Read and tokenise the data of a run.

    Args:
        settings: the run's.
        tokenizer: transformers' tokenizer, or one with the same interface.
        limit: the model's maximum context in tokens; None if there is no limit.
        known: classes of the model's head, in its order. Data without other classes use the same numbers, so that the
            head names them correctly.
        folder: where the examples of large data are kept, for this run and when it is resumed; in memory without.

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
        ...     (example,) = prepare(Settings(data=(file,)), ByteTokenizer(), 256).train
        >>> example.ids, example.labels, example.source
        ([49, 43, 49, 61, 50], [-100, -100, -100, -100, 50], 'pairs.jsonl:1')
    """
    if not settings.data:
        raise ConfigError("data: no training data is given. Give a file, or a folder of files.")
    tokenised = _tokenised(settings, tokenizer, limit, known, folder)
    (train, validation), notes, labels = tokenised.parts, tokenised.notes, tokenised.labels
    context = _context(settings, limit, Notes())
    if settings.validation is None and settings.validation_split and not validation:
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
    if missing := _unlearned(train, labels):
        notes.say(f"No training example is of class {listed(missing)}.")
    parts = [train[start:end] for start, end in itertools.pairwise(min(end, len(train)) for end in tokenised.ends)]
    if settings.packing:
        packed = [_packed(part, context, notes, "") for part in (parts if settings.weights else [train])]
        parts = packed  # files with weights of their own do not share rows
        train = packed[0] if len(packed) == 1 else [row for part in packed for row in part]
        validation = _packed(validation, context, notes, "held-out ")
    shares = tuple(zip(map(len, parts), settings.weights, strict=True)) if settings.weights else ()
    return Data(train, validation, labels.names, notes.lines(), shares, labels.problem)


def _tokenised(
    settings: Settings, tokenizer: Any, limit: int | None, known: Sequence[str], folder: Path | None
) -> Tokenised:
    """The examples, from the cache if it has them."""
    if folder is None or not is_large(settings) or find_spec("pyarrow") is None:
        train, validation = list[Example](), list[Example]()
        ends, labels, notes = _fill(train, validation, settings, tokenizer, limit, known)
        return Tokenised((train, validation), ends, labels, notes)
    key = key_of(settings, tokenizer, limit, known)
    if (found := load(folder, key)) is None:
        with written(folder, key) as cache:
            cache.finish(*_fill(*cache.parts, settings, tokenizer, limit, known))
        found = load(folder, key)
        if found is None:
            raise FormatError(f"{folder}: the cache of the data is not what was written. Is the disk in order?")
    return found


def _fill(
    train: Part, validation: Part, settings: Settings, tokenizer: Any, limit: int | None, known: Sequence[str]
) -> tuple[list[int], Labels, Notes]:
    """Tokenise the data.

    Returns:
        The number of training examples before and after each file, what labels mean, and what is to be said.
    """
    notes = Notes()
    context = _context(settings, limit, notes)
    survey = Survey(settings, Format.of(settings.fields, settings.roles, tokenizer), notes)
    n = sum(survey.count(settings.data))
    if settings.validation is not None:
        kinds = dict(survey.kinds)
        survey.count([settings.validation])
        if other := next((kind for kind in survey.kinds if kind not in kinds), None):
            (trained, where), *_ = kinds.items()
            raise FormatError(
                f"{survey.kinds[other]}: has {other[0]!r}, but {where} has {trained[0]!r}. Validation data must be of "
                "a kind that is trained on."
            )
    labels = _labels(survey.labels, settings, known, notes)
    read_one = reader(settings, tokenizer, context, labels, notes)
    held_out = _held_out(n, settings) if settings.validation is None else set()
    ends, i = [0], 0
    for file in (*settings.data, *([] if settings.validation is None else [settings.validation])):
        before = len(train) + len(validation)
        for record in survey.records(file):
            held = len(ends) > len(settings.data) or i in held_out
            (validation if held else train).extend(_usable(read_one, record, survey))
            i += 1
        if len(train) + len(validation) == before:
            told = " ".join([*notes.lines(), *survey.lines()])
            raise FormatError(f"{file}: no token is left to compute a loss on. {told}".rstrip())
        ends.append(len(train))
    if not len(train):
        raise ConfigError(f"validation_split: {settings.validation_split} leaves nothing to train on.")
    for line in survey.lines():
        notes.say(line)
    return ends[: len(settings.data) + 1], labels, notes


def read_examples(
    file: Path, settings: Settings, tokenizer: Any, limit: int | None, classes: Sequence[str]
) -> tuple[list[Example], list[str]]:
    """All examples of a file, with the labels that training has, to score saved adapters on.

    Args:
        file: a file or folder, as for `records.read`.
        settings: of the task, the problem and the fields; `context` is the maximum length of an example.
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
    survey = Survey(settings, Format.of(settings.fields, settings.roles, tokenizer), notes)
    survey.count([file])
    placed = settings.problem == MULTI and survey.labels.is_placed() and survey.labels.size == len(classes)
    problem = SINGLE if settings.problem == AUTO else settings.problem
    read_one = reader(settings, tokenizer, context, Labels(problem, tuple(classes), placed), notes)
    examples = [example for record in survey.records(file) for example in _usable(read_one, record, survey)]
    for line in survey.lines():
        notes.say(line)
    if not examples:
        raise FormatError(f"{file}: no token is left to compute a loss on. {' '.join(notes.lines())}".rstrip())
    return examples, notes.lines()


def _context(settings: Settings, limit: int | None, notes: Notes) -> int:
    """The maximum length of an example. Contradictory settings are refused."""
    context = settings.context if limit is None else min(settings.context, limit)
    if context < settings.context:
        notes.say(f"The context is {context} tokens, the model's maximum, instead of {settings.context}.")
    least = 2 if settings.task in DECODERS else 1
    if context < least:
        raise ConfigError(f"context: expected at least {least} tokens, so that one can be predicted, got {context}.")
    if settings.packing and settings.model is None:
        raise ConfigError("packing: the demo's base cannot separate the examples of a row. Leave it out.")
    return context


def _usable(read_one: Callable[[Record], list[Example]], record: Record, survey: Survey) -> list[Example]:
    """The examples of a record; none if it is left out."""
    try:
        return read_one(record)
    except (FormatError, UnsupportedError) as error:
        survey.left_out(error)
        return []


def _labels(seen: Seen, settings: Settings, known: Sequence[str], notes: Notes) -> Labels:
    """What the labels mean, for tasks that have classes."""
    if settings.task not in (SEQUENCE, TOKEN):
        return Labels()
    problem = SINGLE if settings.task == TOKEN else settings.problem
    labels, said = decided(seen, problem, known, f"{settings.data[0]}: {settings.label_field}")
    for line in said:
        notes.say(line)
    return labels


def _unlearned(train: Sequence[Example], labels: Labels) -> list[str]:
    """The classes that no example has."""
    if labels.problem == REGRESSION or not labels.names:
        return []
    learned: set[int] = set()
    for example in train:
        learned.update(example.labels, (i for i, there in enumerate(example.targets) if there))
    return [name for i, name in enumerate(labels.names) if i not in learned]


def _held_out(n: int, settings: Settings) -> set[int]:
    """Which of n records are held out; the seed determines it."""
    import torch

    many = round(n * settings.validation_split)
    if many == n and settings.validation_split:
        raise ConfigError(f"validation_split: {settings.validation_split} of {n} leaves nothing to train on.")
    return {*torch.randperm(n, generator=generator_of(settings.seed, "held-out part"))[:many].tolist()}


def _packed(examples: Sequence[Example], context: int, notes: Notes, name: str) -> Sequence[Example]:
    rows = pack(examples, context)
    if rows:
        full = sum(widths(examples)) / (len(rows) * context)
        notes.say(f"{len(examples)} {name}examples packed into {len(rows)} rows, which are {full:.0%} full.")
    return rows

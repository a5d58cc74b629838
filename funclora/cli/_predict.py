"""The computation of `funclora predict`: classes of records, each under its own adapter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

import funclora as fl
from funclora._apps.train.base import Base, context_limit, load_base, load_tokenizer
from funclora._apps.train.batches import collate
from funclora._apps.train.folder import CLASSES, load_config
from funclora._apps.train.formats import Format
from funclora._apps.train.labels import Labels, Seen, class_name
from funclora._apps.train.notes import Notes
from funclora._apps.train.records import Record, read
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.scores import Score, agreement, agreement_of_outputs
from funclora._apps.train.settings import AUTO, EMBEDDING, MULTI, REGRESSION, SEQUENCE, SINGLE, TOKEN, Settings
from funclora._apps.train.setup import check_vocabulary
from funclora._apps.train.step import moved
from funclora._apps.train.tasks import trained_task
from funclora._apps.train.tokens import WORDS, reader, schema, word_classes
from funclora.cli._loader import Loader
from funclora.cli._prompts import adapter_of, refuse_taken
from funclora.cli._scores import classes_of, with_problem
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FormatError, UnsupportedError, near

V = TypeVar("V")
RESULTS = ("predicted", "scores")  # what the result of a record has besides its adapter


@dataclass(frozen=True)
class Row:
    """A record to classify.

    Attributes:
        record: as in the file.
        adapter: name of its adapter; None for the base model.
        example: its tokens; for tags, the label of a word's first token is the word's place. None if it has no token.
        right: the right classes by number, one or one for each word; None if the record has none.
        targets: instead of one class, the right outputs, as `Example.targets`.
        words: those to tag.
    """

    record: Record
    adapter: str | None
    example: Example | None
    right: list[int] | None
    targets: tuple[float, ...] = ()
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Prediction:
    """What is predicted for a record.

    Attributes:
        predicted: number of the class, of all classes of a text that has several, or of each word's class; None where
            nothing is known, such as words that were cut off; empty for numbers.
        scores: the probabilities of all classes, or the numbers; for tags, that of each word's class.
    """

    predicted: list[int | None]
    scores: list[float | None]


def task_of(folders: Mapping[str, Path], model: Path | None, task: str | None) -> str:
    """The task of the adapters, or else of the model's own head.

    Raises:
        ConfigError: it has neither classes nor embeddings.
    """
    if not folders and task is None and model is not None:
        heads = {CLASSES[each].removeprefix("AutoModel"): each for each in (SEQUENCE, TOKEN)}
        names = load_config(model).architectures or ()
        task = next((heads[head] for name in names for head in heads if str(name).endswith(head)), None)
    found = trained_task(folders, model, task)
    if found not in (SEQUENCE, TOKEN, EMBEDDING):
        raise ConfigError(
            f"task: {found} has no classes. Give adapters of sequence-classification, token-classification or "
            "embedding; for answers use funclora generate, for losses funclora eval."
        )
    return found


class Predictor:
    """Classifies records with a frozen model and adapters.

    Args:
        folders: PEFT folders by name.
        settings: of the model, the task, the problem and the fields.
        threshold: the probability from which on a text is of a class, where it has several.

    Attributes:
        problem: what labels of texts are, one of `settings.PROBLEMS`.
        classes: names of the classes, or of the numbers.
        notes: what was cut off, or has no token.
    """

    def __init__(self, folders: Mapping[str, Path], settings: Settings, threshold: float) -> None:
        settings = with_problem(folders, settings)
        self.problem = SINGLE if settings.problem == AUTO else settings.problem
        self._folders, self._settings, self._threshold = folders, settings, threshold
        self.classes = classes_of(folders, settings)
        self.notes = Notes()
        limit = context_limit(settings)
        self._context = settings.context if limit is None else min(settings.context, limit)
        self._tokenizer = load_tokenizer(settings)

    def rows(self, file: Path, default: str | None) -> list[Row]:
        """The records of a file.

        Args:
            file: as for `records.read`.
            default: the adapter of records that name none.

        Raises:
            FormatError: a record lacks the text, or has a class that no adapter has.
            ConfigError: a record names an unknown adapter.
        """
        settings, names = self._settings, list(self._folders)
        field = settings.label_field
        form = Format.of(settings.fields, (), self._tokenizer)
        raw = list(read(file, settings.text_field))
        records = [form.standard(record)[0] for record in raw]
        labels = self._labels(records)
        unlabelled = [replace(record, fields={**record.fields, field: _places(record, settings)}) for record in records]
        many = max((len(record.fields[field]) for record in unlabelled), default=1) if settings.task == TOKEN else 1
        nothing = Labels(names=tuple(str(i) for i in range(many)))
        encode = reader(settings, self._tokenizer, self._context, nothing, self.notes)
        rows = []
        for own, record, other in zip(raw, records, unlabelled, strict=True):
            refuse_taken(own, RESULTS)
            adapter = adapter_of(own, names, default)
            schema(other, settings)
            example = next(iter(encode(other)), None)
            right = self._right(record)
            targets = () if right is None else labels.targets(record, field)
            words = record.fields[WORDS] if settings.task == TOKEN else ()
            rows.append(Row(own, adapter, example, right, targets, words))
        return rows

    def _labels(self, records: Sequence[Record]) -> Labels:
        """What the labels of those records mean that have one."""
        field, seen = self._settings.label_field, Seen()
        if self.problem == MULTI:
            for record in records:
                if record.fields.get(field) is not None:
                    seen.add(record.fields[field], record, field)
        return Labels(self.problem, self.classes, seen.is_placed() and seen.size == len(self.classes))

    def _right(self, record: Record) -> list[int] | None:
        """The right classes, if the record has them; an empty list if they are numbers or several."""
        field = self._settings.label_field
        if record.fields.get(field) is None:
            return None
        if self.problem != SINGLE:
            return []
        if self._settings.task == TOKEN:
            names = word_classes(record, field)[1]
        else:
            names = [class_name(record.fields[field], record, field)]
        for name in names:
            if name not in self.classes:
                raise FormatError(
                    f"{record.where}: {field}: {name!r} is none of the classes {', '.join(self.classes[:20])}."
                    f"{near(name, self.classes, 1)} Without this field nothing is compared."
                )
        return [self.classes.index(name) for name in names]

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], batch: int, progress: Callable[[int], None]) -> list[Prediction]:
        """The classes of rows, in their order.

        Args:
            rows: from `rows`.
            batch: rows that are computed together, each with its own adapter.
            progress: called with a number of finished rows.
        """
        base = load_base(self._settings, self._tokenizer, self.classes)
        self.classes = base.classes
        check_vocabulary(base, [row.example for row in rows if row.example is not None])
        if base.new and any(row.adapter is None for row in rows):
            where = next(row.record.where for row in rows if row.adapter is None)
            raise ConfigError(
                f"{where}: {base.name} has no weights of {base.new[0]!r}, so without an adapter its classes would be "
                "random. Name an adapter that was trained for classes."
            )
        loader = Loader(base, self._folders, self._settings.model)
        found = [Prediction([], [])] * len(rows)
        there = [i for i, row in enumerate(rows) if row.example is not None]
        progress(len(rows) - len(there))
        made = in_batches(
            [rows[i].adapter for i in there],
            [len(_example(rows[i]).ids) for i in there],
            batch,
            lambda some: self._classified(base, loader, [rows[there[i]] for i in some]),
            progress,
        )
        for i, prediction in zip(there, made, strict=True):
            found[i] = prediction
        return found

    def _classified(self, base: Base, loader: Loader, rows: Sequence[Row]) -> list[Prediction]:
        examples = [_example(row) for row in rows]
        bound = fl.bind(base.model, base.params, loader.route([row.adapter for row in rows]))
        given = collate(examples, pad=base.tokenizer.pad_token_id, task=base.task)
        shares = base.shares(base.logits(bound, moved(given, base.device))).tolist()
        if base.problem == REGRESSION:
            return [Prediction([], own) for own in shares]
        if base.problem == MULTI:
            return [Prediction([i for i, x in enumerate(own) if x >= self._threshold], own) for own in shares]
        if base.task == SEQUENCE:
            return [Prediction([own.index(max(own))], own) for own in shares]
        return [_tags(example, own) for example, own in zip(examples, shares, strict=True)]

    def result(self, row: Row, found: Prediction) -> dict[str, Any]:
        """A record with what is predicted for it."""
        names = [None if each is None else self.classes[each] for each in found.predicted]
        predicted: Any
        scores: Any
        if self._settings.task == TOKEN:
            rest = [None] * (len(row.words) - len(names))
            predicted, scores = [*names, *rest], [*found.scores, *rest]
        elif self.problem == REGRESSION:
            predicted = (found.scores[0] if len(self.classes) == 1 else found.scores) if found.scores else None
            return {**row.record.fields, "adapter": row.adapter, "predicted": predicted}
        else:
            predicted = names[0] if names else None
            if self.problem == MULTI:
                predicted = names if found.scores else None
            scores = dict(zip(self.classes, found.scores, strict=False))
        return {**row.record.fields, "adapter": row.adapter, "predicted": predicted, "scores": scores}

    def agreement(self, rows: Sequence[Row], found: Sequence[Prediction]) -> Score | None:
        """The metrics on the records that have the right classes; None if there are none."""
        if self.problem != SINGLE:
            both = [(row.targets, each.scores) for row, each in zip(rows, found, strict=True)]
            kept = [(true, [x for x in said if x is not None]) for true, said in both if true and said]
            true, said = [one for one, _ in kept], [other for _, other in kept]
            return agreement_of_outputs(self.problem, self.classes, true, said, self._threshold) if kept else None
        pairs = [
            [(true, said) for true, said in zip(row.right, each.predicted, strict=False) if said is not None]
            for row, each in zip(rows, found, strict=True)
            if row.right is not None
        ]
        return agreement(self.classes, pairs) if any(pairs) else None


def in_batches(
    adapters: Sequence[str | None],
    lengths: Sequence[int],
    batch: int,
    compute: Callable[[list[int]], Sequence[V]],
    progress: Callable[[int], None],
) -> list[V]:
    """What a function gives for rows that run together, each with its own adapter.

    Args:
        adapters: the adapter of each row.
        lengths: of the rows; rows of about one length run together.
        batch: number of rows that run together.
        compute: numbers of rows -> what there is for each of them.
        progress: called with a number of finished rows.

    Returns:
        In the order of the rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def computed(some: list[int]) -> dict[int, V]:
        try:
            groups = [some]
            made = [compute(some)]
        except UnsupportedError:  # the model loses track of which row is whose
            names = dict.fromkeys(adapters[i] for i in some)
            groups = [[i for i in some if adapters[i] == name] for name in names]
            made = [compute(group) for group in groups]
        progress(len(some))
        return dict(zip(itertools.chain(*groups), itertools.chain(*made), strict=True))

    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    found: dict[int, V] = {}
    for values in ranks.computed(batches, computed):
        found |= values
    return [found[i] for i in range(len(lengths))]


def _tags(example: Example, shares: Sequence[Sequence[float]]) -> Prediction:
    """The tag of each word at its first token."""
    by_word = {word: shares[at] for at, word in enumerate(example.labels) if word != IGNORED}
    words = [by_word.get(word) for word in range(max(by_word) + 1)]
    return Prediction(
        [None if each is None else each.index(max(each)) for each in words],
        [None if each is None else max(each) for each in words],
    )


def _example(row: Row) -> Example:
    assert row.example is not None
    return row.example


def _places(record: Record, settings: Settings) -> Any:
    """In place of the right classes: for tags, the number of each word."""
    if settings.task == SEQUENCE:
        return "0"
    words = record.fields.get(WORDS)
    return [str(i) for i in range(len(words))] if isinstance(words, list) else []

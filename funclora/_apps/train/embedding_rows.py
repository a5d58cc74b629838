"""Examples of embeddings: several texts in one row of numbers, and the tensors of a batch of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funclora._apps.train.preference_rows import padded
from funclora._apps.train.records import Record
from funclora._apps.train.rows import Example
from funclora._apps.train.settings import AUTO, COSENT, COSINE, IN_BATCH, TRIPLET
from funclora.errors import FormatError

POSITIVE, NEGATIVE = ("anchor", "positive"), "negative"
SCORED, SCORE = ("sentence1", "sentence2"), "score"
FORMS = {
    AUTO: "anchor and positive, optionally negative; or sentence1, sentence2 and score",
    IN_BATCH: "anchor and positive, optionally negative",
    TRIPLET: "anchor, positive and negative",
    COSINE: "sentence1, sentence2 and score",
    COSENT: "sentence1, sentence2 and score",
}


def fields_of(there: set[str], record: Record, objective: str) -> tuple[str, ...]:
    """The fields that are read from a record.

    Args:
        there: the fields that have a value.
        record: the record, for messages.
        objective: one of `settings.OBJECTIVES`, or `settings.AUTO`.

    Raises:
        FormatError: it lacks fields, or has those of two kinds.
    """
    compared = {*POSITIVE} <= there and objective in (AUTO, IN_BATCH, TRIPLET)
    scored = {*SCORED, SCORE} <= there and objective in (AUTO, COSINE, COSENT)
    if compared and scored:
        raise FormatError(
            f"{record.where}: has pairs with and without scores, which are different kinds of data. Keep one of them."
        )
    if scored:
        return (*SCORED, SCORE)
    if not compared or (objective == TRIPLET and NEGATIVE not in there):
        names = ", ".join(map(repr, sorted(there))) or "no fields"
        raise FormatError(
            f"{record.where}: expected {FORMS[objective]}, got {names}. Fields with other names are given with "
            "--fields anchor=query,positive=answer."
        )
    return (*POSITIVE, NEGATIVE) if NEGATIVE in there else POSITIVE


def texts_of(record: Record, fields: Sequence[str]) -> list[str]:
    """The texts of a record: of a pair, or of an anchor with its positive and its negatives.

    Raises:
        FormatError: a field is no text; only negative may be a list of texts.
    """
    found: list[str] = []
    for name in fields:
        if name == SCORE:
            continue
        value = record.fields[name]
        several = value if name == NEGATIVE and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) for text in several):
            raise FormatError(f"{record.where}: {name}: expected a text, got {reprlib.repr(value)}.")
        found += several
    return found


def score_of(record: Record) -> float:
    """The score of a pair.

    Raises:
        FormatError: it is no number.
    """
    value = record.fields[SCORE]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise FormatError(f"{record.where}: {SCORE}: expected a number, got {reprlib.repr(value)}.")
    return number


def joined(texts: Sequence[Sequence[int]], score: float | None, source: str) -> Example:
    """Several texts as one example."""
    targets = () if score is None else (score,)
    return Example([i for ids in texts for i in ids], [], tuple(map(len, texts)), source, targets)


def parts_of(example: Example) -> list[list[int]]:
    """The ids of each text of an example.

    Examples:
        >>> parts_of(joined([[1, 2], [3]], None, "a"))
        [[1, 2], [3]]
    """
    ends = [sum(example.lengths[: i + 1]) for i in range(len(example.lengths))]
    return [example.ids[end - n : end] for end, n in zip(ends, example.lengths, strict=True)]


def shortened(example: Example, n: int) -> Example:
    """An example with about n tokens, at least one of each text."""
    share = n / max(1, len(example.ids))
    parts = [ids[: max(1, round(len(ids) * share))] for ids in parts_of(example)]
    return replace(example, ids=[i for ids in parts for i in ids], lengths=tuple(map(len, parts)))


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """A batch of embeddings as tensors on the CPU, padded on the right.

    Args:
        examples: with the same number of texts each.
        pad: id of the padding token.

    Returns:
        `input_ids` and `attention_mask`, `[batch, seq]`, of the first texts; `input_ids.1` and `attention_mask.1` of
        the second ones, and so on; and if the texts have scores `labels`, float32 `[batch]`.

    Examples:
        >>> batch = collate([joined([[1, 2], [3]], None, "a"), joined([[4], [5]], None, "b")], pad=0)
        >>> {name: x.tolist() for name, x in batch.items() if name.startswith("input_ids")}
        {'input_ids': [[1, 2], [4, 0]], 'input_ids.1': [[3], [5]]}
    """
    batch: dict[str, Tensor] = {}
    for k, rows in enumerate(zip(*map(parts_of, examples), strict=True)):
        batch[key("input_ids", k)] = padded(list(rows), pad)
        batch[key("attention_mask", k)] = padded([[1] * len(ids) for ids in rows], 0)
    if examples[0].targets:
        batch["labels"] = torch.tensor([example.targets[0] for example in examples])
    return batch


def key(name: str, k: int) -> str:
    """The name of a tensor of the k-th texts of a batch."""
    return f"{name}.{k}" if k else name


def inputs(batch: Any) -> list[tuple[Tensor, Tensor]]:
    """Ids and mask of the first texts of a batch, of the second ones, and so on."""
    n = sum(name.startswith("input_ids") for name in batch)
    return [(batch[key("input_ids", k)], batch[key("attention_mask", k)]) for k in range(n)]

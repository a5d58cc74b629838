"""How well predictions agree with what is right: accuracy, F1, confusion, F1 of spans, correlations of numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

TAG = re.compile(r"O|[BIES](-.+)?")


def confusion(true: Iterable[int], predicted: Iterable[int], classes: int) -> list[list[int]]:
    """How often each class, by row, was predicted as each class, by column.

    Examples:
        >>> confusion([0, 0, 1], [0, 1, 1], classes=2)
        [[1, 1], [0, 1]]
    """
    counts = Counter(zip(true, predicted, strict=True))
    return [[counts[i, j] for j in range(classes)] for i in range(classes)]


def accuracy(table: Sequence[Sequence[int]]) -> float:
    """The share on the diagonal of a confusion.

    Examples:
        >>> accuracy([[3, 1], [0, 4]])
        0.875
    """
    total = sum(map(sum, table))
    return sum(row[i] for i, row in enumerate(table)) / total if total else math.nan


def f1_by_class(table: Sequence[Sequence[int]]) -> list[float | None]:
    """The harmonic mean of precision and recall, 2·tp / (2·tp + fp + fn); None for a class that occurs nowhere.

    Examples:
        >>> f1_by_class([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
        [0.8571428571428571, 0.8888888888888888, None]
    """
    columns = [sum(column) for column in zip(*table, strict=True)]
    counts = [(row[i], sum(row) + columns[i]) for i, row in enumerate(table)]
    return [2 * hits / total if total else None for hits, total in counts]


def macro(values: Iterable[float | None]) -> float:
    """The mean over the classes that occur, each with the same weight.

    Examples:
        >>> macro([1.0, 0.5, None])
        0.75
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


def several_f1(true: Sequence[Sequence[bool]], said: Sequence[Sequence[bool]]) -> tuple[float, list[float | None]]:
    """F1 where a text has several classes: over all decisions (micro), and of each class.

    Args:
        true: whether each text is of each class, `[text][class]`.
        said: the same as predicted.

    Returns:
        The two; None for a class that occurs nowhere.

    Examples:
        >>> several_f1([[True, False], [True, True]], [[True, False], [True, False]])
        (0.8, [1.0, 0.0])
    """
    columns = [*zip(zip(*true, strict=True), zip(*said, strict=True), strict=True)]
    hits = [sum(a and b for a, b in zip(*pair, strict=True)) for pair in columns]
    totals = [sum(map(sum, pair)) for pair in columns]
    by_class = [2 * hit / total if total else None for hit, total in zip(hits, totals, strict=True)]
    return (2 * sum(hits) / sum(totals) if sum(totals) else math.nan), by_class


def pearson(true: Sequence[float], said: Sequence[float]) -> float:
    """The linear correlation of two lists of numbers; NaN if one of them is constant.

    Examples:
        >>> round(pearson([1.0, 2.0, 3.0], [5.0, 7.0, 9.0]), 6)
        1.0
    """
    if not true:
        return math.nan
    parts = []
    for numbers in (true, said):
        mean = math.fsum(numbers) / len(numbers)
        parts.append([number - mean for number in numbers])
    norms = [math.sqrt(math.fsum(x * x for x in part)) for part in parts]
    if not all(norms):
        return math.nan
    return math.fsum(x * y for x, y in zip(*parts, strict=True)) / (norms[0] * norms[1])


def spearman(true: Sequence[float], said: Sequence[float]) -> float:
    """The correlation of ranks of two lists of numbers; equal numbers have the mean of their ranks.

    Examples:
        >>> round(spearman([1.0, 2.0, 30.0], [5.0, 6.0, 7.0]), 6)
        1.0
    """
    return pearson(_ranks(true), _ranks(said))


def _ranks(numbers: Sequence[float]) -> list[float]:
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    ranks = [0.0] * len(numbers)
    first = 0
    for _, group in itertools.groupby(order, key=lambda i: numbers[i]):
        some = [*group]
        for i in some:
            ranks[i] = first + (len(some) - 1) / 2
        first += len(some)
    return ranks


def are_tags(classes: Iterable[str]) -> bool:
    """Whether classes mark spans: `O`, and `B-`, `I-`, `E-` or `S-` with the kind of a span.

    Examples:
        >>> are_tags(["O", "B-PER", "I-PER"]), are_tags(["NOUN", "VERB"])
        (True, False)
    """
    names = [*classes]
    return all(TAG.fullmatch(name) for name in names) and any(name != "O" for name in names)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans that the tags of a text mark: their kind, first and last word.

    As the script conlleval and the package seqeval read IOB1, IOB2 and IOBES: a span begins with `B-` or `S-`, after
    `O` or the end of another span, or where the kind changes.

    Examples:
        >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    found: set[tuple[str, int, int]] = set()
    begin = 0
    parts = [("O", ""), *((tag[0], tag[2:]) for tag in tags), ("O", "")]
    for i, ((before, kind), (here, following)) in enumerate(itertools.pairwise(parts)):
        inside = before != "O"
        ends = inside and (before in "ES" or here in "BSO" or kind != following)
        if ends:
            found.add((kind, begin, i - 1))
        if here != "O" and (not inside or ends):
            begin = i
    return found


class SpanScores(NamedTuple):
    """Agreement of spans.

    Attributes:
        precision: share of the predicted spans that are right, with both ends and the kind.
        recall: share of the right spans that were predicted.
        f1: their harmonic mean.
        by_kind: F1 by kind of span.
    """

    precision: float
    recall: float
    f1: float
    by_kind: dict[str, float]


def span_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> SpanScores:
    """How well the spans of predicted tags agree with the right ones, over all texts.

    Args:
        true: the right tags of each text.
        predicted: the predicted ones.

    Examples:
        >>> span_scores([["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]])
        SpanScores(precision=1.0, recall=0.5, f1=0.6666666666666666, by_kind={'LOC': 0.0, 'PER': 1.0})
    """
    right, said = ({(i, *span) for i, tags in enumerate(texts) for span in spans(tags)} for texts in (true, predicted))
    hits, wanted, given = (Counter(span[1] for span in some) for some in (right & said, right, said))
    kinds = sorted({*wanted, *given})
    by_kind = {kind: 2 * hits[kind] / (wanted[kind] + given[kind]) for kind in kinds}
    n, of, among = len(right & said), len(right), len(said)
    return SpanScores(
        n / among if among else 0.0, n / of if of else 0.0, 2 * n / (of + among) if of + among else 0.0, by_kind
    )

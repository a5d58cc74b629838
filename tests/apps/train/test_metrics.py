"""Metrics of classes and of spans, against their definitions written out."""

from __future__ import annotations

import itertools
import random

import pytest

from funclora._apps.train.metrics import accuracy, confusion, f1_by_class, macro, span_scores, spans


def test_f1_is_that_of_precision_and_recall() -> None:
    chance = random.Random(0)
    for n in (1, 5, 60):
        true, said = ([chance.randrange(4) for _ in range(n)] for _ in range(2))
        table = confusion(true, said, 5)
        assert accuracy(table) == pytest.approx(sum(a == b for a, b in zip(true, said, strict=True)) / n)
        found = f1_by_class(table)
        for k in range(5):
            right = sum(a == b == k for a, b in zip(true, said, strict=True))
            of, given = true.count(k), said.count(k)
            if not of and not given:
                assert found[k] is None
            elif not right:
                assert found[k] == 0
            else:
                precision, recall = right / given, right / of
                assert found[k] == pytest.approx(2 * precision * recall / (precision + recall))
        known = [value for value in found if value is not None]
        assert macro(found) == pytest.approx(sum(known) / len(known))


def of_conlleval(tags: list[str]) -> set[tuple[str, int, int]]:
    """Spans by the rules of conlleval as its tables have them: which pairs of tags end a span, and which begin one."""
    found, start = set(), 0
    before, kind = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        here, own = tag[0], tag[2:]
        if before + here in ("BB", "BO", "BS", "IB", "IO", "IS") or before in "ES" or (before != "O" and kind != own):
            found.add((kind, start, i - 1))
        if here in "BS" or before + here in ("EE", "EI", "SE", "SI", "OE", "OI") or (here != "O" and kind != own):
            start = i
        before, kind = here, own
    return found


def test_spans_are_those_of_conlleval() -> None:
    """Of every sequence of three tags, and of long ones."""
    tags = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("LOC", "PER"))]
    for some in itertools.product(tags, repeat=3):
        assert spans(some) == of_conlleval([*some]), some
    chance = random.Random(0)
    for _ in range(200):
        some_ = [chance.choice(tags) for _ in range(12)]
        assert spans(some_) == of_conlleval(some_), some_
    assert spans(["B", "I", "O", "I"]) == {("", 0, 1), ("", 3, 3)}


def test_f1_of_spans_is_that_of_seqeval() -> None:
    """The example of seqeval's documentation, and what it says of it."""
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = span_scores(true, said)
    assert (found.precision, found.recall, found.f1) == (0.5, 0.5, 0.5)
    assert found.by_kind == {"MISC": 0.0, "PER": 1.0}
    assert span_scores([["O"]], [["O"]]).f1 == 0

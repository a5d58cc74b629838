"""Examples of preferences: two answers in one row of numbers, and the tensors of a batch of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from funclora._apps.train.rows import IGNORED, Example


def compared(chosen: Example, rejected: Example) -> Example:
    """Two answers as one example."""
    lengths = (len(chosen.ids), len(rejected.ids))
    return Example(chosen.ids + rejected.ids, chosen.labels + rejected.labels, lengths, chosen.source)


def judged(answer: Example, good: bool) -> Example:
    """One answer as an example: a pair without a counterpart."""
    n = len(answer.ids)
    return Example(answer.ids, answer.labels, (n, 0) if good else (0, n), answer.source)


def halves(example: Example) -> list[Example]:
    """The answers of an example, each with its prompt; the chosen one first.

    Examples:
        >>> pair = compared(Example([1, 2], [-100, 2], (2,), "a"), Example([1, 3], [-100, 3], (2,), "a"))
        >>> [half.ids for half in halves(pair)], [half.ids for half in halves(judged(halves(pair)[1], False))]
        ([[1, 2], [1, 3]], [[1, 3]])
    """
    first, _ = example.lengths
    cuts = [slice(0, first), slice(first, None)]
    return [
        Example(example.ids[cut], example.labels[cut], (n,), example.source)
        for cut, n in zip(cuts, example.lengths, strict=True)
        if n
    ]


def collate(examples: Sequence[Example], *, pad: int, context: int | None = None, group: int = 0) -> dict[str, Tensor]:
    """A batch of preferences as tensors on the CPU, padded on the right.

    Args:
        examples: of pairs, or of single answers.
        pad: id of the padding token.
        context: maximum length of a row.
        group: of single answers, so many that follow each other get their other prompts from each other; 0 for all.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[batch, 2, seq]`: the chosen and the rejected answer. Of single
        answers, the second row has the prompt of one with the answer of the one before (KTO's estimate of the KL
        divergence), and is missing if there is no other; and there is `desirable`, bool `[batch]`.

    Examples:
        >>> pair = compared(Example([1, 2], [-100, 2], (2,), "a"), Example([1], [1], (1,), "a"))
        >>> {name: x.tolist() for name, x in collate([pair], pad=0).items()}
        {'input_ids': [[[1, 2], [1, 0]]], 'labels': [[[-100, 2], [1, -100]]], 'attention_mask': [[[1, 1], [1, 0]]]}
    """
    rows = [halves(example) for example in examples]
    verdicts = {}
    if len(rows[0]) == 1:
        verdicts["desirable"] = torch.tensor([example.lengths[0] > 0 for example in examples])
        group = group or len(rows)
        alone = [row[0] for row in rows]
        if group > 1:
            before = [i - i % group + (i - 1) % group for i in range(len(rows))]
            rows = [[own, _elsewhere(own, alone[k])] for own, k in zip(alone, before, strict=True)]
    flat = [half for row in rows for half in row]
    ids = [half.ids[:context] for half in flat]
    labels = [half.labels[:context] for half in flat]
    found = {
        "input_ids": padded(ids, pad),
        "labels": padded(labels, IGNORED),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }
    return {name: x.unflatten(0, (len(rows), -1)) for name, x in found.items()} | verdicts


def _elsewhere(own: Example, other: Example) -> Example:
    """The answer of another example after the prompt of this one."""
    start, begin = _start(own), _start(other)
    return Example(own.ids[:start] + other.ids[begin:], own.labels[:start] + other.labels[begin:], (0,), own.source)


def _start(answer: Example) -> int:
    """Where the answer begins."""
    return next(i for i, label in enumerate(answer.labels) if label != IGNORED)


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of numbers as a tensor, int64."""
    return torch.tensor(list(itertools.zip_longest(*rows, fillvalue=fill)), dtype=torch.int64).T.contiguous()

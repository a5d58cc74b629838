"""Examples of preferences: two answers in one row of numbers, and the tensors of a batch of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from funclora._apps.train.packing import joined, positions
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


def alone(row: Example) -> list[Example]:
    """The examples of a row, of which packing puts several into it.

    Examples:
        >>> pair = compared(Example([1, 2], [-100, 2], (2,), "a"), Example([1, 3], [-100, 3], (2,), "a"))
        >>> alone(joined([pair, pair])) == [pair, pair]
        True
    """
    found, start = [], 0
    for lengths in zip(row.lengths[::2], row.lengths[1::2], strict=True):
        end = start + sum(lengths)
        found.append(replace(row, ids=row.ids[start:end], labels=row.labels[start:end], lengths=lengths))
        start = end
    return found


def whole(row: Example) -> Example:
    """The examples of a row as one, with their first answers as the first, and their second ones as the second."""
    sides = [joined(side) for side in zip(*map(halves, alone(row)), strict=True)]
    return judged(sides[0], good=True) if len(sides) == 1 else compared(*sides)


def collate(
    examples: Sequence[Example], *, pad: int, packed: bool = False, context: int | None = None, group: int = 0
) -> dict[str, Tensor]:
    """A batch of preferences as tensors on the CPU, padded on the right.

    Args:
        examples: of pairs, or of single answers.
        pad: id of the padding token.
        packed: whether a row may have several of them.
        context: maximum length of an answer with its prompt.
        group: of single answers, so many rows after each other get their other prompts from each other; 0 for all.

    Returns:
        `input_ids`, `attention_mask` and `labels`, `[batch, 2, seq]`: the chosen and the rejected answer. Of single
        answers, the second row has the prompt of one with the answer of the one before (KTO's estimate of the KL
        divergence), and no label if there is no other; and there is `desirable`, bool `[batch]`. Packed rows have
        `position_ids`, which restart at 0 with each answer, instead of the mask; `pairs`, bool `[batch, most]`, which
        of the answers there are, since rows have different numbers of them; and `desirable` is `[batch, most]`.

    Examples:
        >>> pair = compared(Example([1, 2], [-100, 2], (2,), "a"), Example([1], [1], (1,), "a"))
        >>> {name: x.tolist() for name, x in collate([pair], pad=0).items()}
        {'input_ids': [[[1, 2], [1, 0]]], 'labels': [[[-100, 2], [1, -100]]], 'attention_mask': [[[1, 1], [1, 0]]]}
    """
    rows = [alone(row) if packed else [row] for row in examples]
    answers = [[halves(example) for example in row] for row in rows]
    found = {}
    if len(answers[0][0]) == 1:
        size = group or len(answers)
        for start in range(0, len(answers), size):
            _add_others([sides for row in answers[start : start + size] for sides in row])
        good = [[int(example.lengths[0] > 0) for example in row] for row in rows]
        found["desirable"] = padded(good, 0).bool() if packed else torch.tensor(good).bool().flatten()
    if packed:
        found["pairs"] = padded([[1] * len(row) for row in rows], 0).bool()
    flat = [joined([_cut(sides[k], context) for sides in row]) for row in answers for k in (0, 1)]
    sides = {"input_ids": padded([x.ids for x in flat], pad), "labels": padded([x.labels for x in flat], IGNORED)}
    if packed:
        sides["position_ids"] = restarting(flat)
    else:
        sides["attention_mask"] = padded([[1] * len(x.ids) for x in flat], 0)
    return {name: x.unflatten(0, (len(rows), 2)) for name, x in sides.items()} | found


def _cut(answer: Example, context: int | None) -> Example:
    ids = answer.ids[:context]
    return replace(answer, ids=ids, labels=answer.labels[:context], lengths=(len(ids),))


def _add_others(answers: list[list[Example]]) -> None:
    """Give each answer its second side: the answer before it, after its own prompt."""
    own = [first for (first,) in answers]
    for sides, before in zip(answers, [own[-1], *own[:-1]], strict=True):
        first = sides[0]
        nothing = Example(first.ids[:1], [IGNORED], (1,), first.source)
        sides.append(_elsewhere(first, before) if len(own) > 1 else nothing)


def _elsewhere(own: Example, other: Example) -> Example:
    """The answer of another example after the prompt of this one."""
    start, begin = _start(own), _start(other)
    return Example(own.ids[:start] + other.ids[begin:], own.labels[:start] + other.labels[begin:], (0,), own.source)


def _start(answer: Example) -> int:
    """Where the answer begins."""
    return next(i for i, label in enumerate(answer.labels) if label != IGNORED)


def restarting(rows: Sequence[Example]) -> Tensor:
    """The position of each token in its example, int64 `[batch, seq]`; padding is one more example."""
    longest = max(len(row.ids) for row in rows)
    return torch.tensor([positions((*row.lengths, longest - len(row.ids))) for row in rows])


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of numbers as a tensor, int64."""
    return torch.tensor(list(itertools.zip_longest(*rows, fillvalue=fill)), dtype=torch.int64).T.contiguous()

"""A row: the input of a model, and its labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# The label of positions without loss, as in torch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A row: the input of the model, and its labels.

    Attributes:
        ids: what the model reads (seq2seq: the encoder).
        labels: causal-lm: as long as `ids`, the id where there is loss and `IGNORED` elsewhere, not shifted, as
            transformers has them; token-classification: the class or `IGNORED` for each id; sequence-classification:
            one class, or none if there are `targets`; seq2seq: the decoder's ids.
        lengths: of the examples packed into it, in order; a single length if there is one example. Preferences: of the
            chosen and the rejected answer with their prompt; one is 0 if there is a single answer.
        source: its source, such as "train.jsonl:17".
        targets: sequence-classification: instead of a class, what each output of the head shall be: the number itself,
            or for several classes 1 for those of the text and 0 for the others.
        segments: of a pair of texts, which one each id belongs to, if the tokenizer says so.
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]
    source: str
    targets: tuple[float, ...] = ()
    segments: tuple[int, ...] = ()


def common(ids: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two sequences.

    Examples:
        >>> common([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = zip(ids, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

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
            one class; seq2seq: the decoder's ids.
        lengths: of the examples packed into it, in order; a single length if there is one example.
        source: its source, such as "train.jsonl:17".
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]
    source: str


def common(ids: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common prefix of two sequences.

    Examples:
        >>> common([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = zip(ids, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

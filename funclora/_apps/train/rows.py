"""A row: what a model reads, and what it should say."""

from __future__ import annotations

from dataclasses import dataclass

# A label where there is no loss, as in torch and transformers.
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A row that the model reads, and what it should say.

    Attributes:
        ids: what the model reads (seq2seq: the encoder).
        labels: causal-lm: as long as `ids`, the id where there is loss and `IGNORED` elsewhere, not shifted, as
            transformers has them; token-classification: the class or `IGNORED` for each id; sequence-classification:
            one class; seq2seq: the decoder's ids.
        lengths: of the examples that are packed into it, in order; one for an example that is alone.
        source: where it is from, such as "train.jsonl:17".
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]
    source: str

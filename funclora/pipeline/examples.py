"""What a run reads, as token ids: from the settings and a tokenizer to training and validation examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from funclora.pipeline.settings import Settings

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


@dataclass(frozen=True)
class Data:
    """All examples of a run.

    Attributes:
        train: to learn from.
        validation: to evaluate on; may be empty.
        classes: names of the classes, by number; empty for tasks without.
        notes: what was cut, skipped or held out, and how many.
    """

    train: list[Example]
    validation: list[Example]
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """SHA-256 of the examples and classes, in hexadecimal: alike if and only if a run sees the same data."""
        raise NotImplementedError


def prepare(settings: Settings, tokenizer: Any, limit: int | None) -> Data:
    """Read and tokenise the data of a run.

    Args:
        settings: the run's.
        tokenizer: transformers' tokenizer, or one that is called like it.
        limit: the model's longest context in tokens; None if it has none.

    Raises:
        ConfigError: a setting does not fit the data, the tokenizer or the model.
        FormatError: a file cannot be read; file and line are named.
        UnsupportedError: the tokenizer's chat template cannot tell which tokens are the assistant's.
    """
    raise NotImplementedError

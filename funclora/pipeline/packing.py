"""Several examples in one row, each of which sees itself only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from funclora.pipeline.examples import Example


def pack(examples: Sequence[Example], context: int) -> list[Example]:
    """Rows of at most `context` tokens, with as many examples as fit: first fit, longest first."""
    raise NotImplementedError


def check_packing(logits: Callable[[dict[str, Tensor]], Tensor], vocab: int, what: str) -> None:
    """Refuse a model that lets the examples of a row see each other, by trying it out on a few tokens.

    Args:
        logits: a batch without labels -> `[batch, seq, vocab]`; the model under test.
        vocab: how many token ids it knows.
        what: names the model in the error.

    Raises:
        UnsupportedError: the logits of an example in a packed row are not those of the example alone.
    """
    raise NotImplementedError

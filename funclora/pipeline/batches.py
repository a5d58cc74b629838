"""Examples as tensors: rows that are padded, and the batches of each step as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from funclora.pipeline.examples import Example


def collate(examples: Sequence[Example], *, pad: int, task: str) -> dict[str, Tensor]:
    """Rows as tensors on the CPU, int64, padded on the right.

    Args:
        examples: the rows.
        pad: token id that fills up.
        task: one of `settings.TASKS`.

    Returns:
        `input_ids: [batch, seq]`; `labels`: `[batch, seq]` (seq2seq: the decoder's `[batch, seq']`) padded with
        `IGNORED`, or `[batch]` for sequence-classification; and either `attention_mask: [batch, seq]` or, if a row has
        several examples, `position_ids: [batch, seq]`, which restart at 0 with each example. Call the model with
        just what is there (but labels): transformers takes restarting positions without an `attention_mask` for
        examples that do not see each other. Padding is then one more such example.
    """
    raise NotImplementedError


class Batches:
    """The batches of each optimizer step: a pure function of data, seed and step.

    Args:
        examples: the rows.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        seed: of the order; each epoch has its own permutation.
        pad: token id that fills up.
        task: one of `settings.TASKS`.

    Attributes:
        steps_per_epoch: `ceil(len(examples) / (batch * accumulation))`; the last step of an epoch may be smaller.
    """

    steps_per_epoch: int

    def __init__(
        self, examples: Sequence[Example], *, batch: int, accumulation: int, seed: int, pad: int, task: str
    ) -> None:
        raise NotImplementedError

    def step(self, k: int) -> list[dict[str, Tensor]]:
        """The micro-batches of step k, which counts from 0 over all epochs."""
        raise NotImplementedError

    def sources(self, k: int) -> list[str]:
        """Where the rows of step k are from."""
        raise NotImplementedError


def evaluation(examples: Sequence[Example], *, batch: int, pad: int, task: str) -> Iterator[dict[str, Tensor]]:
    """Every row once, in batches of similar lengths."""
    raise NotImplementedError

"""Examples as tensors: rows that are padded, and the batches of each step as a pure function of seed and step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from funclora._apps.train import embedding_rows, preference_rows
from funclora._apps.train.packing import is_packed
from funclora._apps.train.preference_rows import padded, restarting
from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import EMBEDDING, PREFERENCE, SEQUENCE, Settings
from funclora._apps.train.stored import sizes
from funclora._init.fresh import generator_of
from funclora.errors import ConfigError


def collate(
    examples: Sequence[Example],
    *,
    pad: int,
    task: str,
    packed: bool | None = None,
    context: int | None = None,
    group: int = 0,
) -> dict[str, Tensor]:
    """Rows as tensors on the CPU, int64, padded on the right.

    Args:
        examples: the rows.
        pad: id of the padding token.
        task: one of `settings.TASKS`.
        packed: give `position_ids`; None: if a row has several examples.
        context: of preferences, as for `preference_rows.collate`.
        group: of preferences, as for `preference_rows.collate`.

    Returns:
        For preferences and embeddings, as from the `collate` of their rows. Otherwise
        `input_ids: [batch, seq]`; `labels`: `[batch, seq]` (seq2seq: the decoder's `[batch, seq']`) padded with
        `IGNORED`, or for sequence-classification `[batch]`, or `[batch, outputs]` in float32 if they are `targets`;
        `token_type_ids: [batch, seq]` if a row has `segments`; and either `attention_mask: [batch, seq]` or, if packed,
        `position_ids: [batch, seq]`, which restart at 0 with each example. Call the model with exactly these keys
        (except labels): transformers treats restarting positions without an `attention_mask` as examples that do not
        attend to each other. Padding is then one more such example.

    Examples:
        >>> rows = [Example([5, 6, 7], [-100, 6, 7], (3,), "a"), Example([8], [8], (1,), "b")]
        >>> {name: tensor.tolist() for name, tensor in collate(rows, pad=0, task="causal-lm").items()}
        {'input_ids': [[5, 6, 7], [8, 0, 0]], 'labels': [[-100, 6, 7], [8, -100, -100]],
         'attention_mask': [[1, 1, 1], [1, 0, 0]]}
    """
    if task == EMBEDDING:
        return embedding_rows.collate(examples, pad)
    if task == PREFERENCE:
        packed = is_packed(examples, task) if packed is None else packed
        return preference_rows.collate(examples, pad=pad, packed=packed, context=context, group=group)
    batch = {"input_ids": padded([row.ids for row in examples], pad)}
    if task == SEQUENCE:
        targets = [row.targets for row in examples]
        batch["labels"] = torch.tensor(targets if targets[0] else [row.labels[0] for row in examples])
    else:
        batch["labels"] = padded([row.labels for row in examples], IGNORED)
    if any(row.segments for row in examples):
        batch["token_type_ids"] = padded([[*row.segments] for row in examples], 0)
    if is_packed(examples, task) if packed is None else packed:
        batch["position_ids"] = restarting(examples)
    else:
        batch["attention_mask"] = padded([[1] * len(row.ids) for row in examples], 0)
    return batch


WHOLE = slice(None)

# Of each part of the examples, in order: how many they are, and how often each is in an epoch.
Shares = Sequence[tuple[int, float]]


class Batches:
    """The batches of each optimizer step: a pure function of data, seed and step.

    Args:
        examples: the rows.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        seed: of the order; each epoch has its own permutation.
        pad: id of the padding token.
        task: one of `settings.TASKS`.
        shares: parts with weights; without, each row is in each epoch once. Of a part with weight 0.5, an epoch has
            one half and the next the other.
        context: as for `collate`.

    Attributes:
        steps_per_epoch: `ceil(rows of an epoch / (batch * accumulation))`; the last step of an epoch may be smaller.

    Raises:
        ConfigError: there are no rows, or `batch` or `accumulation` is not positive.

    Examples:
        >>> rows = [Example([i, i], [i, i], (2,), f"t.jsonl:{i}") for i in range(3)]
        >>> batches = Batches(rows, batch=2, accumulation=1, seed=0, pad=0, task="causal-lm")
        >>> batches.steps_per_epoch, sorted(batches.sources(0) + batches.sources(1))
        (2, ['t.jsonl:0', 't.jsonl:1', 't.jsonl:2'])
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        accumulation: int,
        seed: int,
        pad: int,
        task: str,
        shares: Shares = (),
        context: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("accumulation", accumulation)):
            if value < 1:
                raise ConfigError(f"{name}: expected 1 or more, got {value}.")
        if not examples:
            raise ConfigError("examples: there are no examples to train on.")
        shares = shares or [(len(examples), 1)]
        self._taken = [(n, max(1, round(n * weight)) if n else 0) for n, weight in shares]
        self.steps_per_epoch = math.ceil(sum(taken for _, taken in self._taken) / (batch * accumulation))
        self._examples, self._batch, self._rows = examples, batch, batch * accumulation
        self._seed, self._pad, self._task, self._packed = seed, pad, task, is_packed(examples, task)
        self._context = context
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # of the most recently used epoch

    @classmethod
    def of(cls, settings: Settings, examples: Sequence[Example], pad: int, shares: Shares = ()) -> Batches:
        """The batches of a run."""
        return cls(
            examples,
            batch=settings.batch,
            accumulation=settings.accumulation,
            seed=settings.seed,
            pad=pad,
            task=settings.task,
            shares=shares,
            context=settings.context,
        )

    def step(self, k: int, part: slice = WHOLE) -> list[dict[str, Tensor]]:
        """The micro-batches of step k, which counts from 0 over all epochs, or a part of them."""
        rows = self.rows(k, part)
        return [
            collate(
                rows[start : start + self._batch],
                pad=self._pad,
                task=self._task,
                packed=self._packed,
                context=self._context,
            )
            for start in range(0, len(rows), self._batch)
        ]

    def sources(self, k: int) -> list[str]:
        """The sources of the rows of step k."""
        return [row.source for row in self.rows(k)]

    def size(self, k: int) -> int:
        """The number of micro-batches of step k."""
        return math.ceil(len(self._numbers(k)) / self._batch)

    def rows(self, k: int, part: slice = WHOLE) -> list[Example]:
        """The rows of step k, or of a part of its micro-batches."""
        first, last, _ = part.indices(self.size(k))
        return [self._examples[j] for j in self._numbers(k)[first * self._batch : last * self._batch].tolist()]

    def _numbers(self, k: int) -> Tensor:
        """The rows of step k by their numbers."""
        if k < 0:
            raise ConfigError(f"step: expected 0 or more, got {k}.")
        epoch, i = divmod(k, self.steps_per_epoch)
        order = self._order  # read once: another thread may use another epoch
        if order[0] != epoch:
            self._order = order = epoch, self._shuffled(epoch)
        return order[1][i * self._rows : (i + 1) * self._rows]

    def _shuffled(self, epoch: int) -> Tensor:
        """The rows of an epoch, in order."""
        first, parts = 0, []
        for part, (n, taken) in enumerate(self._taken):
            parts.append(first + self._stretch(part, n, epoch * taken, (epoch + 1) * taken))
            first += n
        rows = torch.cat(parts)
        return rows[torch.randperm(len(rows), generator=generator_of(self._seed, f"order of epoch {epoch}"))]

    def _stretch(self, part: int, n: int, start: int, end: int) -> Tensor:
        """A stretch of an endless sequence of a part's rows: all of them in one order, then in another, and so on."""
        if end - start == n:
            return torch.arange(n)
        rounds = [
            torch.randperm(n, generator=generator_of(self._seed, f"round {k} of part {part}"))
            for k in range(start // n, -(-end // n))
        ]
        return torch.cat(rounds)[start - start // n * n :][: end - start] if rounds else torch.arange(0)


def evaluation(
    examples: Sequence[Example], *, batch: int, pad: int, task: str, part: slice = WHOLE
) -> Iterator[dict[str, Tensor]]:
    """Every row once, in batches of similar lengths, the longest first, so that memory runs out first or never.

    Args:
        examples: the rows.
        batch: rows of a batch.
        pad: as for `collate`.
        task: as for `collate`.
        part: which of the batches.
    """
    packed = is_packed(examples, task)
    lengths = [(int(ids), int(labels)) for ids, labels in sizes(examples)]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    for start in range(0, len(order), batch)[part]:
        rows = [examples[i] for i in order[start : start + batch]]
        yield collate(rows, pad=pad, task=task, packed=packed)

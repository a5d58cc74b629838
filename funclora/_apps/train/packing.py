"""Several examples in one row; each attends only to itself.

transformers computes the attention of such rows itself: restarting positions, without an `attention_mask`, mark
examples that do not attend to each other (`transformers.masking_utils.find_packed_sequence_indices`), with every kind
of attention and with sliding windows. But a model must pass its positions to the mask, and not all do: OPT embeds them
and still attends across the boundaries, and a state space model carries its state across them. So the model is tested.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, overload

from funclora._apps.train.rows import IGNORED, Example
from funclora._apps.train.settings import EMBEDDING, PREFERENCE
from funclora._apps.train.stored import Stored, sizes
from funclora.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class Packed(Sequence[Example]):
    """Rows of several examples, joined when a row is asked for.

    Args:
        examples: of one example each.
        rows: the numbers of each row's examples.
    """

    def __init__(self, examples: Sequence[Example], rows: list[list[int]]) -> None:
        self.examples, self._rows = examples, rows
        self.packed = any(len(row) > 1 for row in rows)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The numbers of ids and labels of each row."""
        lengths = [int(n) for n, _ in sizes(self.examples)]
        return [(total, total) for row in self._rows for total in [sum(lengths[i] for i in row)]]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Packed: ...
    def __getitem__(self, i: int | slice) -> Example | Packed:
        if isinstance(i, slice):
            return Packed(self.examples, self._rows[i])
        return joined([self.examples[k] for k in self._rows[i]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


def pack(examples: Sequence[Example], context: int) -> Packed:
    """Rows of at most `context` tokens: the longest example first, each in the fullest row that has room for it.

    The first token of an example has no loss in its row, as it has none alone: nothing comes before it.

    Args:
        examples: of one example each; not changed.
        context: maximum length of a row in tokens.

    Raises:
        ConfigError: an example is longer than a row.

    Examples:
        >>> texts = [Example([i] * n, [i] * n, (n,), f"t:{i}") for i, n in enumerate([3, 5, 2, 4])]
        >>> [(row.ids, row.lengths) for row in pack(texts, context=7)]
        [([1, 1, 1, 1, 1, 2, 2], (5, 2)), ([3, 3, 3, 3, 0, 0, 0], (4, 3))]
    """
    rows: list[list[int]] = []
    open_: dict[int, deque[int]] = {}  # rows by their remaining room
    rooms: list[int] = []  # these, sorted
    lengths = widths(examples)
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[example]
        if length > context:
            raise ConfigError(f"{examples[example].source}: has {length} tokens, but a row can have {context}.")
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_[room].popleft()
            if not open_[room]:
                del open_[room], rooms[at]
            rows[row].append(example)
        else:
            room, row = context, len(rows)
            rows.append([example])
        left = room - length
        if left not in open_:
            open_[left] = deque()
            bisect.insort(rooms, left)
        open_[left].append(row)
    return Packed(examples, rows)


def widths(examples: Sequence[Example]) -> list[int]:
    """The tokens that each example takes of a row. Two answers are in two rows side by side: the longer one counts."""
    if len(examples) and len(examples[0].lengths) == 2:
        return [max(example.lengths) for example in examples]
    return [int(n) for n, _ in sizes(examples)]


def joined(row: Sequence[Example]) -> Example:
    """Several examples as one row."""
    if len(row) == 1:
        return row[0]
    return Example(
        ids=[i for example in row for i in example.ids],
        labels=[i for example in row for i in _following(example)],
        lengths=tuple(length for example in row for length in example.lengths),
        source=", ".join(dict.fromkeys(example.source for example in row)),
    )


def _following(example: Example) -> list[int]:
    """The labels of an example in a row of several; those of two answers are changed when each gets its own row."""
    return example.labels if len(example.lengths) > 1 else [IGNORED, *example.labels[1:]]


def is_packed(examples: Sequence[Example], task: str) -> bool:
    """Whether a row contains several examples."""
    if isinstance(examples, Stored) or task == EMBEDDING:
        return False
    alone = 2 if task == PREFERENCE else 1  # lengths of an example
    return examples.packed if isinstance(examples, Packed) else any(len(row.lengths) > alone for row in examples)


def positions(lengths: Iterable[int]) -> list[int]:
    """Position of each token in its example.

    Examples:
        >>> positions((2, 3))
        [0, 1, 0, 1, 2]
    """
    return [i for length in lengths for i in range(length)]


def check_packing(logits: Callable[[dict[str, Tensor]], Tensor], vocab: int, what: str) -> None:
    """Refuse a model that does not give packed examples the same logits as alone; this is tested by running it.

    Args:
        logits: a batch of `collate` without labels -> `[batch, seq, vocab]`; the model under test, without dropout.
        vocab: number of its token ids.
        what: name of the model, for the error.

    Raises:
        UnsupportedError: examples in a row attend to each other, or positions do not restart.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocab, (1, n), generator=generator) for n in (5, 5, 7))
    at = {"position_ids": torch.tensor([positions((5, 7))])}
    remedy = f"{what}: this model cannot train on packed rows"
    try:
        with torch.no_grad():
            row, changed = (logits({"input_ids": torch.cat([x, second], 1), **at})[:, 5:] for x in (first, other))
            alone = logits({"input_ids": second, "attention_mask": torch.ones_like(second)})
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedError(f"{remedy}: {' '.join(str(error).split())} Turn packing off.") from error
    if not torch.equal(row, changed):
        raise UnsupportedError(f"{remedy}: an example's logits depend on the one before it. Turn packing off.")
    # Up to rounding in the dtype: rows of other lengths are computed in another order.
    scale = alone.float().abs().max().item() * torch.finfo(alone.dtype).eps ** 0.5
    if not torch.allclose(row.float(), alone.float(), rtol=0, atol=scale):
        raise UnsupportedError(f"{remedy}: its positions do not restart with each example. Turn packing off.")

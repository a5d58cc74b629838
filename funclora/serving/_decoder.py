"""What the engine's thread does: it reads prompts, and decodes one token of every row at each step."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator

from torch import Tensor

from funclora.errors import NonFiniteError, UnsupportedError
from funclora.serving._batch import Batch, Models, Row
from funclora.serving._memory import Cached
from funclora.serving._prefixes import Prefixes
from funclora.serving._reader import Reader
from funclora.serving._sampling import choose
from funclora.serving._statistics import Counts
from funclora.serving._stream import FinishReason, Token


class Decoder:
    """Rows that come and go. Used by one thread.

    Args:
        reader: of the model.
        models: gives the model with an adapter for each row.
        counts: what it did is added to these.
        eos_ids: tokens that end every answer.
        prefill_tokens: maximum number of prompt tokens that are read at one step.
        prefixes: beginnings of prompts, in pieces of at most `prefill_tokens`; None if they are not shared.
    """

    def __init__(
        self,
        reader: Reader,
        models: Models,
        counts: Counts,
        eos_ids: Collection[int],
        prefill_tokens: int,
        prefixes: Prefixes | None,
    ) -> None:
        self._reader, self._models, self._counts = reader, models, counts
        self._eos_ids, self._prefill_tokens, self._prefixes = eos_ids, prefill_tokens, prefixes
        self._unread: deque[Row] = deque()
        self._partial: Batch | None = None
        self._batches: list[Batch] = []
        self._apart = False  # rows of different adapters cannot be read together

    def rows(self) -> list[Row]:
        """Those that have not ended."""
        batches = [*self._batches, *([self._partial] if self._partial else [])]
        return [*self._unread, *(row for batch in batches for row in batch.rows)]

    def add(self, row: Row) -> None:
        """Answer a request whose adapter is there."""
        row.stream._begin()
        self._unread.append(row)

    def step(self) -> None:
        """Read a part of the prompts that are not read, then one token of every other row."""
        self._read_prompts()
        for batch in self._batches:
            self._leave(batch)
            if batch.rows:
                with self._guarded(batch):
                    self._take(batch, batch.read())
                self._leave(batch)
                self._counts.add(steps=1)
        self._batches = [batch for batch in self._batches if batch.rows]

    def finish(self, row: Row, reason: FinishReason | None, error: BaseException | None = None) -> None:
        """End an answer that has not ended."""
        if not row.stream.done:
            self._counts.ended(reason or "error")
            row.stream._finish(reason, error)

    def _read_prompts(self) -> None:
        left = self._prefill_tokens
        while left > 0 and (self._partial or self._unread):
            batch = self._partial or self._gathered(left)
            self._partial = None
            self._leave(batch)
            if not batch.rows:
                continue
            whole = False
            with self._guarded(batch):
                self._take_over(batch)
                count = self._count(batch, left)
                if count == 0:  # the next step has room for a whole piece
                    self._partial = batch
                    break
                before = sum(row.read for row in batch.rows)
                logits = batch.read(count)
                read = sum(row.read for row in batch.rows) - before
                left -= read
                self._counts.add(prompt_tokens=read)
                whole = batch.is_read
                if whole:
                    self._keep(batch)
                    self._take(batch, logits)
            self._leave(batch)
            if batch.rows and whole:
                self._join(batch)
            elif batch.rows:
                self._partial = batch

    def _gathered(self, most: int) -> Batch:
        """The next rows to be read: as many as may be read together, of at most so many tokens with the padding."""
        rows = [self._unread.popleft()]
        while self._unread and self._reader.decodes != "one":
            some = [*rows, self._unread[0]]
            lengths = {len(row.text) for row in some}
            mixes = self._reader.pads and self._reader.decodes == "any"
            if (len(lengths) > 1 and not mixes) or len(some) * max(lengths) > most:
                break
            if len({self._kin(row) for row in some}) > 1:
                break
            if self._prefixes and max(lengths) > self._prefixes.piece:  # its beginning can be shared
                break
            rows.append(self._unread.popleft())
        return Batch(rows, self._reader.memory(), self._models)

    def _count(self, batch: Batch, left: int) -> int | None:
        """How many tokens of each prompt of a batch are read now, of so many at most; None for all of them."""
        if not self._reader.pieces or len(batch.rows) > 1:
            return None
        if self._prefixes is None:
            return left
        piece = min(self._prefixes.piece, len(batch.rows[0].text) - batch.rows[0].read)
        return piece if piece <= left else 0

    def _take_over(self, batch: Batch) -> None:
        """What is known of the beginning of a prompt of which nothing was read."""
        row = batch.rows[0]
        if self._prefixes and not row.read and len(batch.rows) == 1 and isinstance(batch.memory, Cached):
            row.read = self._prefixes.take(row.adapter, row.text, batch.memory)
            if row.read:
                self._counts.add(prefix_hits=1, prefix_tokens=row.read)

    def _keep(self, batch: Batch) -> None:
        """What is known of a prompt now, for others that begin in the same way."""
        if self._prefixes and len(batch.rows) == 1 and isinstance(batch.memory, Cached):
            self._prefixes.put(batch.rows[0].adapter, batch.rows[0].text, batch.memory)

    def _kin(self, row: Row) -> object:
        """Equal for rows that may be together, whatever their lengths are."""
        return row.adapter if row.apart or self._apart else self

    def _join(self, batch: Batch) -> None:
        """Add rows whose prompts are read to those that they may be decoded with."""
        for other in self._batches:
            alike = {
                "any": True,
                "equal": other.memory.lengths[:1] == batch.memory.lengths[:1],
                "one": False,
            }[self._reader.decodes]
            if other.rows and alike and self._kin(other.rows[0]) is self._kin(batch.rows[0]):
                other.join(batch)
                return
        self._batches.append(batch)

    def _take(self, batch: Batch, logits: Tensor) -> None:
        """Choose the next token of each row of a batch."""
        tokens = choose(logits, [row.chooser for row in batch.rows])
        for row, token in zip(batch.rows, tokens, strict=True):
            if isinstance(token, NonFiniteError):
                self.finish(row, None, token)
            else:
                self._put(row, token)

    def _put(self, row: Row, token: Token) -> None:
        row.text.append(token.id)
        row.count += 1
        self._counts.add(generated_tokens=1)
        try:
            row.stream._put(token)
        except Exception as error:  # noqa: BLE001  a callback may raise any error
            self.finish(row, None, error)
        if row.count == 1 and row.stream.first_token_seconds is not None:
            self._counts.first_token(row.stream.first_token_seconds)
        if token.id in self._eos_ids or token.id in row.settings.stop_ids:
            self.finish(row, "stop")
        elif row.count == row.settings.max_tokens:
            self.finish(row, "length")

    def _leave(self, batch: Batch) -> None:
        """Take the rows out of a batch that have ended, or were cancelled."""
        for row in batch.rows:
            if row.stream.cancelled:
                self.finish(row, "cancelled")
        batch.keep([i for i, row in enumerate(batch.rows) if not row.stream.done])

    @contextlib.contextmanager
    def _guarded(self, batch: Batch) -> Iterator[None]:
        """After an error, rows of different adapters are read again apart from each other; those of one end."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  a model or an adapter may raise any error
            rows, batch.rows = batch.rows, []
            together = len({row.adapter for row in rows}) > 1
            self._apart |= together and isinstance(error, UnsupportedError)
            for row in rows:
                if together:
                    row.apart, row.read = True, 0
                    self._unread.append(row)
                else:
                    self.finish(row, None, error)

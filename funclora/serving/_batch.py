"""Rows that are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor, nn

from funclora.io.peft.cache import LoadedAdapter
from funclora.serving._memory import Memory
from funclora.serving._sampling import Chooser
from funclora.serving._settings import Settings
from funclora.serving._stream import Stream

Bind = Callable[[Sequence[LoadedAdapter | None]], nn.Module]


@dataclass(eq=False)
class Row:
    """A request, from its submission to its end.

    Attributes:
        unread: the tokens that the model has not read.
        name: the id of its adapter; None for the base model.
        settings: those of the request.
        stream: its answer.
        since: when it came, in seconds of the monotonic clock.
        loading: the adapter, once it has been asked for.
        chooser: chooses its tokens.
        count: the number of generated tokens.
    """

    unread: list[int]
    name: str | None
    settings: Settings
    stream: Stream
    since: float
    chooser: Chooser
    loading: Future[LoadedAdapter | None] | None = None
    count: int = 0

    @property
    def adapter(self) -> LoadedAdapter | None:
        """In the version of this request, when it has been loaded."""
        return None if self.loading is None else self.loading.result(timeout=0)


@dataclass(eq=False)
class Batch:
    """Rows that are read together, and what the model remembers of them.

    Attributes:
        rows: rows of one adapter follow each other.
        memory: of the rows.
    """

    rows: list[Row]
    memory: Memory
    _bound: nn.Module | None = field(default=None)

    def read(self, bind: Bind, count: int | None = None) -> Tensor:
        """Read what the rows have not read, or so many tokens of each of them: `[rows, vocabulary]` after the last."""
        if self._bound is None:
            self._bound = bind([row.adapter for row in self.rows])
        new = [row.unread[:count] for row in self.rows]
        logits = self.memory.read(self._bound, new)
        for row, ids in zip(self.rows, new, strict=True):
            del row.unread[: len(ids)]
        return logits

    def join(self, other: Batch) -> None:
        """Add the rows of another batch."""
        if self.rows:
            self.memory.join(other.memory)
        else:
            self.memory = other.memory
        self.rows, self._bound = self.rows + other.rows, None
        groups = {row.adapter: 0 for row in self.rows}
        places = {adapter: place for place, adapter in enumerate(groups)}
        order = sorted(range(len(self.rows)), key=lambda i: places[self.rows[i].adapter])
        if order != sorted(order):
            self.keep(order)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        if list(rows) != list(range(len(self.rows))):
            self.rows, self._bound = [self.rows[i] for i in rows], None
            if rows:
                self.memory.keep(rows)

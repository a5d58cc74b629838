"""Requests as rows, and the rows that are read together."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from funclora._bind.apply import bind
from funclora.io.peft.cache import AdapterCache, LoadedAdapter
from funclora.rules.base import Params
from funclora.serving._memory import Memory
from funclora.serving._sampling import Chooser
from funclora.serving._settings import Settings
from funclora.serving._stream import Stream


class Models:
    """The model with the adapters of some rows.

    Args:
        model: the frozen model.
        params: its weights.
        cache: of the adapters.
    """

    def __init__(self, model: nn.Module, params: Params, cache: AdapterCache) -> None:
        self._model, self._params, self._cache = model, params, cache
        self._base = bind(model, params, {})
        self._of_one: weakref.WeakKeyDictionary[LoadedAdapter, nn.Module] = weakref.WeakKeyDictionary()

    def bound(self, adapters: Sequence[LoadedAdapter | None]) -> nn.Module:
        """For a batch of these rows. If they have one adapter, it is kept as long as this, and rows are not tracked."""
        first = adapters[0]
        if any(adapter is not first for adapter in adapters):
            return bind(self._model, self._params, self._cache.route(adapters))
        if first is None:
            return self._base
        if first not in self._of_one:
            self._of_one[first] = bind(self._model, self._params, self._cache.route([first]))
        return self._of_one[first]

    def order(self, adapters: Sequence[LoadedAdapter | None]) -> list[int]:
        """The order of these rows in which a batch of them is computed fastest."""
        return self._cache.order(adapters)


@dataclass(eq=False)
class Row:
    """A request, from its submission to its end.

    Attributes:
        text: the tokens of the prompt, and of the answer so far.
        settings: those of the request.
        stream: its answer.
        name: the id of its adapter; None for the base model.
        chooser: chooses its tokens.
        loading: the adapter, in the version of this request, once it has been asked for.
        read: the number of tokens that the model has read.
        count: the number of generated tokens.
        apart: it is read with rows of its own adapter only, after an error in another batch.
    """

    text: list[int]
    settings: Settings
    stream: Stream
    name: str | None
    chooser: Chooser
    loading: Future[Any] | None = None
    read: int = 0
    count: int = 0
    apart: bool = False

    @property
    def is_loaded(self) -> bool:
        """Whether its adapter is there, or could not be loaded."""
        return self.loading is not None and self.loading.done()

    @property
    def adapter(self) -> LoadedAdapter | None:
        """None for the base model.

        Raises:
            FuncloraError: it could not be loaded.
        """
        loaded: LoadedAdapter | None = None if self.loading is None else self.loading.result(timeout=0)
        return loaded


class Batch:
    """Rows that are read together, and what the model remembers of them.

    Args:
        rows: the rows.
        memory: of them.
        models: gives the model with an adapter for each row.

    Attributes:
        rows: in an order that costs little, after a `join`.
        memory: of them.
    """

    def __init__(self, rows: Sequence[Row], memory: Memory, models: Models) -> None:
        self.rows, self.memory, self._models = [*rows], memory, models
        self._bound: nn.Module | None = None

    @property
    def is_read(self) -> bool:
        """Whether the model has read all of the rows' texts."""
        return all(row.read == len(row.text) for row in self.rows)

    def read(self, count: int | None = None) -> Tensor:
        """Read what the rows have not read, or only so many tokens of it: `[rows, vocabulary]`, after the last one."""
        if self._bound is None:
            self._bound = self._models.bound([row.adapter for row in self.rows])
        new = [row.text[row.read :][:count] for row in self.rows]
        logits = self.memory.read(self._bound, new)
        for row, ids in zip(self.rows, new, strict=True):
            row.read += len(ids)
        return logits

    def join(self, other: Batch) -> None:
        """Add the rows of another batch, which must not be used any more."""
        self.memory.join(other.memory)
        self.rows, self._bound = self.rows + other.rows, None
        self.keep(self._models.order([row.adapter for row in self.rows]))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        if list(rows) != list(range(len(self.rows))):
            self.rows, self._bound = [self.rows[i] for i in rows], None
            if rows and self.memory.lengths:
                self.memory.keep(rows)

"""What a model remembers of the rows of a batch: keys and values, states, or nothing but the texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora.errors import UnsupportedError

# What transformers calls the argument, in the order of its versions.
CACHES = ("cache", "past_key_values", "cache_params")


class Memory(Protocol):
    """Of the rows of one batch."""

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        """Read further tokens of each row.

        Args:
            bound: the model with the adapters of the rows.
            new: the tokens: of any lengths if nothing was read before, otherwise equally many.

        Returns:
            `[rows, vocabulary]`, the logits after the last token of each row.
        """

    def join(self, other: Any) -> None:
        """Add the rows of another memory of the same model, which is not used any more."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""


class Reader:
    """How a model reads rows.

    Attributes:
        mixed: rows of different lengths may be read, and decoded, together.
        pieces: a prompt may be read in several calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = frozenset(inspect.signature(type(model).forward).parameters)
        self.config: Any = getattr(model, "config", None)
        self.device = next(iter(model.parameters())).device
        self.cache = next((name for name in CACHES if name in self.names), None)
        if getattr(self.config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{type(model).__name__}: an encoder-decoder. Only decoders can be served.")
        stateful = getattr(model, "_is_stateful", False)
        self.mixed = self.pieces = not stateful

    def memory(self) -> Memory:
        """That of a batch which has read nothing."""
        return Texts(self) if self.cache is None else Cached(self)

    def ids(self, rows: Sequence[Sequence[int]], side: str) -> Tensor:
        """`[rows, longest]`, filled up with zeros on one side."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side).to(self.device)

    def call(self, bound: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
        """The logits of a call with those arguments that the model takes."""
        taken = {name: value for name, value in kwargs.items() if name in self.names and value is not None}
        out: Any = bound(ids, **taken)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits


class Texts:
    """Of a model that remembers nothing: the texts, which are read anew every time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._rows: list[list[int]] = []

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        self._rows = [[*old, *ids] for old, ids in zip(self._rows or [[]] * len(new), new, strict=True)]
        lengths = torch.tensor([len(row) for row in self._rows], device=self._reader.device)
        ids = self._reader.ids(self._rows, "right")  # where no causal position looks
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = self._reader.call(bound, ids, attention_mask=mask.long())
        return logits[torch.arange(len(ids), device=ids.device), lengths - 1]

    def join(self, other: Texts) -> None:
        self._rows += other._rows

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]


class Cached:
    """The caches of transformers' models. All rows end at the same column: shorter ones are filled up on the left."""

    def __init__(self, reader: Reader) -> None:
        from transformers import DynamicCache

        self._reader = reader
        self._cache: Any = DynamicCache(config=reader.config)
        self._lengths: list[int] = []

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        reader = self._reader
        count = max(map(len, new))
        self._lengths = [n + len(ids) for n, ids in zip(self._lengths or [0] * len(new), new, strict=True)]
        width = max(self._lengths)
        lengths = torch.tensor(self._lengths, device=reader.device)[:, None]
        mask = None
        if min(self._lengths) < width:
            mask = (torch.arange(width, device=reader.device) >= width - lengths).long()
        positions = (lengths - count + torch.arange(count, device=reader.device)).clamp_min(0)
        logits = reader.call(
            bound, reader.ids(new, "left"), attention_mask=mask, position_ids=positions, use_cache=True,
            logits_to_keep=1, **{str(reader.cache): self._cache},
        )  # fmt: skip
        return logits[:, -1]

    def join(self, other: Cached) -> None:
        self._lengths += other._lengths
        for mine, its in zip(self._cache.layers, other._cache.layers, strict=True):
            for states, added in zip(_states(mine), _states(its), strict=True):
                for i in states:
                    states[i] = torch.cat([states[i], added[i]])
            if _has_keys(mine):
                held = max(mine.keys.shape[-2], its.keys.shape[-2])
                for name in ("keys", "values"):
                    both = (getattr(mine, name), getattr(its, name))
                    setattr(mine, name, torch.cat([F.pad(x, (0, 0, held - x.shape[-2], 0)) for x in both]))
        self._set_width()

    def keep(self, rows: Sequence[int]) -> None:
        self._lengths = [self._lengths[i] for i in rows]
        width = max(self._lengths, default=0)
        index = torch.tensor(rows, dtype=torch.long, device=self._reader.device)
        for layer in self._cache.layers:
            for states in _states(layer):
                for i in states:
                    states[i] = states[i].index_select(0, index)
            if _has_keys(layer):
                first = max(layer.keys.shape[-2] - width, 0)
                layer.keys = layer.keys[..., first:, :].index_select(0, index)
                layer.values = layer.values[..., first:, :].index_select(0, index)
        self._set_width()

    def _set_width(self) -> None:
        for layer in self._cache.layers:
            if hasattr(layer, "cumulative_length"):  # of a sliding window: it holds the last columns only
                layer.cumulative_length = max(self._lengths, default=0)


def _states(layer: Any) -> list[dict[int, Tensor]]:
    """What a layer remembers of the rows besides keys and values."""
    found = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [states for states in found if all(isinstance(x, Tensor) for x in states.values())]


def _has_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() > 1

"""What a model remembers of the rows of a batch: keys and values, states, or nothing but the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora.errors import UnsupportedError

Call = Callable[..., Tensor]


class Memory(Protocol):
    """Of the rows of one batch, which have each read a text.

    Attributes:
        lengths: the number of tokens of each text.
    """

    lengths: list[int]

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        """Read further tokens of each row.

        Args:
            bound: the model with the adapters of the rows.
            new: the tokens: equally many of each row, or of any number if nothing was read before.

        Returns:
            `[rows, vocabulary]`, the logits after the last token of each row.
        """

    def join(self, other: Any) -> None:
        """Add the rows of another memory of the same model, which must not be used any more."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""


class Texts:
    """Of a model that remembers nothing: the texts, which are read anew every time."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._texts: list[list[int]] = []
        self.lengths: list[int] = []

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        self._texts = [[*old, *ids] for old, ids in zip(self._texts or [[]] * len(new), new, strict=True)]
        self.lengths = [len(text) for text in self._texts]
        ids = _filled_up(self._texts, "right")  # where no causal position looks
        logits = self._call(bound, ids, use_cache=False)
        last = torch.tensor(self.lengths, device=logits.device) - 1
        return logits[torch.arange(len(ids), device=logits.device), last]

    def join(self, other: Texts) -> None:
        self._texts += other._texts
        self.lengths += other.lengths

    def keep(self, rows: Sequence[int]) -> None:
        self._texts = [self._texts[i] for i in rows]
        self.lengths = [self.lengths[i] for i in rows]


class Cached:
    """The caches of transformers' models. All rows end at the same column: shorter ones are filled up on the left."""

    def __init__(self, call: Call, argument: str, config: Any, device: torch.device) -> None:
        from transformers import DynamicCache

        self._call, self._argument, self._device = call, argument, device
        self._cache: Any = DynamicCache(config=config)
        self.lengths: list[int] = []

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        count = max(map(len, new))
        starts = not self.lengths
        self.lengths = [n + len(ids) for n, ids in zip(self.lengths or [0] * len(new), new, strict=True)]
        width = max(self.lengths)
        ends = torch.tensor(self.lengths, device=self._device)[:, None]
        columns = torch.arange(width, device=self._device)
        arguments = {self._argument: self._cache, "position_ids": (ends - width + columns).clamp_min(0)[:, -count:]}
        # States have no columns to hide: what was filled up is behind them.
        if min(self.lengths) < width and (starts or any(map(_has_keys, self._cache.layers))):
            arguments["attention_mask"] = (columns >= width - ends).long()
        return self._call(bound, _filled_up(new, "left"), use_cache=True, logits_to_keep=1, **arguments)[:, -1]

    def join(self, other: Cached) -> None:
        if not self.lengths:
            self._cache, self.lengths = other._cache, other.lengths
            return
        self.lengths = self.lengths + other.lengths
        for layer, added in zip(self._cache.layers, other._cache.layers, strict=True):
            for (states, i), (more, _) in zip(_states(layer), _states(added), strict=True):
                states[i] = torch.cat([states[i], more[i]])
            if _has_keys(layer):
                held = max(layer.keys.shape[-2], added.keys.shape[-2])
                layer.keys = _stacked([layer.keys, added.keys], held)
                layer.values = _stacked([layer.values, added.values], held)
        self._set_width()

    def keep(self, rows: Sequence[int]) -> None:
        self.lengths = [self.lengths[i] for i in rows]
        index = torch.tensor(rows)
        for layer in self._cache.layers:
            for states, i in _states(layer):
                states[i] = states[i].index_select(0, index.to(states[i].device))
            if _has_keys(layer):
                unused = slice(max(layer.keys.shape[-2] - max(self.lengths), 0), None)
                index = index.to(layer.keys.device)
                layer.keys = layer.keys[..., unused, :].index_select(0, index)
                layer.values = layer.values[..., unused, :].index_select(0, index)
        self._set_width()

    def _set_width(self) -> None:
        for layer in self._cache.layers:
            if hasattr(layer, "cumulative_length"):  # of a sliding window: it holds the last columns only
                layer.cumulative_length = max(self.lengths)


def _filled_up(rows: Sequence[Sequence[int]], side: str) -> Tensor:
    """`[rows, longest]`."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)


def _stacked(parts: Sequence[Tensor], columns: int) -> Tensor:
    """Keys or values `[rows, heads, *, size]` of several batches, filled up on the left."""
    return torch.cat([F.pad(part, (0, 0, columns - part.shape[-2], 0)) for part in parts])


def _has_keys(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values."""
    return isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() == 4


def _states(layer: Any) -> list[tuple[dict[int, Tensor], int]]:
    """Where a layer of a cache holds what it knows of the rows besides keys and values: dicts, and the keys in them.

    Raises:
        UnsupportedError: it holds something whose meaning is not known.
    """
    if type(layer).__module__ != "transformers.cache_utils" or hasattr(layer, "indexer_keys"):
        raise UnsupportedError(f"{type(layer).__name__}: rows of such a cache cannot join others.")
    found: list[Any] = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return [(states, i) for states in found for i in states if states[i] is not None]

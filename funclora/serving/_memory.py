"""What a model remembers of the rows of a batch: keys and values, states, or nothing but the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora.errors import UnsupportedError

Call = Callable[..., Tensor]
KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer: `[1, heads, tokens, size]`


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


class _Held(NamedTuple):
    """A cache, and for how many rows it holds what was read."""

    cache: Any
    rows: int


class Cached:
    """The caches of transformers' models. All rows end at the same column: shorter ones are filled up on the left.

    Rows that come, go or change their order are only noted; their columns are moved when the next tokens are read.
    """

    def __init__(self, call: Call, argument: str, config: Any, device: torch.device) -> None:
        from transformers import DynamicCache

        self._call, self._argument, self._device = call, argument, device
        self._cache: Any = DynamicCache(config=config)
        self._rows: list[tuple[_Held, int]] = []  # where each row is, and its place there
        self.lengths: list[int] = []

    def read(self, bound: nn.Module, new: Sequence[Sequence[int]]) -> Tensor:
        self._move_rows()
        count = max(map(len, new))
        starts = not self.lengths
        self.lengths = [n + len(ids) for n, ids in zip(self.lengths or [0] * len(new), new, strict=True)]
        held = _Held(self._cache, len(new))
        self._rows = [(held, i) for i in range(held.rows)]
        width = max(self.lengths)
        ends = torch.tensor(self.lengths, device=self._device)[:, None]
        columns = torch.arange(width, device=self._device)
        arguments = {self._argument: self._cache, "position_ids": (ends - width + columns).clamp_min(0)[:, -count:]}
        # States have no columns to hide: what was filled up is behind them.
        if min(self.lengths) < width and (starts or any(map(_has_keys, self._cache.layers))):
            arguments["attention_mask"] = (columns >= width - ends).long()
        return self._call(bound, _filled_up(new, "left"), use_cache=True, logits_to_keep=1, **arguments)[:, -1]

    def join(self, other: Cached) -> None:
        self._rows, self.lengths = self._rows + other._rows, self.lengths + other.lengths

    def keep(self, rows: Sequence[int]) -> None:
        self._rows, self.lengths = [self._rows[i] for i in rows], [self.lengths[i] for i in rows]

    @property
    def can_be_cut(self) -> bool:
        """Whether it holds keys and values of all tokens and nothing else: those of a token depend on no later one."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer and _has_keys(layer) for layer in self._cache.layers)

    def known(self, start: int, stop: int) -> KeysAndValues:
        """A copy of what is known of these tokens of the only row, when it has just been read."""
        return [
            (layer.keys[..., start:stop, :].clone(), layer.values[..., start:stop, :].clone())
            for layer in self._cache.layers
        ]

    def begin(self, parts: Sequence[KeysAndValues]) -> None:
        """Know the first tokens of a row as if it had read them: those of the parts, one after the other."""
        for i, of_layer in enumerate(zip(*parts, strict=True)):
            keys, values = (torch.cat(each, dim=-2) for each in zip(*of_layer, strict=True))
            self._cache.update(keys, values, i)
        self._rows = [(_Held(self._cache, 1), 0)]
        self.lengths = [sum(part[0][0].shape[-2] for part in parts)]

    def _move_rows(self) -> None:
        """Make one cache of the rows, in their order, unless they are one."""
        every = list(dict.fromkeys(held for held, _ in self._rows))
        places = [(every.index(held), i) for held, i in self._rows]
        if not every or places == [(0, i) for i in range(every[0].rows)]:
            self._cache = every[0].cache if every else self._cache
            return
        caches = [held.cache for held in every]
        self._cache = caches[0]
        width = max(self.lengths)
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            for alike in zip(*map(_states, layers), strict=True):
                states, i = alike[0]
                states[i] = _moved([states[i] for states, i in alike], places)
            if _has_keys(layers[0]):
                columns = min(width, max(layer.keys.shape[-2] for layer in layers))
                for name in ("keys", "values"):
                    sources = [_last_columns(getattr(layer, name), columns) for layer in layers]
                    setattr(layers[0], name, _moved(sources, places))
            if hasattr(layers[0], "cumulative_length"):  # of a sliding window: it holds the last columns only
                layers[0].cumulative_length = width


def _filled_up(rows: Sequence[Sequence[int]], side: str) -> Tensor:
    """`[rows, longest]`."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)


def _last_columns(keys: Tensor, columns: int) -> Tensor:
    """The last columns of keys or values `[rows, heads, *, size]`, filled up on the left."""
    missing = columns - keys.shape[-2]
    return F.pad(keys, (0, 0, missing, 0)) if missing > 0 else keys[..., -missing:, :]


def _moved(sources: Sequence[Tensor], places: Sequence[tuple[int, int]]) -> Tensor:
    """`[rows, *]`: each row from its source, and its place there."""
    return torch.cat([sources[source][i : i + 1] for source, i in places])


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

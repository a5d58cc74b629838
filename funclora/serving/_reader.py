"""How a model reads the rows of a batch, and which of them it may read together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funclora.errors import UnsupportedError
from funclora.serving._memory import Cached, Memory, Texts

# What transformers calls the argument with the cache, in its versions and models.
CACHES = ("cache", "past_key_values", "cache_params")


class Reader:
    """Reads texts with a causal language model, as far as short texts show that this does not change their logits.

    Args:
        bound: the base model, bound.

    Attributes:
        vocabulary: the number of its tokens.
        decodes: which rows may be decoded together: of "any" lengths, of "equal" ones, or only "one".
        pads: prompts of different lengths may be read together.
        pieces: a prompt may be read in several calls.

    Raises:
        UnsupportedError: it is no causal language model, or its cache changes its logits.
    """

    def __init__(self, bound: nn.Module) -> None:
        self._names = frozenset(inspect.signature(type(bound).forward).parameters)
        self._config: Any = getattr(bound, "config", None)
        self._cache = next((name for name in CACHES if name in self._names), None)
        self.device = next(iter(bound.parameters())).device
        if getattr(self._config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{type(bound).__name__} is an encoder-decoder. Only decoders can be served.")
        self.vocabulary = self._tokens(bound)
        examine = Examination(self, bound, self.vocabulary)
        examine.cache()
        self.pieces = examine.agrees(examine.in_pieces)
        self.pads = examine.agrees(examine.padded)
        equal, different = (examine.agrees(examine.joined, *lengths) for lengths in ((6, 6), (6, 4)))
        self.decodes = "any" if equal and different else "equal" if equal else "one"

    def memory(self) -> Memory:
        """That of a batch which has read nothing."""
        return Texts(self.call) if self._cache is None else Cached(self.call, self._cache, self._config, self.device)

    def call(self, bound: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
        """The logits of a call with those arguments that the model takes: `[rows, tokens or 1, vocabulary]`."""
        taken = {name: value for name, value in arguments.items() if name in self._names}
        out: Any = bound(ids.to(self.device), **taken)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits

    def _tokens(self, bound: nn.Module) -> int:
        embeddings: Any = bound.get_input_embeddings() if hasattr(bound, "get_input_embeddings") else None  # type: ignore[operator]
        known = getattr(embeddings, "num_embeddings", None)
        return int(known or self.call(bound, torch.zeros(1, 1, dtype=torch.long)).shape[-1])


class Examination:
    """Compares the logits of short texts that are read in several ways with those of each text alone."""

    def __init__(self, reader: Reader, bound: nn.Module, vocabulary: int) -> None:
        self._reader, self._bound = reader, bound
        generator = torch.Generator().manual_seed(0)
        self._texts: dict[int, list[int]] = {}
        self._expected: dict[int, Tensor] = {}
        for length in (6, 4):
            self._texts[length] = torch.randint(vocabulary, (length + 2,), generator=generator).tolist()
            self._expected[length] = self._alone(reader.memory(), length)

    def cache(self) -> None:
        """Raise `UnsupportedError` if the model's logits with its cache are not those without it."""
        for length, expected in self._expected.items():
            if not _close(self._alone(Texts(self._reader.call), length), expected):
                raise UnsupportedError(
                    f"{type(self._bound).__name__} gives other logits with its cache than without. It cannot be served."
                )

    def agrees(self, read: Callable[..., list[tuple[int, Tensor]]], *lengths: int) -> bool:
        """Whether a way of reading leaves the logits as they are."""
        try:
            return all(_close(logits, self._expected[length]) for length, logits in read(*lengths))
        except Exception:  # noqa: BLE001  a model may raise any error in a call that it is not made for
            return False

    def in_pieces(self) -> list[tuple[int, Tensor]]:
        memory = self._reader.memory()
        text = self._texts[6]
        for piece in (text[:2], text[2:5], text[5:]):
            logits = memory.read(self._bound, [piece])
        return [(6, logits[0])]

    def padded(self) -> list[tuple[int, Tensor]]:
        return [*zip((6, 4), self._reader.memory().read(self._bound, [self._texts[n] for n in (6, 4)]), strict=True)]

    def joined(self, first: int, second: int) -> list[tuple[int, Tensor]]:
        """Two rows that meet after their prompts, of which one leaves after a step."""
        one, other = self._begun(first), self._begun(second)
        other.join(one)
        texts = [self._texts[second], self._texts[first]]
        other.read(self._bound, [text[-2:-1] for text in texts])
        both = self._reader.memory()
        both.join(other)
        both.keep([1, 0])
        both.keep([1])
        return [(second, both.read(self._bound, [self._texts[second][-1:]])[0])]

    def _begun(self, length: int) -> Memory:
        memory = self._reader.memory()
        memory.read(self._bound, [self._texts[length][:-2]])
        return memory

    def _alone(self, memory: Memory, length: int) -> Tensor:
        text = self._texts[length]
        for piece in (text[:-2], text[-2:-1], text[-1:]):
            logits = memory.read(self._bound, [piece])
        return logits[0]


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by rounding only: less than half of the digits of their dtype."""
    limit = torch.finfo(expected.dtype).eps ** 0.5
    difference = (logits.float() - expected.float()).square().mean().sqrt()
    return bool(difference <= limit * expected.float().std())

"""How a model reads the rows of a batch, and which of them it may read together."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funclora.errors import FuncloraWarning, UnsupportedError
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
        cuts: what it knows of the beginning of a text can be used for another one that begins in the same way.

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
        try:
            examine = Examination(self, bound, self.vocabulary)
        except Exception as error:
            raise UnsupportedError(
                f"{type(bound).__name__} does not read a text in several calls: {type(error).__name__}: {error}"
            ) from error
        examine.cache()
        self.pieces = examine.agrees(examine.in_pieces)
        self.cuts = self.pieces and examine.agrees(examine.cut)
        self.pads = examine.agrees(examine.padded)
        equal, different = (examine.agrees(examine.joined, *texts) for texts in ((0, 2), (0, 1)))
        self.decodes = "any" if equal and different else "equal" if equal else "one"
        if self.decodes == "one":
            warnings.warn(
                f"{type(bound).__name__}: rows of its cache cannot be read together, so each answer is decoded alone.",
                FuncloraWarning,
                stacklevel=3,
            )

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


# Numbers of tokens of the texts that are read to examine a model. Each ends with three that are read one by one.
LENGTHS = (9, 7, 9)


class Examination:
    """Compares the logits of short texts that are read in several ways with those of each text alone."""

    def __init__(self, reader: Reader, bound: nn.Module, vocabulary: int) -> None:
        self._reader, self._bound = reader, bound
        generator = torch.Generator().manual_seed(0)
        self._texts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
        self._expected = [self._alone(reader.memory(), i) for i in range(len(LENGTHS))]

    def cache(self) -> None:
        """Raise `UnsupportedError` if the model's logits with its cache are not those without it."""
        for i in range(len(LENGTHS)):
            if not self._right(i, self._alone(Texts(self._reader.call), i)):
                raise UnsupportedError(
                    f"{type(self._bound).__name__} gives other logits with its cache than without. It cannot be served."
                )

    def agrees(self, read: Callable[..., bool], *texts: int) -> bool:
        """Whether a way of reading is possible, and leaves the logits as they are."""
        try:
            return read(*texts)
        except Exception:  # noqa: BLE001  a model may raise any error in a call that it is not made for
            return False

    def in_pieces(self) -> bool:
        """A text in several calls of several tokens."""
        text = self._texts[0]
        return self._right(0, self._read(self._reader.memory(), [text[:3], text[3:5], text[5:]])[-1:])

    def cut(self) -> bool:
        """The beginning of a text from a row that went on in another way."""
        memory, other = self._reader.memory(), self._reader.memory()
        if not isinstance(memory, Cached) or not isinstance(other, Cached):
            return False
        text = self._texts[0]
        memory.read(self._bound, [text[:4] + self._texts[1]])
        if not memory.can_be_cut:
            return False
        other.begin([memory.known(0, 2), memory.known(2, 4)])
        return self._right(0, self._read(other, [text[4:6], text[6:7], text[7:8], text[8:]]))

    def padded(self) -> bool:
        """Texts of different lengths in one call."""
        logits = self._reader.memory().read(self._bound, self._texts[:2])
        return all(self._right(i, [row]) for i, row in enumerate(logits))

    def joined(self, first: int, second: int) -> bool:
        """Two rows that meet after their beginnings, and change their order; then one leaves."""
        memories = []
        for i in (first, second):
            memories.append(self._reader.memory())
            memories[-1].read(self._bound, [self._texts[i][:-3]])
        memory = self._reader.memory()
        for part in memories:
            memory.join(part)
        memory.read(self._bound, [self._texts[first][-3:-2], self._texts[second][-3:-2]])
        memory.keep([1, 0])
        both = memory.read(self._bound, [self._texts[second][-2:-1], self._texts[first][-2:-1]])
        memory.keep([0])
        last = memory.read(self._bound, [self._texts[second][-1:]])
        return self._right(second, [both[0], last[0]]) and _close(both[1], self._expected[first][-2])

    def _alone(self, memory: Memory, i: int) -> list[Tensor]:
        text = self._texts[i]
        return self._read(memory, [text[:-3], text[-3:-2], text[-2:-1], text[-1:]])

    def _read(self, memory: Memory, pieces: list[list[int]]) -> list[Tensor]:
        """The logits after each piece of a text."""
        return [memory.read(self._bound, [piece])[0] for piece in pieces]

    def _right(self, i: int, logits: list[Tensor]) -> bool:
        """Whether these are the logits after the last tokens of a text alone."""
        return all(_close(*pair) for pair in zip(logits, self._expected[i][-len(logits) :], strict=True))


def _close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits differ by rounding only: less than half of the digits of their dtype."""
    limit = torch.finfo(expected.dtype).eps ** 0.5
    difference = (logits.float() - expected.float()).square().mean().sqrt()
    return bool(difference <= limit * expected.float().std())

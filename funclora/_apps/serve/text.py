"""The text of an answer while its tokens come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what decoders show of a character whose bytes are not all there


class Decoder:
    """Decodes tokens one by one; a character whose bytes are in several tokens comes with the last of them.

    Args:
        tokenizer: of transformers.

    Examples:
        >>> from funclora._apps.train.tokenizer import ByteTokenizer
        >>> decoder = Decoder(ByteTokenizer())
        >>> [decoder.add(byte) for byte in "é!".encode()], decoder.end()
        (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A token's text can depend on the tokens before it: the last piece that was given out is decoded again.
        self._before: list[int] = []
        self._open: list[int] = []

    def add(self, token: int) -> str:
        """What a token adds to the text."""
        self._open.append(token)
        text = self._new()
        if text.endswith(HALF):
            return ""
        # Special tokens have no text, and what stands after them would be decoded as a beginning.
        self._before, self._open = self._open if text else [*self._before, *self._open], []
        return text

    def end(self) -> str:
        """What is left of characters that never became whole."""
        text, self._open = self._new() if self._open else "", []
        return text

    def _new(self) -> str:
        before, both = (
            self._tokenizer.decode(ids, skip_special_tokens=True)
            for ids in (self._before, [*self._before, *self._open])
        )
        return both[len(before) :]  # type: ignore[no-any-return]


class Cutter:
    """Passes a text on in parts, and ends it before the first stop string.

    The end of a part that may be the beginning of a stop string is kept back until more is known. Of several stop
    strings the one that ends first counts, and of those the longest: the result does not depend on how the text was
    divided.

    Args:
        stops: the stop strings.

    Examples:
        >>> cutter = Cutter(["END"])
        >>> [cutter.add(part) for part in ("a E", "N", "D b")], cutter.stopped
        (['a ', '', ''], True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._kept = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The part of the text that is certainly not in a stop string."""
        if self.stopped:
            return ""
        text = self._kept + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._kept, self.stopped = "", True
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was kept back, if no stop string came."""
        text, self._kept = self._kept, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

"""Beginnings of prompts that were read, for requests of the same adapter whose prompts begin in the same way."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from funclora._torch.memory import nbytes
from funclora.io.peft.cache import LoadedAdapter
from funclora.serving._memory import Cached, KeysAndValues


@dataclass(eq=False)
class Part:
    """What a model knows of one piece of a prompt.

    Attributes:
        number: by which the piece after it refers to it; 0 is no piece.
        known: keys and values of its tokens.
        size: of them in bytes.
        used: greater for a part that was used later.
    """

    number: int
    known: KeysAndValues
    size: int
    used: int = 0


class Parts(OrderedDict[tuple[int, tuple[int, ...]], Part]):
    """Those of one adapter, by the number of the piece before and the piece's tokens. The one used last comes last.

    Attributes:
        size: of all in bytes.
    """

    size = 0

    def path(self, text: Sequence[int], piece: int) -> list[Part]:
        """The parts that a text begins with, one after the other."""
        found: list[Part] = []
        for start in range(0, len(text) - piece + 1, piece):
            part = self.get((found[-1].number if found else 0, tuple(text[start : start + piece])))
            if part is None:
                break
            found.append(part)
        return found


class Prefixes:
    """Keys and values of whole pieces of prompts, within a bound of memory; those used least recently make room.

    Keys and values depend on the adapter: what was read with one version of it is found by that version only, and is
    gone with it. Used by one thread; `bytes` and `evictions` may be read by others.

    Args:
        piece: the number of tokens of a piece. Prompts are cut at its multiples only, whether their beginnings are
            known or not: the same products are computed, and rounded in the same way.
        memory: maximum number of bytes.

    Attributes:
        piece: as given.
        evictions: the number of pieces that made room for others.
    """

    def __init__(self, piece: int, memory: int) -> None:
        self.piece, self.evictions = piece, 0
        self._memory = memory
        self._of_base = Parts()
        self._of_adapters: weakref.WeakKeyDictionary[LoadedAdapter, Parts] = weakref.WeakKeyDictionary()
        self._numbers, self._uses = itertools.count(1), itertools.count(1)
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """The size of what is kept."""
        with self._lock:
            return self._bytes()

    def take(self, adapter: LoadedAdapter | None, text: Sequence[int], memory: Cached) -> int:
        """Let a memory that has read nothing begin with as much of a prompt as is known.

        Returns:
            The number of tokens that need not be read. At least one is left, after which the logits are needed.
        """
        with self._lock:
            parts = self._parts(adapter)
            found = parts.path(text[:-1], self.piece)
            self._use(parts, text, found)
        if found:
            memory.begin([part.known for part in found])
        return len(found) * self.piece

    def put(self, adapter: LoadedAdapter | None, text: Sequence[int], memory: Cached) -> None:
        """Keep what a memory, whose only row has read a prompt in pieces, knows of it."""
        with self._lock:
            parts = self._parts(adapter)
            found = parts.path(text, self.piece)
            for start in range(len(found) * self.piece, len(text) - self.piece + 1, self.piece):
                known = memory.known(start, start + self.piece)
                part = Part(next(self._numbers), known, nbytes(known))
                if not self._make_room(part.size, found):
                    break
                before = found[-1].number if found else 0
                parts[before, tuple(text[start : start + self.piece])] = part
                parts.size += part.size
                part.used = next(self._uses)
                found.append(part)
            self._use(parts, text, found)

    def _parts(self, adapter: LoadedAdapter | None) -> Parts:
        return self._of_base if adapter is None else self._of_adapters.setdefault(adapter, Parts())

    def _all(self) -> list[Parts]:
        return [self._of_base, *self._of_adapters.values()]

    def _bytes(self) -> int:
        return sum(parts.size for parts in self._all())

    def _use(self, parts: Parts, text: Sequence[int], path: Sequence[Part]) -> None:
        """The last one first: a piece without those before it could not be found, and must go before them."""
        for i, part in reversed([*enumerate(path)]):
            start = i * self.piece
            parts.move_to_end((path[i - 1].number if i else 0, tuple(text[start : start + self.piece])))
            part.used = next(self._uses)

    def _make_room(self, size: int, needed: Sequence[Part]) -> bool:
        """Whether there is room for so many bytes more, after what was used least recently has gone."""
        while self._bytes() + size > self._memory:
            oldest = min(filter(None, self._all()), key=lambda parts: next(iter(parts.values())).used, default=None)
            if oldest is None or next(iter(oldest.values())) in needed:
                return False
            oldest.size -= oldest.popitem(last=False)[1].size
            self.evictions += 1
        return True

"""Gathers weights from the pieces of all processes, and starts with the next one while a weight is used."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from funclora._quant.packing import Parts
from funclora._torch.functions import is_mapped
from funclora._torch.mesh import gathered_in_graph

Counts = tuple[int | None, ...]
Key = tuple[int | None, int]  # the numbers of two weights that were used one after the other

_MOST_KEYS = 1 << 16


class _Weight(NamedTuple):
    """The pieces of a weight, and what they are cut from; its number is the same in all processes."""

    number: int
    parts: Parts
    counts: Counts

    def is_that_of(self, other: _Weight) -> bool:
        """Whether these are the same pieces, with the same values: nobody has written to them."""
        return self.number == other.number and all(
            a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.device == b.device
            for a, b in zip(self.parts, other.parts, strict=True)
        )


class _Flight:
    """The parts of a weight on their way."""

    def __init__(self, weight: _Weight, group: Any) -> None:
        self.weight = weight
        self._versions = _versions(weight.parts)
        self._size = dist.get_world_size(group)
        with torch.inference_mode(mode=False):  # it may be used outside of the mode in which it starts
            self._gathers = [
                None if count is None else _start(part.detach(), group, self._size)
                for part, count in zip(weight.parts, weight.counts, strict=True)
            ]

    def is_for(self, weight: _Weight) -> bool:
        return self.weight.is_that_of(weight) and self._versions == _versions(weight.parts)

    def landed(self) -> Parts:
        """The whole parts, when all of them are here."""
        found = []
        for part, count, gather in zip(self.weight.parts, self.weight.counts, self._gathers, strict=True):
            if gather is None:
                found.append(part)
                continue
            whole, work = gather
            work.wait()
            found.append(whole.flatten(0, 1)[:count])
        return tuple(found)


class Gatherer:
    """Gathers the weights of one base for a group of processes.

    While a weight is used, the one that followed it the last time is on its way: the one after the same two weights,
    so that the turn from forward to backward is guessed too. All processes guess alike, because a guess depends on
    nothing but the order of the uses, which is theirs: not on addresses, clocks or free memory. Never more than one
    weight is on its way. If another one is used, it is dropped, and the new order is remembered.

    Attributes:
        group: the process group; None for all processes.
        uses: how many weights were used.
        ready: how many of them were on their way already.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.uses = self.ready = 0
        self._numbers = 0
        self._next: dict[Key, _Weight] = {}
        self._last: Key | None = None
        self._flight: _Flight | None = None
        self._lock = threading.Lock()

    def number(self) -> int:
        """The number of a new weight."""
        self._numbers += 1
        return self._numbers

    def whole(self, number: int, parts: Parts, counts: Counts) -> Parts:
        """The whole parts of a weight.

        Args:
            number: the weight's number.
            parts: this process's pieces.
            counts: the lengths of the whole parts; None for a part that every process holds whole.
        """
        if torch.compiler.is_compiling() or any(type(part) is not Tensor or is_mapped(part) for part in parts):
            return tuple(
                part if count is None else gathered(part, count, self.group)
                for part, count in zip(parts, counts, strict=True)
            )
        weight = _Weight(number, parts, counts)
        with self._lock:
            flight, self._flight = self._flight, None
            self.uses += 1
            if flight is not None and flight.is_for(weight):
                self.ready += 1
            else:
                if flight is not None:
                    flight.landed()  # the memory of a gather must stay until it is done
                flight = _Flight(weight, self.group)
            found = self._after(weight)
            if found is not None and found.number != number:
                self._flight = _Flight(found, self.group)
            return flight.landed()

    def _after(self, weight: _Weight) -> _Weight | None:
        """The weight that came after this one the last time, and what is to be remembered for the next time."""
        if self._last is not None:
            if len(self._next) >= _MOST_KEYS:  # no order ever comes again
                self._next.clear()
            self._next[self._last] = weight
        self._last = (None if self._last is None else self._last[1], weight.number)
        return self._next.get(self._last)


def gathered(piece: Tensor, count: int, group: Any) -> Tensor:
    """The first `count` slices of the pieces of all processes, one after the other."""
    if torch.compiler.is_compiling():
        return gathered_in_graph(piece, group)[:count]
    whole, work = _start(piece, group, dist.get_world_size(group))
    work.wait()
    return whole.flatten(0, 1)[:count]


def _start(piece: Tensor, group: Any, size: int) -> tuple[Tensor, Any]:
    whole = piece.new_empty(size, *piece.shape)
    return whole, dist.all_gather(list(whole), piece, group=group, async_op=True)


def _versions(parts: Parts) -> list[int | None]:
    return [None if part.is_inference() else part._version for part in parts]

"""Adapters of batches that change: stacked in memory that is reused, so that a change writes only what is new."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._many.route import Found, add_members, routed
from funclora._many.stack import Group, TreeSpecs, kind_of
from funclora._tracking.batch import Batch
from funclora.rules.base import Adapters, Params, Rule, has_own_scaling
from funclora.rules.linear_ops import EXACT
from funclora.rules.low_rank import LowRank
from funclora.rules.tokens import untied


class PreparedAdapter:
    """An adapter with everything computed that depends only on it and on the base weights, such as DoRA's norms.

    Attributes:
        rules: the prepared rules. They share tensors with the adapter.
        leaves: their tensors.
        is_b: which of these are the factor B of a low-rank update.
        factors: the number by which each leaf is multiplied in a slot.
        scalings: what remains of each rule's scaling, if it has one.
        spec: the tree of the rules.
        kind: equal for adapters that can be stacked.
    """

    def __init__(self, adapters: Adapters, params: Params) -> None:
        with torch.no_grad():
            self.rules = {name: rule.prepared(params[name]) for name, rule in untied(adapters).items()}
        tree: Any = self.rules
        self.leaves: list[Tensor]
        self.leaves, self.spec = optree.tree_flatten(tree)
        self.kind = kind_of(tree, self.leaves)
        self.is_b: list[bool] = []
        self.factors: list[float] = []
        self.scalings: dict[str, float] = {}
        for name in sorted(self.rules):  # in the order of the leaves
            rule: Any = self.rules[name]
            low_rank = isinstance(rule, LowRank)
            # Multiplied into B, the scaling rounds it once more, which only these dtypes can afford.
            factor = float(rule.scaling) if low_rank and rule.b.dtype in EXACT else 1.0
            for leaf in rule.leaf_names:
                for _ in optree.tree_leaves(getattr(rule, leaf)):
                    self.is_b.append(low_rank and leaf == "b")
                    self.factors.append(factor if self.is_b[-1] else 1.0)
            if has_own_scaling(rule):
                self.scalings[name] = float(rule.scaling) / factor if factor else 1.0


class Slots:
    """A stack whose members come and go: each adapter of a batch is in a slot of shared tensors.

    A slot gets another adapter only after the last batch that uses it is gone. Safe to use from many threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[Any, _Pool] = {}
        self._returned: deque[list[tuple[_Pool, list[int]]]] = deque()

    def route(self, rows: Sequence[PreparedAdapter | None], repeats: int = 1) -> dict[str, Rule]:
        """The adapters for a batch, as from `funclora.route`. An adapter is recognised as the same object.

        Args:
            rows: `[n_rows]`, the adapter of each row; None for the base model.
            repeats: as for `funclora.route`.
        """
        if len(rows) == 1:  # one row needs no tracking
            return {} if rows[0] is None else dict(rows[0].rules)
        found: dict[str, list[Found]] = {}
        lease, taken = _Lease(), []  # type: tuple[_Lease, list[tuple[_Pool, list[int]]]]
        weakref.finalize(lease, self._returned.append, taken).atexit = False
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for pool, rows_of in self._placed(rows):
                taken.append((pool, [*rows_of]))
                for slot in rows_of:
                    pool.users[slot] += 1
                add_members(found, pool.group(), pool.scalings, rows_of)
        known: dict[Any, Any] = {}
        batch = Batch(len(rows), repeats)
        return {name: routed(parts, batch, known, lease) for name, parts in found.items()}

    def order(self, rows: Sequence[PreparedAdapter | None]) -> list[int]:
        """The order of the rows in which they are in the order of their adapters' slots, and are not gathered."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            ordered = [i for _, rows_of in self._placed(rows) for slot in sorted(rows_of) for i in rows_of[slot]]
        return [*ordered, *(i for i, adapter in enumerate(rows) if adapter is None)]

    def _placed(self, rows: Sequence[PreparedAdapter | None]) -> list[tuple[_Pool, dict[int, list[int]]]]:
        """The rows by their slots, which are written where their adapters are not there yet; kind by kind."""
        self._take_back()
        kinds: dict[Any, dict[int, tuple[PreparedAdapter, list[int]]]] = {}
        for i, adapter in enumerate(rows):
            if adapter is not None:
                kinds.setdefault(adapter.kind, {}).setdefault(id(adapter), (adapter, []))[1].append(i)
        placed = []
        for kind, some in kinds.items():
            adapters, rows_of = zip(*some.values(), strict=True)
            if kind not in self._pools:
                self._pools[kind] = _Pool(adapters[0])
            pool = self._pools[kind]
            placed.append((pool, dict(zip(pool.place(adapters), rows_of, strict=True))))
        return placed

    def _take_back(self) -> None:
        """Free the slots of batches that are gone."""
        while self._returned:
            for pool, slots in self._returned.popleft():
                for slot in slots:
                    pool.users[slot] -= 1


class _Lease:
    """Held by the rules of a batch: its slots are free when it is gone."""


class _Pool:
    """The slots of adapters of one kind: tensors `[n_slots, *]`, one for each leaf.

    Attributes:
        values: the tensors.
        held: the adapter in each slot.
        users: the number of batches that use each slot.
        scalings: the scalings of the adapters in the slots, for each rule that has one.
    """

    def __init__(self, like: PreparedAdapter) -> None:
        self.spec = like.spec
        self.values = [_empty(leaf, b) for leaf, b in zip(like.leaves, like.is_b, strict=True)]
        self.held: list[weakref.ref[PreparedAdapter] | None] = []
        self.users: list[int] = []
        self.scalings: dict[str, list[float]] = {name: [] for name in like.scalings}

    def place(self, adapters: Sequence[PreparedAdapter]) -> list[int]:
        """The slots of some adapters. Those that are in none are written to slots that no batch uses."""
        known = {id(ref()): slot for slot, ref in enumerate(self.held) if ref is not None}
        slots = [known.get(id(adapter)) for adapter in adapters]
        free = [slot for slot, users in enumerate(self.users) if not users and slot not in slots]
        missing = slots.count(None) - len(free)
        if missing > 0:
            free += self._grow(max(missing, len(self.held) // 2))
        chosen = iter(free)  # the first ones: slots that are close to each other are read together
        return [self._write(next(chosen), adapter) if slot is None else slot
                for slot, adapter in zip(slots, adapters, strict=True)]  # fmt: skip

    def group(self) -> Group[dict[str, Rule]]:
        return Group(tuple(self.values), TreeSpecs((self.spec,)), tuple(range(len(self.held))))

    def _grow(self, n: int) -> range:
        """Add n slots. Batches that run keep the tensors that they have."""
        before = len(self.held)
        for k, value in enumerate(self.values):
            size = (before + n, *value.shape[1:])
            self.values[k] = torch.empty_strided(size, value.stride(), dtype=value.dtype, device=value.device)
            self.values[k][:before] = value
        self.held += [None] * n
        self.users += [0] * n
        for scalings in self.scalings.values():
            scalings.extend([1.0] * n)
        return range(before, before + n)

    def _write(self, slot: int, adapter: PreparedAdapter) -> int:
        self.held[slot] = None  # until all of it is there
        for value, leaf, factor in zip(self.values, adapter.leaves, adapter.factors, strict=True):
            torch.mul(leaf, factor, out=value[slot]) if factor != 1.0 else value[slot].copy_(leaf)
        for name, scaling in adapter.scalings.items():
            self.scalings[name][slot] = scaling
        self.held[slot] = weakref.ref(adapter)
        return slot


def _empty(leaf: Tensor, is_b: bool) -> Tensor:
    """A tensor of no slots for such leaves. For few rows, matrices B are read fastest as `[n_slots, r, out]`."""
    if is_b and leaf.dim() == 2:
        return leaf.new_empty(0, *leaf.mT.shape).mT
    return leaf.new_empty(0, *leaf.shape)

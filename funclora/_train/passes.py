"""Passes over the members of a population and the rows of a batch, each as large as the memory allows.

Each pass counts the bytes of the tensors it makes, and the next pass is as large as this count and the budget allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import optree
import torch
from torch import Tensor, nn

from funclora._many.stack import Group, Stack, TreeSpecs
from funclora._torch.memory import Peak, budget, is_out_of_memory
from funclora._train.members import AloneModel, BatchedModel, MemberModel, Population
from funclora._train.population import batch_dims, batch_size
from funclora.errors import ConfigError
from funclora.rules.base import Params

Metric = Callable[[Any, Any], Any]
"""A metric: `metric(bound, batch)` -> a value for each row `[n_rows]`, or one for the batch `[]`, or a tree of them."""


class _Taken(NamedTuple):
    """The memory that a pass used."""

    members: int
    rows: int
    bytes: float


class _Plan:
    """The allowed size of a pass, computed from the memory that earlier passes used.

    A pass uses f + m·(a + r·c) bytes for m members with r rows. So the use of one pass, divided by its size, is an
    upper bound for the use of a larger pass, divided by its size.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.taken: dict[tuple[int, ...], _Taken] = {}  # by the number of elements of a row, in each tensor

    def size(self, row: tuple[int, ...], n: int, left: int, whole: bool) -> tuple[int, int] | None:
        """The numbers of members and rows of a pass, from the remaining ones and n; None before any measurement."""
        costs = [self._scaled(row, known) * max(1.0, n / taken.rows) for known, taken in self.taken.items()]
        if row in self.taken:
            costs = [self._scaled(row, row) * max(1.0, n / self.taken[row].rows)]
        if not costs:
            return None
        by_member = max(1.0, min(costs))
        if by_member <= self.memory or whole:
            return max(1, min(left, int(self.memory / by_member))), n
        return 1, max(1, int(n * self.memory / by_member))

    def _scaled(self, row: tuple[int, ...], known: tuple[int, ...]) -> float:
        """An estimate for rows of this size from a pass over rows of another size. Attention is quadratic."""
        taken = self.taken[known]
        return taken.bytes / taken.members * max(1.0, sum(row) / max(1, sum(known))) ** 2

    def took(self, row: tuple[int, ...], taken: _Taken, *, complete: bool) -> None:
        """Remember the larger of two passes; one with reused tensors only if it used more."""
        old = self.taken.get(row)
        larger = old is None or taken.members * taken.rows >= old.members * old.rows
        if old is None or taken.bytes >= old.bytes or (larger and complete):
            self.taken[row] = taken

    def failed(self, row: tuple[int, ...], members: int, rows: int) -> None:
        """Use half of this size from now on."""
        self.taken[row] = _Taken(members, rows, 2 * self.memory)


class Passes:
    """A function of all members and rows, in passes of the size that the memory allows.

    Members are in the order of their groups. With `alone` there is one in each pass, and its rows are not routed.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        stack: Population,
        function: Metric,
        memory: int | None,
        *,
        alone: bool = False,
    ) -> None:
        self.model = model
        self.params = {name: tensor.detach() for name, tensor in params.items()}
        device = next((tensor.device for tensor in params.values()), torch.device("cpu"))
        self.members = cast(Population, optree.tree_map(Tensor.detach, cast(Any, stack)))
        self.function = function
        self.plan = _Plan(budget(device) if memory is None else memory)
        self.most = 1 if alone else len(stack)
        self.make = AloneModel if alone else BatchedModel
        self.whole = False  # the function gives one value for a batch: its rows must not be split
        self.rows = 0
        self.spec: Any = None
        self.latest: tuple[tuple[int, int, int], BatchedModel] | None = None

    def add(self, batch: Any) -> None:
        """Compute all members on a batch."""
        n = batch_size(batch, 0, "evaluate")
        if not n:
            return
        row = tuple(math.prod(x.shape[1:]) for x in optree.tree_leaves(batch) if isinstance(x, Tensor))
        member = start = 0
        while member < len(self.members):
            size = self.plan.size(row, n, min(self.most, len(self.members) - member), self.whole)
            if size is None:
                # Only for the measurement. Two rows, because a single row needs no routing and so uses less memory.
                self._run(0, min(2, self.most), _rows(batch, 0, 2), min(2, n), row)
                continue
            m, r = (1, min(size[1], n - start)) if start else size
            values = self._run(member, m, _rows(batch, start, start + r), r, row)
            if values is None:
                continue
            if r < n and any(x.dim() == 1 for x in values):
                self.whole = True
                continue
            self.take(slice(member, member + m), slice(start, start + r), n, values)
            start += r
            if start >= n:
                member, start = member + m, 0
        self.rows += n

    def take(self, members: slice, rows: slice, n: int, values: list[Tensor]) -> None:
        """Take up the leaves of a pass, `[m, r, *]` or `[m]`, of a batch of n rows."""
        raise NotImplementedError

    def expected(self, leaf: Any, r: int) -> str:
        """What a leaf of the function's result for r rows should be; nothing if it is that."""
        raise NotImplementedError

    def _run(self, member: int, m: int, batch: Any, r: int, row: tuple[int, ...]) -> list[Tensor] | None:
        """The function for m members from a first one on, leaf by leaf. None if memory is too small."""
        key = (member, m, r)
        known = self.latest is not None and self.latest[0] == key
        if not known:
            self.latest = None  # before the new one is made
            self.latest = key, self.make(self.model, self.params, _some(self.members, member, member + m))
        assert self.latest is not None
        rows = self.latest[1]
        try:
            with Peak() as memory:
                by_member = torch.func.vmap(
                    lambda i, batch: self._checked(self.function(MemberModel(rows, i), batch), r),
                    in_dims=(0, batch_dims(batch, None)),
                    randomness="different",
                )
                values: list[Tensor] = by_member(torch.arange(m), batch)
        except (RuntimeError, MemoryError) as error:
            smallest = m == 1 and (r == 1 or self.whole)
            if smallest or not is_out_of_memory(error):
                raise
            # The error refers to the tensors of the pass: the next pass must start after it is freed.
        else:
            self.plan.took(row, _Taken(m, r, memory.peak), complete=not known)
            return values
        self.latest = None
        self.plan.failed(row, m, r)
        return None

    def _checked(self, out: Any, r: int) -> list[Tensor]:
        """The leaves of the function's result for one member."""
        leaves, spec = optree.tree_flatten(out)
        for x in leaves:
            if expected := self.expected(x, r):
                got = f"one of shape {list(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ConfigError(f"evaluate: metric: expected {expected}, got {got}.")
        if not leaves or self.spec not in (None, spec):
            before = "at least one tensor" if self.spec is None else f"{self.spec}, as before"
            raise ConfigError(f"evaluate: metric: expected {before}, got {spec}.")
        self.spec = spec
        return cast(list[Tensor], leaves)


def _rows(batch: Any, start: int, stop: int) -> Any:
    """Some rows of a batch, as views."""
    return optree.tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) else x, batch)


def _some(members: Population, start: int, stop: int) -> Population:
    """Members in the order of their groups, as views."""
    groups: list[Group[Any]] = []
    before = taken = 0
    for group in members.groups:
        part = slice(max(0, start - before), max(0, stop - before))
        each = group.specs.each[part]
        if each:
            places = tuple(range(taken, taken + len(each)))
            groups.append(Group(tuple(value[part] for value in group.values), TreeSpecs(each), places))
        before += len(group.members)
        taken += len(each)
    return Stack(tuple(groups))

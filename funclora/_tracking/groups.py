"""Which rows of a batch use which members, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funclora._torch.functions import overwriting
from funclora._tracking.owners import Owners

# Up to this many rows of a member, the order of its factors in memory matters for speed.
FEW = 4
# Members whose numbers of rows, or ranks, differ by at most this factor are padded to the larger number.
PADDED = 2


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which rows use which member, for m members with up to `count` rows each.

    Attributes:
        n: the total number of rows.
        count: the largest number of rows of a member.
        table: `[m·count]`, the rows of the members in sequence; None if these are all rows in order. Members
            with fewer rows repeat one of them. A member without rows has the row n, which is zero.
        kept: the positions in `table` that are rows of their member; None if these are all.
        span: the first row and the one after the last, if `table` is all rows between them in order.
        absent: some members have no rows.
    """

    n: int
    count: int
    table: Tensor | None
    kept: Tensor | None
    span: tuple[int, int] | None = None
    absent: bool = False

    @classmethod
    def of(cls, rows: list[list[int]], n: int, device: torch.device) -> Assignment:
        count = max(map(len, rows))
        table = [row for each in rows for row in (*each, *(each[:1] or [n]) * (count - len(each)))]
        span = (table[0], table[0] + len(table))
        if table == list(range(n)):
            return cls(n, count, None, None, span)
        if table == list(range(*span)):
            return cls(n, count, torch.tensor(table, device=device), None, span)
        kept = None
        if any(len(each) < count for each in rows):
            kept = torch.tensor([i * count + j for i, each in enumerate(rows) for j in range(len(each))], device=device)
        return cls(n, count, torch.tensor(table, device=device), kept, absent=not all(rows))

    @cached_property
    def taken(self) -> Tensor:
        """`[m·count]`, as `table`, but any row for a member without rows: for what nobody reads."""
        assert self.table is not None
        with torch.inference_mode(False):
            return self.table.where(self.table < self.n, 0)

    @cached_property
    def back(self) -> Tensor:
        """`[n]`, the position in `table` of each row, the first one behind it for a row without a member."""
        assert self.table is not None
        with torch.inference_mode(False):
            places = torch.arange(len(self.table), device=self.table.device) if self.kept is None else self.kept
            back = self.table.new_full((self.n,), len(self.table))
            return back.index_copy(0, self.table[places], places)

    def gathered(self, x: Tensor) -> Tensor:
        """`[n, *]` -> `[m, count, *]`."""
        if self.absent:  # zeros, and not a row of the batch: what such a member holds reaches no gradient
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        if self.table is not None:
            x = x[slice(*self.span)] if self.span is not None else x.index_select(0, self.table)
        return self.split(x)

    def split(self, x: Tensor) -> Tensor:
        """`[m·count, *]` -> `[m, count, *]`."""
        return x.reshape(x.shape[0] // self.count, self.count, *x.shape[1:])

    def added(self, y: Tensor, u: Tensor) -> Tensor:
        """y `[n, *]`, a temporary, with u `[m, count, *]` added to the rows."""
        rows, u = self._rows_of(u.flatten(0, 1))
        y = y.to(torch.promote_types(y.dtype, u.dtype))
        return y + u if rows is None else overwriting()(torch.index_add, y, 0, rows, u)

    def put(self, y: Tensor, u: Tensor) -> Tensor:
        """y `[n, *]` with the rows replaced by u `[m, count, *]`."""
        rows, u = self._rows_of(u.flatten(0, 1))
        return u if rows is None else y.index_copy(0, rows, u.to(y.dtype))

    def member_of(self, m: int) -> Tensor:
        """`[n]`: the member of each row, -1 for a row without one, of m members."""
        device = None if self.table is None else self.table.device
        members = torch.arange(m * self.count, device=device) // self.count
        if self.table is None:
            return members
        return members.new_full((self.n + 1,), -1).index_copy(0, self.table, members)[: self.n]

    def first(self) -> list[int]:
        """The first row of each member."""
        if self.table is None:
            return list(range(0, self.n, self.count))
        firsts: list[int] = self.table[:: self.count].tolist()
        return firsts

    def counts(self, m: int) -> list[int]:
        """The number of rows of each of m members."""
        if self.kept is None:
            return [self.count] * m
        counts: list[int] = (self.kept // self.count).bincount(minlength=m).tolist()
        return counts

    def of_member(self, j: int, device: torch.device) -> Tensor:
        """The rows of the j-th member."""
        positions = torch.arange(j * self.count, (j + 1) * self.count, device=device)
        if self.kept is not None:
            positions = self.kept[(self.kept >= j * self.count) & (self.kept < (j + 1) * self.count)]
        return positions if self.table is None else self.table[positions]

    def _rows_of(self, u: Tensor) -> tuple[Tensor | None, Tensor]:
        if self.table is None or self.kept is None:
            return self.table, u
        return self.table[self.kept], u[self.kept]


def alike(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Keys in groups whose sizes differ by at most the factor `PADDED`."""
    groups: list[list[int]] = []
    smallest = 0
    by_size = sorted(sizes, key=lambda each: each[1])
    for key, size in by_size:
        if groups and size <= PADDED * smallest:
            groups[-1].append(key)
        else:
            groups.append([key])
            smallest = size
    order = {key: i for i, (key, _) in enumerate(sizes)}
    return [sorted(group, key=order.__getitem__) for group in groups]


class RoutedGroup(NamedTuple):
    """`m` members of one kind at one weight: how the batch uses their rule with leaves `[m, *]`.

    Attributes:
        scalings: `[m]`.
        unscaled: all of them are 1.
        lease: held while the rule exists: what keeps the memory of its tensors from other uses.
        owners: the owner of each member's first row, if the rows are positions of a tensor; else that is the row.
        rows: which rows use which member; None if `weights` are given.
        weights: `[n, m]`, each row's weights of the members.
        present: `[n]`, if m is the number of rows: whether the row has a member.
        apart: the rule is not a low-rank update, and runs on the rows of each member separately.
    """

    scalings: Tensor
    rows: Assignment | None
    weights: Tensor | None = None
    present: Tensor | None = None
    apart: bool = False
    unscaled: bool = False
    lease: object = None
    owners: Sequence[int] | None = None

    def with_scalings(self, scalings: Tensor) -> RoutedGroup:
        """The same rows and members with other scalings."""
        return self if scalings is self.scalings else self._replace(scalings=scalings, unscaled=False)


class RoutedGroups(tuple[RoutedGroup, ...]):
    """The groups of a rule as static data of a tree: two are equal only if they are the same object."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Members(NamedTuple):
    """Some members of a group, and which positions of a tensor use them.

    Attributes:
        chosen: the members, by their number in the group.
        rows: the positions of each.
        owners: the owner of the first position of each.
    """

    chosen: list[int]
    rows: Assignment
    owners: Sequence[int]

    def taken(self, values: Tensor) -> Tensor:
        """The values `[m, *]` of these members."""
        if self.chosen == list(range(len(values))):
            return values
        return values.index_select(0, torch.tensor(self.chosen, device=values.device))


def members_of(group: RoutedGroup, m: int, owners: Owners) -> list[Members]:
    """The members that a group's rows use at the positions of a tensor with those owners.

    Positions count in order along the dimensions in which the owner varies.
    """
    key: Any = (group.rows, group.present)
    if key not in owners.plans:
        positions = member_at(group, m, owners.index.flatten()).tolist()
        found: dict[int, list[int]] = {}
        for position, member in enumerate(positions):
            if member >= 0:
                found.setdefault(member, []).append(position)
        of_position = owners.index.flatten().tolist()
        owners.plans[key] = [
            Members(
                some,
                Assignment.of([found[k] for k in some], len(positions), group.scalings.device),
                [of_position[found[k][0]] for k in some],
            )
            for some in alike([(k, len(each)) for k, each in found.items()])
        ]
    plan: list[Members] = owners.plans[key]
    return plan


def member_at(group: RoutedGroup, m: int, owners: Tensor) -> Tensor:
    """The member of a group, of m, at positions of those owners; -1 for none."""
    assert group.rows is not None
    of_owner = group.rows.member_of(m)
    if group.present is not None:
        of_owner = torch.where(group.present, of_owner.to(group.present.device), -1)
    return of_owner.to(owners.device)[owners]


def in_succession(groups: RoutedGroups, n: int) -> tuple[int, ...]:
    """The order in which the rows of the groups follow each other and cover all rows; empty if there is none."""
    spans = [group.rows.span if group.rows is not None else None for group in groups]
    found = sorted((span, i) for i, span in enumerate(spans) if span is not None)
    ends = [0, *(end for (_, end), _ in found)]
    follow = (
        len(found) == len(spans) and ends[-1] == n and all(a == b for ((a, _), _), b in zip(found, ends, strict=False))
    )
    return tuple(i for _, i in found) if follow else ()

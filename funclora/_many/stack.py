"""Many values as one: `stack`.

The members of a stack may differ in everything: ranks, scalings, targets, methods. Members of the same structure form
a `Group`, whose leaves have the members as first dimension; nothing is padded, so a member comes out of the stack
unchanged. A stack is a pytree of those leaves: optimizers and gradients accept it directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar, cast, overload

import optree
import torch
from torch import Tensor

from funclora._api.arguments import refuse
from funclora._torch.pytree import StaticTensors, map_frozen, pytree_node
from funclora.errors import ConfigError
from funclora.rules.base import Rule, has_own_scaling, next_to_output, rescaled
from funclora.rules.tokens import untied

T = TypeVar("T")


@dataclass(frozen=True)
class TreeSpecs(StaticTensors):
    """The members' own trees, with everything that is not a leaf."""

    each: tuple[Any, ...]

    @functools.cached_property
    def first(self) -> Any:
        """The first member's tree, with the number of each leaf in its place."""
        return optree.tree_unflatten(self.each[0], range(self.each[0].num_leaves))

    def ready(self) -> TreeSpecs:
        """These, with everything computed that torch.compile cannot trace."""
        _ = self.first, self.scalings
        return self

    @functools.cached_property
    def next_to_output(self) -> list[bool]:
        """For each leaf, whether it is a factor next to the output."""
        return next_to_output(self.first)

    def unscaled(self, leaves: Iterable[Tensor]) -> Any:
        """The first member's tree with other leaves, and the scaling 1 in all its rules."""
        known = self.__dict__
        if "_unscaled" not in known:
            leaves = list(leaves)
            known["_unscaled"] = optree.tree_structure(unscaled(optree.tree_unflatten(self.each[0], leaves)))
        return optree.tree_unflatten(known["_unscaled"], leaves)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TreeSpecs:
        trees: list[Any] = [optree.tree_unflatten(spec, [0] * spec.num_leaves) for spec in self.each]
        return TreeSpecs(tuple(optree.tree_structure(map_frozen(function, tree)) for tree in trees)).ready()

    @functools.cached_property
    def scalings(self) -> dict[str, list[float]]:
        if not isinstance(self.first, dict) or not all(isinstance(rule, Rule) for rule in self.first.values()):
            return {}
        trees: list[Any] = [optree.tree_unflatten(spec, [None] * spec.num_leaves) for spec in self.each]
        trees = [untied(tree) for tree in trees]
        scaled = [name for name, rule in trees[0].items() if isinstance(rule, Rule) and has_own_scaling(rule)]
        return {name: [tree[name].scaling for tree in trees] for name in scaled}


@pytree_node
@dataclass(frozen=True, eq=False)
class Group(Generic[T]):
    """Members of one structure.

    Attributes:
        values: the leaves of their trees, `[n_members, *]` each.
        specs: their trees.
        members: their positions in the stack.
    """

    values: tuple[Tensor, ...]
    specs: TreeSpecs
    members: tuple[int, ...]

    leaf_names: ClassVar[tuple[str, ...]] = ("values",)

    def member(self, k: int) -> T:
        """Member k, unchanged."""
        tree: Any = optree.tree_unflatten(self.specs.each[k], [value[k] for value in self.values])
        return cast(T, tree)

    def tree(self) -> T:
        """All members as one tree with leaves `[n_members, *]`; other values come from the first member."""
        if torch.compiler.is_compiling():  # the tracer knows optree's functions, but not its specs
            return cast(T, optree.tree_map(lambda i: self.values[i], self.specs.first))
        tree: Any = optree.tree_unflatten(self.specs.each[0], self.values)
        return cast(T, tree)

    def unscaled_tree(self) -> T:
        """The same, with the scaling 1 in all rules."""
        if torch.compiler.is_compiling():
            return cast(T, unscaled(self.tree()))
        return cast(T, self.specs.unscaled(self.values))

    def in_product_order(self) -> Group[T]:
        """The same members in the order in memory in which their products are fast, and which their gradients have.

        Factors next to the output, `[n_members, out, r]`, lie there as `[n_members, r, out]`.
        """

        def ordered(x: Tensor, up: bool) -> Tensor:
            if not up or x.dim() != 3:
                return x
            return x.mT.contiguous().mT if len(x) > 1 else x.contiguous()

        return replace(self, values=tuple(map(ordered, self.values, self.specs.next_to_output)))

    def with_tree(self, tree: Any) -> Group[Any]:
        """The same members with another tree `[n_members, *]`, in most cases of the same structure."""
        if torch.compiler.is_compiling():  # which raises if the structure changes
            before: Any = self.tree()
            return replace(self, values=tuple(optree.tree_leaves(optree.tree_map(lambda _, x: x, before, tree))))
        leaves, spec = optree.tree_flatten(tree)
        specs = self.specs if spec == self.specs.each[0] else TreeSpecs((spec,) * len(self.members)).ready()
        return Group(tuple(leaves), specs, self.members)

    def scalings(self) -> dict[str, list[float]]:
        """The members' scalings, for each rule that has one."""
        return self.specs.scalings


@pytree_node
@dataclass(frozen=True, eq=False)
class Stack(Generic[T]):
    """Values of one kind, adapters for example, as one value. Made by `stack`.

    `len(stack)` is the number of members, `stack[i]` one of them, `stack[2:5]` and `stack[[4, 0]]` are stacks of
    some members, in that order; iteration gives the members.

    Attributes:
        groups: the members, by structure.

    Examples:
        >>> from funclora import LoRA
        >>> members = [{"weight": LoRA(torch.full((r, 3), float(r)), torch.ones(2, r))} for r in (1, 2, 1)]
        >>> several = stack(members)
        >>> len(several), several[1]["weight"].r, several[2:]
        (3, 2, Stack of 1)
    """

    groups: tuple[Group[T], ...]

    leaf_names: ClassVar[tuple[str, ...]] = ("groups",)

    def __len__(self) -> int:
        return sum(len(group.members) for group in self.groups)

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Stack[T]: ...

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> T | Stack[T]:
        if isinstance(index, slice):
            return self._some(range(len(self))[index])
        if isinstance(index, Tensor):
            index = index.tolist()
        if isinstance(index, Sequence):
            return self._some(index)
        group, k = self._place(index)
        return group.member(k)

    def _place(self, index: int) -> tuple[Group[T], int]:
        n = len(self)
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"stack[...]: expected an int, a slice or a list of ints, got {index!r}.")
        if not -n <= index < n:
            raise IndexError(f"stack[{index}]: there are {n} members.")
        return self._places[index % n]

    @functools.cached_property
    def _places(self) -> dict[int, tuple[Group[T], int]]:
        """Each member's group, and its position there."""
        return {member: (group, k) for group in self.groups for k, member in enumerate(group.members)}

    def _some(self, indices: Iterable[int]) -> Stack[T]:
        chosen: dict[int, tuple[Group[T], list[int], list[int]]] = {}
        for position, index in enumerate(indices):
            group, k = self._place(index)
            _, inside, positions = chosen.setdefault(id(group), (group, [], []))
            inside.append(k)
            positions.append(position)
        return Stack(tuple(_selected(*each) for each in chosen.values()))

    def leaves(self) -> list[Tensor]:
        """The leaves of the groups, `[members of the group, *]` each."""
        return [value for group in self.groups for value in group.values]

    def with_leaves(self, leaves: Iterable[Tensor]) -> Stack[T]:
        """The same members with other leaves."""
        given = iter(leaves)
        return Stack(tuple(replace(group, values=tuple(next(given) for _ in group.values)) for group in self.groups))

    def in_order(self, by_group: Tensor) -> Tensor:
        """Values of the members `[n_members, *]`, given group by group, in the members' own order."""
        order = torch.tensor([i for group in self.groups for i in group.members]).argsort()
        return by_group[order.to(by_group.device)]

    def __repr__(self) -> str:
        return f"Stack of {len(self)}"


def _selected(group: Group[T], inside: list[int], positions: list[int]) -> Group[T]:
    values = group.values
    if inside != list(range(len(group.members))):
        values = tuple(value[torch.tensor(inside, device=value.device)] for value in values)
    return Group(values, TreeSpecs(tuple(group.specs.each[k] for k in inside)).ready(), tuple(positions))


def stack(members: Iterable[T]) -> Stack[T]:
    """Many values of one kind as one.

    Args:
        members: adapters (dicts of rules), or other pytrees of tensors, such as optimizer states. They may differ
            in targets, methods, ranks, scalings, dtypes. A stack is an iterable of members too: several are joined
            by `stack([*first, *second])`.

    Returns:
        The stack. `stack(members)[i]` equals `members[i]` bit for bit.

    Raises:
        ConfigError: there are no members.
        ArgumentError: `members` is not an iterable of members, or a leaf is not a tensor.

    Examples:
        >>> from funclora import LoRA, DoRA
        >>> one = {"weight": LoRA(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)}
        >>> other = {"weight": DoRA(torch.ones(4, 3), torch.ones(2, 4), torch.ones(2))}
        >>> both = stack([one, other])
        >>> both[0]["weight"].scaling, both[1]["weight"].r
        (2.0, 4)
    """
    if isinstance(members, (Mapping, str, Tensor)) or not isinstance(members, Iterable):
        remedy = "One adapter becomes a stack of one: stack([adapters])." if isinstance(members, Mapping) else ""
        refuse("members", "adapters (a list of dicts of rules)", members, remedy)
    groups: dict[Any, tuple[list[list[Tensor]], list[Any], list[int]]] = {}
    for i, member in enumerate(members):
        tree: Any = member
        leaves, spec = optree.tree_flatten(tree)
        for path, leaf in zip(spec.paths(), leaves, strict=True):
            if not isinstance(leaf, Tensor):
                where = ".".join(map(str, path)) or "the member itself"
                refuse(f"members[{i}]: {where}", "a tensor", leaf)
        values, specs, positions = groups.setdefault(kind_of(member, leaves), ([], [], []))
        values.append(leaves)
        specs.append(spec)
        positions.append(i)
    if not groups:
        raise ConfigError("stack: expected at least one member, got none.")
    return Stack(tuple(
        Group(tuple(map(torch.stack, zip(*values, strict=True))), TreeSpecs(tuple(specs)).ready(), tuple(positions))
        for values, specs, positions in groups.values()
    ))  # fmt: skip


def check_stack(stack: object, where: str = "stack") -> None:
    """Raise `ArgumentError` unless the value is a stack."""
    if not isinstance(stack, Stack):
        of = "[adapters]" if isinstance(stack, Mapping) else "adapters" if isinstance(stack, (list, tuple)) else "[...]"
        refuse(where, "a stack of adapters", stack, f"Make one: stack({of}).")


def unstack(stack: Stack[T]) -> list[T]:
    """The members of a stack, unchanged.

    Examples:
        >>> unstack(stack([{"x": torch.zeros(2)}, {"x": torch.ones(2)}]))[1]
        {'x': tensor([1., 1.])}
    """
    check_stack(stack)
    return list(stack)


def kind_of(member: Any, leaves: list[Tensor]) -> Any:
    """A key that is equal for members of one group: everything but the values of their leaves and their scalings."""
    return optree.tree_structure(unscaled(member)), tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def unscaled(tree: Any) -> Any:
    """The tree with the scaling 1 in all its rules."""
    return optree.tree_map(lambda x: rescaled(x, 1.0) if _is_rule(x) else x, tree, is_leaf=_is_rule)


def _is_rule(x: Any) -> bool:
    return isinstance(x, Rule)

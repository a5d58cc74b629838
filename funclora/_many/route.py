"""`route`: which rows of a batch use which members of a stack, planned for few and large products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._api.arguments import refuse
from funclora._many.stack import Group, Stack, check_stack, unscaled
from funclora._tracking.batch import Batch, RowsOf
from funclora._tracking.groups import PADDED, Assignment, RoutedGroup, RoutedGroups, alike
from funclora._tracking.routed import Routed
from funclora.errors import ConfigError, UnsupportedError
from funclora.rules.base import Rule
from funclora.rules.layouts import padded
from funclora.rules.low_rank import LowRank, low_rank_of
from funclora.rules.tokens import untied


def route(
    stack: Stack[dict[str, Rule]],
    ids: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    weights: Tensor | None = None,
    repeats: int = 1,
    rows_of: Mapping[str, int | Sequence[int] | Tensor | None] | None = None,
) -> dict[str, Rule]:
    """An adapter for each row of a batch, or for each token, as one value for `apply` and `bind`.

    Row i of the batch (the first dimension of the model's inputs) is computed with member `ids[i]`, as if it were the
    only row. The base weights are used once for all rows. With `weights`, row i uses the base weight plus the
    weighted sum of the members' changes to it.

    With ids for each token, a row may hold several sequences one after the other, each with its own adapter. Pass the
    model whatever keeps packed sequences apart, such as `position_ids` that start again or a mask of blocks.

    With a list of ids, rows of one member are computed together. With a tensor of ids, every row gets a copy of its
    adapter, and no shape depends on the values of the ids, so a compiled function, with or without `route` in it, needs
    only one graph for all choices.

    Every position of every adapted layer is read by its own adapter: tensors are tracked through the model, also where
    it sorts tokens by expert. What the base model mixes, such as attention in a packed row, is its own business. A
    layer that gets an input whose rows are not known raises `UnsupportedError`.

    Args:
        stack: the adapters, `stack([...])`.
        ids: `[n_rows]`, the member of each row, or `[n_rows, n_tokens]`, of each token; -1 for the base model.
        weights: `[n_rows, n_members]` or `[n_rows, n_tokens, n_members]`, instead of ids. They receive gradients.
        repeats: the model may also get each row this many times in succession, as with `num_beams` and
            `num_return_sequences` of transformers' `generate`: pass their product.
        rows_of: where an input of the model holds the rows, by its name, if that is not the first dimension: the
            dimension, or the row of each position of the first dimension (`{"pixel_values": [0, 0, 1]}` for three
            pictures of two rows), or None for an input that no adapted layer reads by row.

    Returns:
        Adapters for a batch of that many rows.

    Raises:
        ConfigError: an id is out of range, or shapes do not fit the stack, or each other.

    Examples:
        >>> import funclora as fl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> members = fl.stack([{"weight": fl.LoRA(torch.ones(1, 2), torch.full((1, 1), k))} for k in (1.0, 2.0)])
        >>> fl.apply(model, params, route(members, [1, -1, 0]), torch.ones(3, 2)).flatten().tolist()
        [4.0, 0.0, 2.0]

        Two tokens of one row, each with its own adapter:

        >>> fl.apply(model, params, route(members, [[1, 0]]), torch.ones(1, 2, 2)).flatten().tolist()
        [4.0, 2.0]
    """
    check_stack(stack)
    if (ids is None) == (weights is None):
        raise ConfigError("route: expected either ids or weights.")
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ConfigError(f"route: repeats: expected a positive integer, got {repeats!r}.")
    told = checked_rows_of(rows_of)
    if weights is not None:
        return _weighted(stack, weights, repeats, told)
    if isinstance(ids, Tensor) and torch.compiler.is_compiling():
        return _copied(stack, _unread(ids, len(stack)), Batch(len(ids), repeats, rows_of=told))
    members, shape = _checked(ids, len(stack))
    if len(shape) == 2:
        if repeats != 1 or any(rows is not None for rows in told.values()):
            raise ConfigError("route: ids for each token go with repeats=1, and rows_of with None only.")
        named = sorted(set(members))
        batch = Batch(len(named), tokens=torch.tensor([named.index(member) for member in members]).view(shape))
        members = named
    else:
        batch = Batch(len(members), repeats, rows_of=told)
        if isinstance(ids, Tensor):
            return _copied(stack, ids, batch)
    if len(members) == 1:  # one row needs no tracking
        return {} if members[0] < 0 else dict(stack[members[0]])
    found: dict[str, list[Found]] = {}
    for group in stack.groups:
        place = {member: k for k, member in enumerate(group.members)}
        rows: dict[int, list[int]] = {}
        for row, member in enumerate(members):
            if member in place:
                rows.setdefault(place[member], []).append(row)
        add_members(found, group, group.scalings(), rows)
    known: dict[Any, Any] = {}
    return {name: routed(_merged(parts), batch, known) for name, parts in found.items()}


def add_members(
    found: dict[str, list[Found]], group: Group[dict[str, Rule]], scalings: dict[str, list[float]],
    rows: dict[int, list[int]],
) -> None:  # fmt: skip
    """Add the rows of the members of a group to those of each weight.

    Args:
        found: by the name of the weight.
        group: the members.
        scalings: the scalings of its members, for each rule that has one.
        rows: the rows of each member that has some, by its position in the group.
    """
    for ks in alike([(k, len(rows[k])) for k in sorted(rows, key=rows.__getitem__)]):
        some = _compact(ks)
        used = [rows[k] if k in ks else [] for k in some]
        for name, rule in untied(_members(group, some)).items():
            numbers = scalings.get(name)
            found.setdefault(name, []).append((rule, [numbers[k] if numbers else 1.0 for k in some], used))


def in_groups(stack: Stack[dict[str, Rule]]) -> list[int]:
    """The members, ordered so that members that `route` computes together follow each other."""

    def kind(group: Group[dict[str, Rule]]) -> list[tuple[str, str, tuple[int, ...]]]:
        tree = group.tree()
        each = [(name, tree[name]) for name in sorted(tree)]
        return [(type(rule).__name__, name, tuple(getattr(rule, rule.leaf_names[0]).shape[1:])) for name, rule in each]

    return [member for group in sorted(stack.groups, key=kind) for member in group.members]


def _copied(stack: Stack[dict[str, Rule]], ids: Tensor, batch: Batch) -> dict[str, Rule]:
    """A copy of its adapter for every row."""
    rows = Assignment(batch.n, 1, None, None)
    found: dict[str, list[tuple[Rule, RoutedGroup]]] = {}
    for group in stack.groups:
        if not group.values:  # the member {}: its rows use the base model
            continue
        device = group.values[0].device
        place = torch.full((len(stack) + 1,), len(group.members), device=device)  # the last entry is for id -1
        place[torch.tensor(group.members, device=device)] = torch.arange(len(group.members), device=device)
        index = place[ids.to(device)]
        present = index < len(group.members)
        values = tuple(torch.cat([x, torch.zeros_like(x[:1])])[index] for x in group.values)
        tree = replace(group, values=values).tree()
        for name, rule in untied(tree).items():
            leaf = getattr(rule, rule.leaf_names[0])
            scalings = _numbers([*(group.scalings().get(name) or [1.0] * len(group.members)), 1.0], leaf)[index]
            found.setdefault(name, []).append((rule, RoutedGroup(scalings, rows, None, present, _is_apart(rule))))
    return {
        name: Routed(tuple(rule for rule, _ in some), RoutedGroups(each for _, each in some), batch)
        for name, some in found.items()
    }


def _unread(ids: Tensor, n_members: int) -> Tensor:
    """The ids of a compiled function, which cannot read them: the lookup of one that is out of range fails there."""
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UnsupportedError(
            "route under torch.compile: expected ids as a tensor of whole numbers [n_rows]. Call route outside of the "
            "compiled function for other ids."
        )
    return torch.where((ids < -1) | (ids >= n_members), n_members + 1, ids)


def _checked(ids: Any, n_members: int) -> tuple[list[int], tuple[int, ...]]:
    """The ids in order, and their shape."""
    if not isinstance(ids, (Tensor, Sequence)) or isinstance(ids, str):
        refuse("ids", "one int for each row, or a list of ints for each row (lists or a tensor)", ids)
    given = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    by_token = bool(given) and all(isinstance(row, (list, tuple)) for row in given)
    if by_token and len({len(row) for row in given}) > 1:
        raise ConfigError(
            f"route: ids: expected as many tokens in each row, got {sorted({len(row) for row in given})}. Give the "
            "tokens that fill up shorter rows an id too, such as -1."
        )
    members = [member for row in given for member in row] if by_token else given
    if not members or not all(isinstance(i, int) and not isinstance(i, bool) for i in members):
        raise ConfigError(f"route: ids: expected one int for each row or token, got {given!r:.200}.")
    for i, member in enumerate(members):
        if not -1 <= member < n_members:
            where = "][".join(map(str, divmod(i, len(given[0])))) if by_token else i
            raise ConfigError(
                f"route: ids[{where}] is {member}; the stack has {n_members} members (0 to {n_members - 1}), and -1 is "
                "the base model."
            )
    return members, (len(given), len(given[0])) if by_token else (len(given),)


def checked_rows_of(rows_of: Any) -> RowsOf:
    """Where inputs hold the rows, by name."""
    if rows_of is None:
        return {}
    expected = "a dict from names of inputs to a dimension, the row of each position, or None"
    if not isinstance(rows_of, Mapping) or not all(isinstance(name, str) for name in rows_of):
        refuse("rows_of", expected, rows_of)
    for name, rows in rows_of.items():
        ints = isinstance(rows, Sequence) and all(isinstance(row, int) for row in rows)
        if isinstance(rows, (bool, str)) or not (rows is None or ints or isinstance(rows, (int, Tensor))):
            refuse(f"rows_of[{name!r}]", "a dimension, the row of each position, or None", rows)
    return dict(rows_of)


def _members(group: Group[dict[str, Rule]], ks: list[int]) -> dict[str, Rule]:
    """Some members of a group, in ascending order, as one tree; without a copy if they follow each other."""
    if ks == list(range(ks[0], ks[-1] + 1)):
        values = group.values if len(ks) == len(group.members) else tuple(x[ks[0] : ks[-1] + 1] for x in group.values)
    else:
        values = tuple(x.index_select(0, torch.tensor(ks, device=x.device)) for x in group.values)
    return replace(group, values=values).tree()


def _compact(ks: list[int]) -> list[int]:
    """The positions that are computed together to use some of them, in ascending order.

    These are all from the first to the last one, which can be read without a copy, unless most would be unused.
    """
    covering = range(min(ks), max(ks) + 1)
    return list(covering) if len(covering) <= PADDED * len(ks) else sorted(ks)


# Members with leaves `[m, *]`, their scalings, and the rows of each: none of a member that is not used.
Found = tuple[Rule, list[float], list[list[int]]]


def _merged(parts: list[Found]) -> list[Found]:
    """Groups that differ in rank and in the number of rows by at most the factor `PADDED`, as one."""
    if len(parts) == 1:
        return parts
    kinds: dict[Any, list[Found]] = {}
    for part in parts:
        kinds.setdefault(_kind(part[0]), []).append(part)
    merged: list[Found] = []
    for kin in kinds.values():
        if len(kin) == 1 or not kin[0][0].rank_dims:
            merged += kin
            continue
        for by_count in alike([(i, max(map(len, rows))) for i, (_, _, rows) in enumerate(kin)]):
            for by_rank in alike([(i, _rank(kin[i][0])) for i in by_count]):
                merged.append(_joined([kin[i] for i in by_rank]))
    return merged


def _kind(rule: Rule) -> Any:
    """A key that is equal for groups that can be joined: everything except members, ranks and scalings."""
    ranks = _rank_dims(rule)
    leaves = []
    for name in rule.leaf_names:
        leaf = getattr(rule, name)
        shape = tuple(n for dim, n in enumerate(leaf.shape) if dim not in (0, ranks.get(name)))
        leaves.append((shape, leaf.dtype, leaf.device))
    return optree.tree_structure(unscaled(rule)), tuple(leaves)


def _rank_dims(rule: Rule) -> dict[str, int]:
    """The rank dimensions of the leaves `[m, *]`, counted from the front."""
    return {name: dim + 1 if dim >= 0 else dim + getattr(rule, name).dim() for name, dim in rule.rank_dims.items()}


def _rank(rule: Rule) -> int:
    ranks: list[int] = [getattr(rule, name).shape[dim] for name, dim in _rank_dims(rule).items()]
    return max(ranks)


def _joined(parts: list[Found]) -> Found:
    if len(parts) == 1:
        return parts[0]
    rules: list[Any] = [rule for rule, _, _ in parts]
    dims = _rank_dims(rules[0])
    leaves = {}
    rows = [each for _, _, some in parts for each in some]
    for leaf in rules[0].leaf_names:
        given = [getattr(rule, leaf) for rule in rules]
        if leaf in dims:
            rank = max(x.shape[dims[leaf]] for x in given)
            given = [padded(x, dims[leaf], rank) for x in given]
        leaves[leaf] = torch.cat(given)
    scalings = [s for _, some, _ in parts for s in some]
    order = sorted((i for i, each in enumerate(rows) if each), key=rows.__getitem__)
    if order != list(range(len(rows))):
        index = torch.tensor(order, device=next(iter(leaves.values())).device)
        leaves = {leaf: value.index_select(0, index) for leaf, value in leaves.items()}
    return replace(rules[0], **leaves), [scalings[i] for i in order], [rows[i] for i in order]


def _is_apart(rule: Rule) -> bool:
    """Whether a rule with leaves `[m, *]` is not a low-rank update with a layout."""
    if isinstance(rule, LowRank):
        return False
    return rule.layout is None or low_rank_of(rule.member(0)) is None


def routed(parts: list[Found], batch: Batch, known: dict[Any, Any], lease: object = None) -> Routed:
    """The parts of one weight as a rule; `known` holds results of other weights."""
    described = []
    for rule, scalings, rows in parts:
        leaf = getattr(rule, rule.leaf_names[0])
        key = tuple(map(tuple, rows)), leaf.device
        if key not in known:
            known[key] = Assignment.of(rows, batch.n, leaf.device)
        unscaled = all(scaling == 1.0 for scaling in scalings)
        described.append(
            RoutedGroup(_numbers(scalings, leaf), known[key], apart=_is_apart(rule), unscaled=unscaled, lease=lease)
        )
    return Routed(tuple(rule for rule, _, _ in parts), RoutedGroups(described), batch)


def _numbers(scalings: list[float], leaf: Tensor) -> Tensor:
    return torch.tensor(scalings, dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)


def _weighted(stack: Stack[dict[str, Rule]], weights: Tensor, repeats: int, rows_of: RowsOf) -> dict[str, Rule]:
    if not isinstance(weights, Tensor) or weights.dim() not in (2, 3) or weights.shape[-1] != len(stack):
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ConfigError(
            f"route: weights: expected a tensor [n_rows, {len(stack)}] or [n_rows, n_tokens, {len(stack)}], one number "
            f"a member, got {got}."
        )
    if weights.dim() == 3:
        shape = weights.shape[:2]
        weights = weights.flatten(0, 1)
        batch = Batch(len(weights), tokens=torch.arange(len(weights)).view(shape))
    else:
        batch = Batch(len(weights), repeats, rows_of=rows_of)
    found: dict[str, list[tuple[Rule, RoutedGroup]]] = {}
    for group in stack.groups:
        some = weights[:, torch.tensor(group.members, device=weights.device)]
        for name, rule in untied(group.tree()).items():
            scalings = group.scalings().get(name) or [1.0] * len(group.members)
            finite, own = _without_broken(rule, some)
            numbers = _numbers(scalings, getattr(rule, rule.leaf_names[0]))
            found.setdefault(name, []).append((finite, RoutedGroup(numbers, None, own, apart=_is_apart(rule))))
    return {
        name: Routed(tuple(rule for rule, _ in some), RoutedGroups(each for _, each in some), batch)
        for name, some in found.items()
    }


def _without_broken(rule: Any, weights: Tensor) -> tuple[Rule, Tensor]:
    """A rule `[m, *]` and its members' weights `[n, m]`, with members that hold NaN or infinity moved to the weights.

    0·NaN is NaN, forward and backward: a member of weight 0 would spoil the rows of the other members. So such a member
    gets zeros for its tensors, and NaN for its weights that are not 0.
    """
    leaves = {leaf: getattr(rule, leaf) for leaf in rule.leaf_names}
    broken = torch.stack([(x.detach() * 0).unsqueeze(-1).flatten(1).sum(1) for x in leaves.values()]).sum(0) != 0

    def kept(x: Tensor) -> Tensor:
        return torch.where(broken.reshape(-1, *[1] * (x.dim() - 1)), 0.0, x)

    rule = replace(rule, **{leaf: kept(x) for leaf, x in leaves.items()})
    broken = broken.to(weights.device)
    return rule, torch.where(broken & (weights != 0), float("nan"), torch.where(broken, 0.0, weights))

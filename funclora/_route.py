"""A different adapter for every row of the batch, in one ordinary forward pass.

The operation on the base weight runs once, on all rows. What differs by row is small: the low-rank path runs as one
batched product over the members (rows of one member together), and a DoRA member's gain is a vector per row.
For a row with member j, s its scaling and g its gain (m/‖V‖ for DoRA, else 1):

    y = g_j ∘ (x·Wᵀ) + (x·A_jᵀ)·(s·g_j ∘ B_j)ᵀ + bias

With weights w over the members it is the base's weight plus the weighted sum of the members' changes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._layout import Layout
from funclora._maps import ConvMap, LeftMatmulMap, LinearMap, linear_maps
from funclora._rows import Place, RowTensor, dropped, is_elementwise, rows_back, rows_first, rows_of
from funclora._rules import DoRA, Full, LowRank, Rule
from funclora._stack import Cohort, Stack
from funclora._tree import pytree_node
from funclora.errors import ConfigError, UnsupportedError

# Members whose numbers of rows, or ranks, differ by no more than this factor are padded to the larger.
PADDED = 2
# The place of the rows where there is one: the whole tensor is that row, and gets a dimension in front.
_ALONE = Place(0, 0)
# How many members' DoRA norms to compute together.
CHUNK = 16


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows use which member, for m members with up to `count` rows each.

    Attributes:
        n: the number of rows in all.
        count: the largest number of rows of a member.
        table: `[m·count]`, the rows of the members one after the other; None if that is all rows in order. Members
            with fewer rows repeat one of them.
        kept: the positions in the table that are no repetition; None if there is none.
    """

    n: int
    count: int
    table: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(cls, rows: list[list[int]], n: int, device: torch.device) -> Rows:
        count = max(map(len, rows))
        table = [row for each in rows for row in (*each, *each[:1] * (count - len(each)))]
        if table == list(range(n)):
            return cls(n, count, None, None)
        kept = None
        if any(len(each) < count for each in rows):
            kept = torch.tensor([i * count + j for i, each in enumerate(rows) for j in range(len(each))], device=device)
        return cls(n, count, torch.tensor(table, device=device), kept)

    def gathered(self, x: Tensor) -> Tensor:
        """`[n, *]` -> `[m, count, *]`."""
        x = x if self.table is None else x.index_select(0, self.table)
        return cast(Tensor, x.unflatten(0, (-1, self.count)))

    def added(self, y: Tensor, u: Tensor) -> Tensor:
        """y `[n, *]` with u `[m, count, *]` added to the rows."""
        rows, u = self._rows_of(u.flatten(0, 1))
        if rows is None:
            return y + u
        return y.to(torch.promote_types(y.dtype, u.dtype)).index_add(0, rows, u)

    def put(self, y: Tensor, u: Tensor) -> Tensor:
        """y `[n, *]` with the rows replaced by u `[m, count, *]`."""
        rows, u = self._rows_of(u.flatten(0, 1))
        return u if rows is None else y.index_copy(0, rows, u.to(y.dtype))

    def first(self) -> list[int]:
        """The first row of each member."""
        if self.table is None:
            return list(range(0, self.n, self.count))
        firsts: list[int] = self.table[:: self.count].tolist()
        return firsts

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


class Part(NamedTuple):
    """Members of one kind at one weight, `m` of them: how the batch uses the rule with leaves `[m, *]`.

    Attributes:
        scalings: `[m]`.
        rows: which rows use which member; None where `weights` are given.
        weights: `[n, m]`, each row's weights of the members.
        present: `[n]`, where m is the number of rows: whether the row has a member at all.
    """

    scalings: Tensor
    rows: Rows | None
    weights: Tensor | None = None
    present: Tensor | None = None


class Parts(tuple[Part, ...]):
    """The parts of a rule as static data of a tree: two are equal if they are the same."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@pytree_node
@dataclass(frozen=True, eq=False)
class Routed(Rule):
    """Another member of a stack for every row of the batch. Made by `route`.

    Attributes:
        rules: for each part the members' rule, its leaves `[m, *]`.
        parts: for each rule the rows that use its members.
        n: the number of rows.
        repeats: how many times in succession the model may be given each of them.
    """

    rules: tuple[Rule, ...]
    parts: Parts
    n: int
    repeats: int

    leaves: ClassVar[tuple[str, ...]] = ("rules",)

    @property
    def dropout_p(self) -> float:
        return max(rule.dropout_p for rule in self.rules)

    @property
    def layout(self) -> Layout | None:
        """Where the matrix lies in the weight; None if some members replace the weight as a whole."""
        return None if self.replacing() else self.rules[0].layout  # type: ignore[attr-defined]

    def replacing(self) -> list[tuple[Full, Part]]:
        """The members that replace the weight as a whole."""
        return [(rule, part) for rule, part in zip(self.rules, self.parts, strict=True) if isinstance(rule, Full)]

    def updating(self) -> Routed | None:
        """The rule of the other members, if there are any."""
        kept = [(rule, part) for rule, part in zip(self.rules, self.parts, strict=True) if not isinstance(rule, Full)]
        return replace(self, rules=tuple(r for r, _ in kept), parts=Parts(p for _, p in kept)) if kept else None

    def dense(self, weight: Tensor) -> Tensor:
        raise UnsupportedError(
            "every row of the batch has a weight of its own here, and there is no such form of this operation. Leave "
            "the target out, use funclora.vmap over the stack, or call the model once for each member."
        )

    def check(self, name: str, weight: Tensor) -> None:
        for rule in self.rules:
            one: Rule = replace(cast(Any, rule), **{leaf: getattr(rule, leaf)[0] for leaf in rule.leaves})
            one.check(name, weight)
            if isinstance(rule, LowRank) and rule.layout.lead(weight.shape):
                raise UnsupportedError(
                    f"{name!r} holds the matrices of several experts, which sort the tokens by expert: which row a "
                    "token belongs to is not known there. Call the model once for each member, or leave the target out."
                )

    def prepared(self, weight: Tensor) -> Rule:
        if self.replacing():
            return self
        folded = (_folded(rule, part, weight) for rule, part in zip(self.rules, self.parts, strict=True))
        return Prepared(tuple(folded), self.parts, self.n, self.layout)

    def read(self, op: Any, weight: Tensor, dropout: float) -> Tensor:
        return self.prepared(weight).read(op, weight, dropout)

    def flipped(self) -> Routed:
        """The rule of the transposed weight."""
        return replace(self, rules=tuple(rule.flipped() for rule in self.rules))  # type: ignore[attr-defined]

    def rows(self, start: int, length: int) -> Routed:
        """The rule of the output units from `start` on."""
        return replace(self, rules=tuple(rule.rows(start, length) for rule in self.rules))  # type: ignore[attr-defined]


@pytree_node
@dataclass(frozen=True, eq=False)
class Folded(Rule):
    """gain ∘ W + B·A for m members, the scaling and the gain multiplied into B.

    Attributes:
        a: `[m, *]`.
        b: `[m, *]`.
        gain: `[m, out]`, or None for members without.
        dropout: on the input of `a`.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None
    dropout: float

    leaves: ClassVar[tuple[str, ...]] = ("a", "b", "gain")

    @property
    def dropout_p(self) -> float:
        return self.dropout

    def dense(self, weight: Tensor) -> Tensor:
        raise AssertionError

    def check(self, name: str, weight: Tensor) -> None:
        raise AssertionError


def _folded(rule: Rule, part: Part, weight: Tensor) -> Folded:
    assert isinstance(rule, LowRank)
    gain, scale = None, part.scalings.to(rule.b.dtype)
    scale = scale.reshape(-1, *[1] * (rule.b.dim() - 1))
    if isinstance(rule, DoRA):
        by_member = torch.func.vmap(lambda rule, s: replace(rule, scaling=s).prepared(weight).gain, chunk_size=CHUNK)
        gain = by_member(rule, part.scalings)
        scale = scale * gain.reshape(*gain.shape, *[1] * (rule.b.dim() - 2))
    # B is kept in the order in which it is multiplied from the right.
    b = (rule.b.mT * scale.mT).to(rule.b.dtype).contiguous().mT if scale.dim() == 3 else rule.b * scale
    return Folded(rule.a, b.to(rule.b.dtype), gain, rule.dropout)


@pytree_node
@dataclass(frozen=True, eq=False)
class Prepared(Rule):
    """A `Routed` rule whose norms are worked out."""

    rules: tuple[Folded, ...]
    parts: Parts
    n: int
    layout: Layout | None

    leaves: ClassVar[tuple[str, ...]] = ("rules",)
    dense = Routed.dense
    check = Routed.check

    @property
    def dropout_p(self) -> float:
        return max(rule.dropout_p for rule in self.rules)

    def read(self, op: Any, weight: Tensor, dropout: float) -> Tensor:
        x, place = rows_of(op.x)
        if self.n == 1:
            place = _ALONE
        if not isinstance(place, Place):
            raise lost(place, "a weight with an adapter for each row is read")
        if isinstance(op, LeftMatmulMap) and place.dim >= x.dim() - 2:
            raise lost("matmul", "a weight with an adapter for each row is multiplied by columns of rows")
        if self.n > 1 and not _keeps(op, x, place):
            raise lost(type(op).__name__.removesuffix("Map"), "a weight that differs by row is read along rows")
        rows, op, track = rows_first(x, place, self.n), op.on(x), op.x
        gain = self._gain()
        if op.backwards and gain is not None:
            scaled = rows * _spread(gain, rows, op.per_output(gain[0]).shape)
            op = op.on(rows_back(scaled.to(x.dtype), place))
        y = op.dense(weight, bias=gain is None)
        dtype, out = y.dtype, rows_first(y, place, self.n)
        if gain is not None and not op.backwards:
            out = out * _spread(gain, out, op.per_output(gain[0]).shape)
        for rule, part in zip(self.rules, self.parts, strict=True):
            out = _with(rule, part, op, rows, out, dropout)
        if gain is not None and op.bias is not None:
            bias = op.per_output(op.bias)
            out = out + bias.reshape(*[1] * (out.dim() - bias.dim()), *bias.shape)
        out = rows_back(out.to(dtype), place)
        return out if self.n == 1 else track.scope.enter(out, place)

    def _gain(self) -> Tensor | None:
        """What each row multiplies the base weight's output units by, `[n, out]`; None if no row does."""
        gain: Tensor | None = None
        for rule, part in zip(self.rules, self.parts, strict=True):
            own = rule.gain
            if own is None:
                continue
            if gain is None:
                gain = own.new_ones(self.n, own.shape[-1])
            if part.present is not None:
                gain = torch.where(part.present.unsqueeze(-1), own, gain)
            elif part.rows is not None:
                gain = part.rows.put(gain, own.unsqueeze(1).expand(-1, part.rows.count, -1))
            else:
                gain = gain + part.weights.to(own.dtype) @ (own - 1)  # type: ignore[union-attr]
        return gain


def _keeps(op: Any, x: Tensor, place: Place) -> bool:
    """Whether an operation on a weight leaves rows that lie there alone."""
    if isinstance(op, ConvMap):
        return place.dim == 0 and x.dim() == op.spatial + 2
    return not isinstance(op, LinearMap) or place.dim < x.dim() - 1


def _with(rule: Folded, part: Part, op: Any, x: Tensor, y: Tensor, dropout: float) -> Tensor:
    """The rows y with what one part adds to them; x is the operation's input by rows."""
    dropout = rule.dropout if dropout else 0.0
    if part.rows is not None:
        inputs = part.rows.gathered(x)
        if dropout and op.drops:
            inputs = dropped(inputs.to(rule.a.dtype), dropout, part.rows.first(), part.rows.n)
        return part.rows.added(y, op.grouped(inputs, rule.a, rule.b, 0.0))
    for a, b, w in zip(rule.a, rule.b, part.weights.unbind(1), strict=True):  # type: ignore[union-attr]
        u = op.grouped(x.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), dropout)[0]
        y = y + u * _spread(w.to(u.dtype), u, ())
    return y


def _spread(v: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A value `[n, *]` for each row, of that shape for one row, to broadcast over rows `[n, *]`."""
    return v.reshape(v.shape[0], *[1] * (like.dim() - 1 - len(shape)), *shape)


def lost(operation: str, doing: str) -> UnsupportedError:
    """The error for rows that cannot be told apart."""
    cause = f"{operation} mixed or reordered the rows before" if operation else "its input does not come from the batch"
    return UnsupportedError(
        f"{doing}, but which row of the batch an input belongs to is not known: {cause}. Use funclora.vmap over the "
        "stack, call the model once for each member, or leave the targets behind that operation out."
    )


def differs_by_row(x: Any) -> bool:
    """True for a lazy weight that is another one for every row."""
    return isinstance(getattr(x, "rule", None), (Routed, Prepared))


def operate_by_row(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that is no linear map, on parameters that differ by row: biases, the scale and shift of norms.

    Returns:
        The result; NotImplemented if the operation has no such form, or is none on such parameters.
    """
    if not any(map(differs_by_row, (*args, *kwargs.values()))):
        return NotImplemented
    if func is torch.addmm and differs_by_row(args[0]) and not kwargs:
        return _fitted(args[1] @ args[2], args[0], False, torch.add)
    if func in _AFFINE:
        given = dict(zip(_AFFINE[func].names, args, strict=False)) | kwargs
        scale, shift = (given.get(name) for name in _AFFINE[func].affine)
        if differs_by_row(scale) or differs_by_row(shift):
            names = _AFFINE[func].affine if differs_by_row(scale) else _AFFINE[func].affine[1:]
            given |= {name: None for name in names if name in given}
            positional = [given.pop(name) for name in _AFFINE[func].names[: len(args)]]
            y = func(*positional, **given)
            if differs_by_row(scale):
                y = _fitted(y, scale, _AFFINE[func].channels_first, torch.mul)
            return y if shift is None else _fitted(y, shift, _AFFINE[func].channels_first, torch.add)
    for x in (*args, *kwargs.values()):
        if differs_by_row(x) and x.rule.layout is None and func in linear_maps:
            return _replaced(func, args, kwargs, x)
    like = next((x for x in args if isinstance(x, RowTensor)), None)
    if like is None or not is_elementwise(func) or (differs_by_row(args[0]) and func.__name__.endswith("_")):
        return NotImplemented
    return func(*(_by_row(x, like, False) if differs_by_row(x) else x for x in args), **kwargs)


def _replaced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], lazy: Any) -> Tensor:
    """An operation linear in a weight that some members replace: their rows are computed apart."""

    def operation(weight: Any, rows: Tensor | None = None) -> Any:
        def given(x: Any) -> Any:
            return weight if x is lazy else x if rows is None else _only(x, rows, rule.n)

        return func(*map(given, args), **{name: given(x) for name, x in kwargs.items()})

    lazy.used("fast")
    rule, base = lazy.rule, lazy.base
    if func is F.embedding and (kwargs.get("max_norm") is not None or args[3:4] not in ((), (None,))):
        base = base.clone()  # torch writes to it
    updating = rule.updating()
    y: Tensor = operation(base if updating is None else lazy.like(base, updating))
    out, place = rows_of(y)
    if rule.n == 1:
        place = _ALONE
    if not isinstance(place, Place):
        raise lost(place, f"{lazy.target!r} differs by row and is read")
    rows = rows_first(out, place, rule.n)
    if any(part.present is not None for _, part in rule.replacing()):
        raise UnsupportedError(
            f"{lazy.target!r} is replaced as a whole by some members. Give route the ids as a list, not as a tensor."
        )
    for full, part in rule.replacing():
        for j in range(len(full.value)):
            value = full.value[j].to(base.dtype, copy=True)  # embeddings with a maximal norm write to it
            if part.rows is None:
                change = operation(value) - operation(base)
                change = rows_first(rows_of(change)[0], place, rule.n)
                rows = rows + change * _spread(part.weights[:, j].to(change.dtype), change, ())
                continue
            chosen = part.rows.of_member(j, out.device)
            rows = rows.index_copy(0, chosen, rows_first(operation(value, chosen), place, len(chosen)))
    out = rows_back(rows, place)
    return y.scope.enter(out, place) if isinstance(y, RowTensor) else out


def _only(x: Any, chosen: Tensor, n: int) -> Any:
    """Some rows of an argument, as a plain tensor."""
    if not isinstance(x, RowTensor):
        return x
    plain, place = rows_of(x)
    if not isinstance(place, Place):
        raise lost(place, "a weight that differs by row is read")
    return rows_back(rows_first(plain, place, n).index_select(0, chosen), place)


class _Affine(NamedTuple):
    names: tuple[str, ...]  # of the arguments, in their order
    affine: tuple[str, str]  # those that scale and shift the result
    channels_first: bool


_AFFINE: dict[Callable[..., Any], _Affine] = {
    F.linear: _Affine(("input", "weight", "bias"), ("", "bias"), False),
    F.layer_norm: _Affine(("input", "normalized_shape", "weight", "bias", "eps"), ("weight", "bias"), False),
    F.rms_norm: _Affine(("input", "normalized_shape", "weight", "eps"), ("weight", ""), False),
    F.group_norm: _Affine(("input", "num_groups", "weight", "bias", "eps"), ("weight", "bias"), True),
    F.batch_norm: _Affine(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
                          ("weight", "bias"), True),
}  # fmt: skip
_conv: Callable[..., Any]
for _conv in (F.conv1d, F.conv2d, F.conv3d):
    _AFFINE[_conv] = _Affine(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), ("", "bias"), True)
for _conv in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    _AFFINE[_conv] = _Affine(
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"), ("", "bias"), True
    )


def _fitted(y: Tensor, value: Any, channels_first: bool, combine: Callable[..., Tensor]) -> Tensor:
    """y scaled or shifted by a parameter, which may differ by row, in y's dtype."""
    if differs_by_row(value):
        value = _by_row(value, y, channels_first)
    elif channels_first:
        value = value.reshape(-1, *[1] * (y.dim() - 2))
    out: Tensor = combine(y, value).to(y.dtype)
    return out


def _by_row(lazy: Any, like: Tensor, channels_first: bool) -> Tensor:
    """The values of a parameter, each in the place of its row, to broadcast over `like`."""
    rule, base = lazy.rule, lazy.base
    if rule.updating() is not None:
        raise UnsupportedError(f"{lazy.target!r} has low-rank updates that differ by row, and is read as a whole.")
    lazy.used("fast")
    values = base.expand(rule.n, *base.shape)
    for full, part in zip(rule.rules, rule.parts, strict=True):
        if part.present is not None:
            present = part.present.reshape(-1, *[1] * base.dim())
            values = torch.where(present, full.value.to(base.dtype), values)
        elif part.rows is not None:
            each = full.value.to(base.dtype).unsqueeze(1)
            values = part.rows.put(values, each.expand(-1, part.rows.count, *base.shape))
        else:
            change = full.value.to(base.dtype) - base
            values = values + (part.weights.to(base.dtype) @ change.flatten(1)).unflatten(1, base.shape)
    shape = [*base.shape, *[1] * (like.dim() - 2)] if channels_first else list(base.shape)
    if rule.n == 1:
        return cast(Tensor, values.reshape(shape))
    _, place = rows_of(like)
    if not isinstance(place, Place) or place.dim >= like.dim() - len(shape):
        raise lost(str(place), f"{lazy.target!r} differs by row and is read")
    if place.inner > 1:
        values = values.repeat_interleave(place.inner, 0)
    before, between = [1] * place.dim, [1] * (like.dim() - len(shape) - place.dim - 1)
    out: Tensor = values.reshape(*before, len(values), *between, *shape)
    return out


def route(
    stack: Stack[dict[str, Rule]],
    ids: Sequence[int] | Tensor | None = None,
    *,
    weights: Tensor | None = None,
    repeats: int = 1,
) -> dict[str, Rule]:
    """An adapter for each row of a batch, as one value for `apply` and `bind`.

    Row i of the batch (the first dimension of the model's inputs) is computed with member `ids[i]`, as if it were
    alone with that adapter. The base weights are used once for all rows. With `weights`, row i uses the base weight
    plus the weighted sum of what the members change in it.

    A list of ids is planned for: rows of one member are computed together. With a tensor of ids every row gets a copy
    of its adapter, and nothing depends on the values of the ids: `route` can be compiled with ids as an input, and
    another choice of adapters makes no new graph (out-of-range ids are then not noticed).

    Which row a tensor's part belongs to is followed through the model. Where a model mixes or regroups rows before
    a target (experts, batch statistics), the call raises `UnsupportedError`.

    Args:
        stack: the adapters, `stack([...])`.
        ids: `[n_rows]`, the member of each row; -1 for the base model.
        weights: `[n_rows, n_members]`, instead of ids. Gradients reach them.
        repeats: the model may also be given each row this many times in succession, as transformers' `generate` does
            with `num_beams` and `num_return_sequences`: pass their product.

    Returns:
        Adapters for a batch of that many rows.

    Raises:
        ConfigError: an id is out of range, or shapes do not fit the stack.

    Examples:
        >>> import funclora as fl
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> params = {"weight": torch.zeros(1, 2)}
        >>> members = fl.stack([{"weight": fl.LoRA(torch.ones(1, 2), torch.full((1, 1), k))} for k in (1.0, 2.0)])
        >>> fl.apply(model, params, route(members, [1, -1, 0]), torch.ones(3, 2)).flatten().tolist()
        [4.0, 0.0, 2.0]
    """
    if not isinstance(stack, Stack):
        raise ConfigError(
            f"route: expected a stack of adapters, got a {type(stack).__name__}; make one by stack([...])."
        )
    if (ids is None) == (weights is None):
        raise ConfigError("route: expected either ids or weights.")
    if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
        raise ConfigError(f"route: repeats: expected a positive integer, got {repeats!r}.")
    if weights is not None:
        return _weighted(stack, weights, repeats)
    members = [] if torch.compiler.is_compiling() and isinstance(ids, Tensor) else _checked(ids, len(stack))
    if isinstance(ids, Tensor):
        return _copied(stack, ids, repeats)
    if len(members) == 1:  # one row needs no telling apart
        return {} if members[0] < 0 else dict(stack[members[0]])
    found: dict[str, list[tuple[Rule, list[float], list[list[int]]]]] = {}
    for cohort in stack.cohorts:
        place = {member: k for k, member in enumerate(cohort.members)}
        rows: dict[int, list[int]] = {}
        for row, member in enumerate(members):
            if member in place:
                rows.setdefault(place[member], []).append(row)
        for ks in _alike([(k, len(rows[k])) for k in sorted(rows, key=lambda k: rows[k])]):
            for name, rule in _members(cohort, ks).items():
                scalings = cohort.scalings().get(name) or [1.0] * len(cohort.members)
                found.setdefault(name, []).append((rule, [scalings[k] for k in ks], [rows[k] for k in ks]))
    known: dict[Any, Any] = {}
    return {name: _routed(_merged(parts), len(members), repeats, known) for name, parts in found.items()}


def _copied(stack: Stack[dict[str, Rule]], ids: Tensor, repeats: int) -> dict[str, Rule]:
    """A copy of its adapter for every row."""
    n = ids.shape[0]
    rows = Rows(n, 1, None, None)
    found: dict[str, list[tuple[Rule, Part]]] = {}
    for cohort in stack.cohorts:
        device = cohort.values[0].device
        place = torch.full((len(stack) + 1,), len(cohort.members), device=device)  # the last entry is that of -1
        place[torch.tensor(cohort.members, device=device)] = torch.arange(len(cohort.members), device=device)
        index = place[ids.to(device)]
        present = index < len(cohort.members)
        values = tuple(torch.cat([x, torch.zeros_like(x[:1])])[index] for x in cohort.values)
        tree = replace(cohort, values=values).tree()
        for name, rule in tree.items():
            leaf = getattr(rule, rule.leaves[0])
            scalings = _numbers([*(cohort.scalings().get(name) or [1.0] * len(cohort.members)), 1.0], leaf)[index]
            found.setdefault(name, []).append((rule, Part(scalings, rows, None, present)))
    return {
        name: Routed(tuple(rule for rule, _ in some), Parts(part for _, part in some), n, repeats)
        for name, some in found.items()
    }


def _checked(ids: Any, n_members: int) -> list[int]:
    members = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if not members or not all(isinstance(i, int) and not isinstance(i, bool) for i in members):
        raise ConfigError(f"route: ids: expected one int for each row, got {members!r:.200}.")
    for row, member in enumerate(members):
        if not -1 <= member < n_members:
            raise ConfigError(
                f"route: ids[{row}] is {member}; the stack has {n_members} members (0 to {n_members - 1}), and -1 is "
                "the base model."
            )
    return members


def _alike(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Keys in groups whose sizes differ by no more than the factor `PADDED`."""
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


def _members(cohort: Cohort[dict[str, Rule]], ks: list[int]) -> dict[str, Rule]:
    """Some members of a cohort as one tree."""
    if ks == list(range(len(cohort.members))):
        return cohort.tree()
    index = torch.tensor(ks)
    values = tuple(value.index_select(0, index.to(value.device)) for value in cohort.values)
    return replace(cohort, values=values).tree()


Found = tuple[Rule, list[float], list[list[int]]]


def _merged(parts: list[Found]) -> list[Found]:
    """Parts that differ in rank and in the number of rows by no more than the factor `PADDED`, as one."""
    kinds: dict[Any, list[Found]] = {}
    for part in parts:
        rule = part[0]
        key: Any = (type(rule), getattr(rule, rule.leaves[0]).dtype, getattr(rule, rule.leaves[0]).device)
        if isinstance(rule, LowRank):
            key = (*key, rule.layout, rule.dropout, getattr(rule, "exact_norm_grad", None))
        kinds.setdefault(key, []).append(part)
    merged: list[Found] = []
    for alike in kinds.values():
        if len(alike) == 1 or not isinstance(alike[0][0], LowRank):
            merged += alike
            continue
        for by_count in _alike([(i, max(map(len, rows))) for i, (_, _, rows) in enumerate(alike)]):
            for by_rank in _alike([(i, alike[i][0].a.shape[1]) for i in by_count]):  # type: ignore[attr-defined]
                merged.append(_joined([alike[i] for i in by_rank]))
    return merged


def _joined(parts: list[Found]) -> Found:
    if len(parts) == 1:
        return parts[0]
    rules: list[Any] = [rule for rule, _, _ in parts]
    rank = max(rule.a.shape[1] for rule in rules)
    leaves = {}
    for leaf in rules[0].leaves:
        dim = {"a": 1, "b": 2}.get(leaf)
        leaves[leaf] = torch.cat([_padded(getattr(rule, leaf), dim, rank) for rule in rules])
    scalings = [s for _, some, _ in parts for s in some]
    rows = [each for _, _, some in parts for each in some]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    if order != list(range(len(rows))):
        index = torch.tensor(order, device=leaves["a"].device)
        leaves = {leaf: value.index_select(0, index) for leaf, value in leaves.items()}
    return replace(rules[0], **leaves), [scalings[i] for i in order], [rows[i] for i in order]


def _padded(value: Tensor, dim: int | None, size: int) -> Tensor:
    """Zeros after the end of a dimension, up to that size: as rank, they add nothing and stay as they are."""
    if dim is None or value.shape[dim] == size:
        return value
    return F.pad(value, (0, 0) * (value.dim() - 1 - dim) + (0, size - value.shape[dim]))


def _routed(parts: list[Found], n: int, repeats: int, known: dict[Any, Any]) -> Routed:
    """The parts of one weight as a rule; `known` holds what other weights have worked out."""
    described = []
    for rule, scalings, rows in parts:
        leaf = getattr(rule, rule.leaves[0])
        key = tuple(map(tuple, rows)), leaf.device
        if key not in known:
            known[key] = Rows.of(rows, n, leaf.device)
        described.append(Part(_numbers(scalings, leaf), known[key]))
    return Routed(tuple(rule for rule, _, _ in parts), Parts(described), n, repeats)


def _numbers(scalings: list[float], leaf: Tensor) -> Tensor:
    return torch.tensor(scalings, dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)


def _weighted(stack: Stack[dict[str, Rule]], weights: Tensor, repeats: int) -> dict[str, Rule]:
    if not isinstance(weights, Tensor) or weights.dim() != 2 or weights.shape[1] != len(stack):
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ConfigError(f"route: weights: expected a tensor [n_rows, {len(stack)}], one column a member, got {got}.")
    found: dict[str, list[tuple[Rule, Part]]] = {}
    for cohort in stack.cohorts:
        some = weights[:, torch.tensor(cohort.members, device=weights.device)]
        for name, rule in cohort.tree().items():
            scalings = cohort.scalings().get(name) or [1.0] * len(cohort.members)
            part = Part(_numbers(scalings, getattr(rule, rule.leaves[0])), None, some)
            found.setdefault(name, []).append((rule, part))
    return {
        name: Routed(tuple(rule for rule, _ in some), Parts(part for _, part in some), len(weights), repeats)
        for name, some in found.items()
    }

"""One model called by every member of a population: under `torch.func.vmap` the calls become one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora._bind.apply import bind, called
from funclora._many.route import checked_rows_of, in_groups, route
from funclora._many.stack import Stack
from funclora._torch.levels import outside_of_vmap
from funclora._tracking.batch import Members
from funclora._tracking.entry import Part
from funclora.errors import ConfigError, UnsupportedError
from funclora.rules.base import Params, Rule

Population = Stack[dict[str, Rule]]
"""A stack of adapters."""


class BatchedModel:
    """The model for all members, bound once. Its inputs hold the members' parts one after the other.

    Attributes:
        n: the number of members.
        owners: the member of each owner of positions, here in the order of their parts: members that are computed
            together are adjacent.
    """

    def __init__(
        self, model: nn.Module, params: Params, members: Population, rows_of: Mapping[str, None] | None = None
    ) -> None:
        self.model = model
        self.n = len(members)
        self.rows_of = checked_rows_of(rows_of)
        if any(rows is not None for rows in self.rows_of.values()):
            raise ConfigError(
                "population_step: rows_of: expected None for each name: members have parts of all inputs."
            )
        self.owners: Sequence[int] = ()
        self.bound: Any = bind(model, params, self.routed(members))

    def routed(self, members: Population) -> dict[str, Rule]:
        self.owners = in_groups(members)
        return route(members, self.owners)

    def run(self, call: _Call, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> Outputs:
        """The outputs of one call, for inputs that hold the members along `dims`."""
        counts = {x.movedim(d, 0).shape[1] for x, d in zip(tensors, dims, strict=True) if d is not None and x.dim() > 1}
        if not counts:
            counts = {x.shape[0] for x in tensors if x.dim()}
            if len(counts) > 1:
                raise ConfigError(
                    f"the loss calls the model on tensors with first dimensions of the sizes {sorted(counts)}, which "
                    "all members share: nobody can tell which of them hold examples. Give each member its own: tensors "
                    "`[n_members, n_rows, *]`."
                )
        if 0 in counts or not counts:
            raise ConfigError("the loss calls the model on no examples: every tensor is empty, or there is none.")
        tables: list[Tensor] = []
        inputs = [self._as_parts(x, d, counts, tables) for x, d in zip(tensors, dims, strict=True)]
        back = sorted(range(self.n), key=self.owners.__getitem__)
        outs = call.on(self.bound, inputs, Members(self.n, rows_of=self.rows_of, tables=tables))
        return [
            (_taken(part.value.unflatten(part.dim, (self.n, -1)), back, part.dim), part.dim)
            if isinstance(part, Part)
            else (part.unsqueeze(0), 0)  # of the only member
            for part in outs
        ]

    def _as_parts(self, x: Tensor, dim: int | None, counts: set[int], tables: list[Tensor]) -> Tensor:
        """An input with the members' parts along its first dimension, in order; noted if it is none."""
        if dim is not None:
            if x.dim() < 2:
                raise ConfigError(
                    "the loss calls the model on a tensor without dimensions. The first dimension must count examples."
                )
            return _taken(x.movedim(dim, 0), self.owners, 0).flatten(0, 1)
        if x.dim() and x.shape[0] in counts:
            return x.expand(self.n, *x.shape).flatten(0, 1)
        tables.append(x)
        return x


class MixedModel(BatchedModel):
    """The model for a batch whose rows or tokens belong to members; every member gets the outputs of all of them."""

    def __init__(
        self, model: nn.Module, params: Params, members: Population, rows_of: Mapping[str, None] | None, ids: Any
    ) -> None:
        compiling = torch.compiler.is_compiling()
        self.ids = ids.tolist() if isinstance(ids, Tensor) and not compiling else ids
        super().__init__(model, params, members, rows_of)

    def routed(self, members: Population) -> dict[str, Rule]:
        routed = route(members, self.ids, rows_of=self.rows_of)
        if not isinstance(self.ids, Tensor):
            by_token = isinstance(self.ids[0], (list, tuple))
            self.owners = sorted({member for row in self.ids for member in row}) if by_token else self.ids
        return routed

    def mine(self) -> Tensor:
        """For each member, which rows or tokens are its own."""
        ids = torch.as_tensor(self.ids)
        return ids == torch.arange(self.n, device=ids.device).view(-1, *[1] * ids.dim())

    def run(self, call: _Call, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> Outputs:
        if any(dim is not None for dim in dims):
            raise ConfigError(
                "with ids, the loss calls the model on tensors that differ by member. Pass it the tensors of the "
                "batch, and use `mine` for its outputs."
            )
        return [(x, None) for x in call.on(self.bound, tensors, None)]


class AloneModel(BatchedModel):
    """The model for a single member, whose rows the model may mix."""

    def routed(self, members: Population) -> dict[str, Rule]:
        self.owners = [0]
        return members[0]


# The tensors that a call gives to the members, and the dimension that counts them; None if all members share it.
Outputs = list[tuple[Tensor, "int | None"]]


class MemberModel:
    """The bound model that the loss of one member gets, under vmap."""

    def __init__(self, rows: BatchedModel, member: Tensor, path: str = "") -> None:
        self._rows = rows
        self._member = member
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs: Any = (args, kwargs)
        leaves, spec = pytree.tree_flatten(inputs)
        call = _Call(self._rows, self._path, leaves, spec)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if torch.compiler.is_compiling():
            return call.joined(outside_of_vmap(call.run, self._rows.n, tensors))
        return call.joined(_BatchMembers.apply(call, self._member, *tensors))  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}.{name}" if self._path else name
        value = _get(self._rows.model, path)
        if isinstance(value, Tensor):
            raise UnsupportedError(f"bound.{path}: a parameter differs by member here. Compute with it in the model.")
        return MemberModel(self._rows, self._member, path) if callable(value) else value


def _get(model: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        model = getattr(model, name)
    return model


class _Call:
    """One call of the model, with those of its inputs and outputs that are not tensors."""

    def __init__(self, rows: BatchedModel, path: str, leaves: list[Any], spec: Any) -> None:
        self.rows = rows
        self.path = path
        self.leaves = leaves
        self.spec = spec

    def run(self, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> Outputs:
        """The outputs of the call, for inputs that hold the members along `dims`."""
        return self.rows.run(self, tensors, dims)

    def on(self, bound: Any, tensors: Sequence[Tensor], batch: Members | None) -> list[Any]:
        """The outputs of the bound model on these inputs that are tensors, or a `Part` of one."""
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(x, Tensor) else x for x in self.leaves], self.spec
        )
        out = called(bound, self.path, args, kwargs, batch)
        self.out_leaves, self.out_spec = pytree.tree_flatten(out, is_leaf=_is_part)
        return [x for x in self.out_leaves if _is_part(x) or isinstance(x, Tensor)]

    def joined(self, outs: Sequence[Tensor]) -> Any:
        found = iter(outs)
        leaves = [next(found) if _is_part(x) or isinstance(x, Tensor) else x for x in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)


def _is_part(x: Any) -> bool:
    return isinstance(x, Part)


def _taken(x: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """The members of a tensor, which are along a dimension, in the given order."""
    return x if list(order) == sorted(order) else x.index_select(dim, torch.tensor(list(order), device=x.device))


class _BatchMembers(torch.autograd.Function):
    """A call of the model. Under `vmap`, the inputs of all members become one batch."""

    @staticmethod
    def forward(call: _Call, member: Tensor, *tensors: Tensor) -> Any:
        raise AssertionError("called outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, member: Tensor, *tensors: Tensor) -> Any:
        outs = call.run(tensors, in_dims[2:])
        return tuple(x for x, _ in outs), tuple(dim for _, dim in outs)

"""One model called by every member of a population: under `torch.func.vmap` the calls become one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from funclora._bind.apply import bind
from funclora._many.route import in_groups, route
from funclora._many.stack import Stack
from funclora._tracking.entry import argument_names
from funclora.errors import ConfigError, UnsupportedError
from funclora.rules.base import Params, Rule

Population = Stack[dict[str, Rule]]
"""A stack of adapters."""


class BatchedModel:
    """The model for all members, bound once for each number of rows per member.

    Attributes:
        order: the members in the order of their rows: members that are computed together are adjacent.
        back: the position of each member in `order`.
    """

    def __init__(self, model: nn.Module, params: Params, members: Population) -> None:
        self.model = model
        self.params = params
        self.members = members
        self.bound: dict[int, nn.Module] = {}
        self.order = in_groups(members)
        self.back = sorted(range(len(members)), key=self.order.__getitem__)

    def of(self, count: int) -> nn.Module:
        if count not in self.bound:
            ids = [i for i in self.order for _ in range(count)]
            self.bound[count] = bind(self.model, self.params, route(self.members, ids))
        return self.bound[count]


class PackedModel(BatchedModel):
    """The model for a batch whose tokens belong to members, bound once; every member gets the outputs of all tokens."""

    def __init__(self, model: nn.Module, params: Params, members: Population, ids: Any) -> None:
        super().__init__(model, params, members)
        self.bound[0] = bind(model, params, route(members, ids))

    def of(self, count: int) -> nn.Module:
        return self.bound[0]


class AloneModel(BatchedModel):
    """The model for a single member, whose rows the model may mix."""

    def of(self, count: int) -> nn.Module:
        if not self.bound:
            self.bound[0] = bind(self.model, self.params, self.members[0])
        return self.bound[0]


class MemberModel:
    """The bound model that the loss of one member gets, under vmap."""

    def __init__(self, rows: BatchedModel, member: Tensor, path: str = "") -> None:
        self._rows = rows
        self._member = member
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs: Any = (args, kwargs)
        leaves, spec = optree.tree_flatten(inputs, none_is_leaf=True)
        call = _Call(self._rows, self._path, leaves, spec)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        outs = _BatchMembers.apply(call, self._member, *tensors)  # type: ignore[no-untyped-call]
        return call.joined(outs)

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

    def run(self, n: int, tensors: list[Tensor], dims: Sequence[int | None]) -> tuple[Tensor, ...]:
        """The outputs that are tensors, `[n_members, n_rows, *]`, for inputs with members along `dims`."""
        counts = {x.movedim(d, 0).shape[1] for x, d in zip(tensors, dims, strict=True) if d is not None and x.dim() > 1}
        if not counts:
            counts = {x.shape[0] for x in tensors if x.dim()}
        if len(counts) != 1:
            raise ConfigError(
                f"the loss calls the model on tensors with first dimensions of the sizes {sorted(counts)}. The first "
                "dimension of each tensor must count the member's examples."
            )
        (count,) = counts
        if isinstance(self.rows, PackedModel):
            if any(dim is not None for dim in dims):
                raise ConfigError(
                    "with ids, the loss calls the model on tensors that differ by member. Pass it the tensors of the "
                    "batch, and use `mine` for its outputs."
                )
            return self._outputs(count, tensors, alone=False)
        rows = [self._as_rows(x, d, n, count, self.rows.order) for x, d in zip(tensors, dims, strict=True)]
        outs = self._outputs(count, rows, alone=True)
        for x in outs:
            if not x.dim() or x.shape[0] != n * count:
                raise UnsupportedError(
                    f"the model returns a tensor of shape {list(x.shape)} for {n} members with {count} examples each: "
                    "it mixes the members' results. Compute the loss outside of the model, from outputs whose first "
                    "dimension counts examples."
                )
        return tuple(_taken(x.unflatten(0, (n, count)), self.rows.back) for x in outs)

    def _outputs(self, count: int, tensors: list[Tensor], *, alone: bool) -> tuple[Tensor, ...]:
        """The outputs of the bound model that are tensors, for these inputs."""
        given = iter(tensors)
        args, kwargs = self.spec.unflatten([next(given) if isinstance(x, Tensor) else x for x in self.leaves])
        bound = self.rows.of(count)
        function = _get(bound, self.path)
        entrance = getattr(bound.__dict__.get("forward"), "entrance", None)  # None if there is only one row
        if entrance is None:
            out = function(*args, **kwargs)
        else:
            out = entrance.call(function, args, kwargs, names=argument_names(function), alone=alone)
        self.out_leaves, self.out_spec = pytree.tree_flatten(out)
        return tuple(x for x in self.out_leaves if isinstance(x, Tensor))

    @staticmethod
    def _as_rows(x: Tensor, dim: int | None, n: int, count: int, order: list[int]) -> Tensor:
        if dim is not None:
            if x.dim() < 2:
                raise ConfigError(
                    "the loss calls the model on a tensor without dimensions. The first dimension must count examples."
                )
            return _taken(x.movedim(dim, 0), order).flatten(0, 1)
        if x.dim() and x.shape[0] == count:
            return x.expand(n, *x.shape).flatten(0, 1)
        return x

    def joined(self, outs: tuple[Tensor, ...]) -> Any:
        found = iter(outs)
        leaves = [next(found) if isinstance(x, Tensor) else x for x in self.out_leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)


def _taken(x: Tensor, order: list[int]) -> Tensor:
    """The members of x `[n_members, *]` in the given order."""
    return x if order == sorted(order) else x.index_select(0, torch.tensor(order, device=x.device))


class _BatchMembers(torch.autograd.Function):
    """A call of the model. Under `vmap`, the inputs of all members become the rows of one batch."""

    @staticmethod
    def forward(call: _Call, member: Tensor, *tensors: Tensor) -> Any:
        raise AssertionError("called outside of vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, member: Tensor, *tensors: Tensor) -> Any:
        outs = call.run(info.batch_size, list(tensors), in_dims[2:])
        return outs, (None if isinstance(call.rows, PackedModel) else 0,) * len(outs)

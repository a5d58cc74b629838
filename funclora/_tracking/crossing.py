"""Rows through a module whose weights are divided over a mesh.

Such a module turns its input into a tensor of the mesh, on which no owners can be tracked. They wait outside, and meet
the tensors again at the weight and after the module.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from funclora._torch.functions import is_sharded
from funclora._torch.mesh import waited
from funclora._tracking.calls import Owner
from funclora._tracking.owners import Owners
from funclora._tracking.tensor import ForwardCall, RowTensor, rows_of


class _Waiting(NamedTuple):
    """The owners of the input of a module, and the dimensions that they are along."""

    scope: ForwardCall
    place: Owner | str
    shape: tuple[int, ...]


_waiting: ContextVar[_Waiting | None] = ContextVar("funclora.waiting", default=None)


def let_cross(module: nn.Module) -> None:
    """Let rows cross a module of a bound model, if weights of it are divided."""
    if any(is_sharded(getattr(weight, "base", weight)) for weight in module._parameters.values() if weight is not None):
        module.register_forward_pre_hook(_leave, prepend=True, with_kwargs=True)
        module.register_forward_hook(_enter)


def _leave(module: nn.Module, args: Any, kwargs: Any) -> Any:
    rows = [x for x in tree_leaves((args, kwargs)) if isinstance(x, RowTensor)]
    _waiting.set(_Waiting(rows[0].scope, rows_of(rows[0])[1], tuple(rows[0].shape)) if len(rows) == 1 else None)
    return tree_map(lambda x: rows_of(x)[0] if isinstance(x, RowTensor) else x, (args, kwargs))


def _enter(module: nn.Module, args: Any, out: Any) -> Any:
    waiting = _waiting.get()
    _waiting.set(None)
    return out if waiting is None or not isinstance(out, Tensor) else _with_owners(waited(out), waiting)


def entered_again(x: Tensor) -> Tensor:
    """The input of an operation in a module that rows cross, with the owners of the module's input."""
    waiting = _waiting.get()
    return x if waiting is None else _with_owners(x, waiting)


def _with_owners(x: Tensor, waiting: _Waiting) -> Tensor:
    """A tensor whose positions are those of the module's input, but for features: their number, or a new dimension."""
    scope, place, shape = waiting
    if tuple(x.shape[:-1]) not in (shape, shape[:-1]) and tuple(x.shape) != shape:
        return scope.enter(x, "a module with a divided weight")
    return scope.enter(x, place.with_dims(x.dim()) if isinstance(place, Owners) else place)

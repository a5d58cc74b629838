"""A structural copy of a module tree: new module objects over given tensors, sharing everything immutable.

`torch.func.functional_call` swaps the tensors of the live modules for the length of a call: another thread, a
recomputation in backward or an exception in between sees the wrong weights. A copy of the module objects (not of
their parameters) has none of that: it belongs to one caller, and whatever runs later (activation checkpointing,
hooks, generators) still finds the weights that it was made with.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from funclora.errors import UnsupportedError

M = TypeVar("M", bound=nn.Module)

# Attributes of nn.Module that are rebuilt or hold nothing that belongs to the tree.
_REGISTRIES = frozenset(("_parameters", "_buffers", "_modules"))
_ATOMIC = frozenset((
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.Generator,
    types.BuiltinFunctionType, types.ModuleType,
))  # fmt: skip
_MUTABLE = frozenset((list, set, dict, OrderedDict, defaultdict, deque))
_EMPTY = frozenset((list, set, dict, OrderedDict))  # made anew without arguments, faster than copied
# How far to follow plain objects that are no modules (configurations, helpers) in search of modules.
_OBJECT_DEPTH = 2


def clone_module(model: M, tensor: Callable[[str, Tensor, nn.Module, bool], Tensor]) -> M:
    """A copy of the module tree whose parameters and buffers come from `tensor`.

    Plain attributes that refer to modules or parameters of the tree (lists of layers, bound methods, partials,
    closures, `nn.LSTM`'s flat weights) refer to the copies in the copy. Containers and unregistered tensors that
    belong to a module are copied, so that a forward pass can write to them without touching the original.

    A parameter that is registered under two names gets the tensor of each name; a module that is registered under
    two names becomes two modules, since their weights may now differ. Tied buffers stay tied.

    Args:
        model: the tree to copy. It is only read.
        tensor: `(name, original, owner, is_buffer) -> tensor`, called once for each registered name; owner is the
            new module.

    Returns:
        A module of the same class.
    """
    return _Cloner(tensor).clone(model)


class _Cloner:
    def __init__(self, tensor: Callable[[str, Tensor, nn.Module, bool], Tensor]) -> None:
        self.tensor = tensor
        self.made: list[tuple[nn.Module, dict[int, Any]]] = []  # new module, its own tensors by id of the original
        self.memo: dict[int, Any] = {}  # id of an original -> its replacement
        self.keep: list[Any] = []  # originals, so that no id in the memo is reused

    def clone(self, model: M) -> M:
        new = self._module(model, "")
        for module, own in self.made:  # grows while modules that are not registered anywhere turn up
            self._rewire(module, own)
        return new

    def _module(self, module: M, prefix: str | None) -> M:
        """Copy a module and its registered children; `prefix` is None for a module outside of the tree."""
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(
                f"{prefix or 'the model'!r} is a ScriptModule, whose weights cannot be bound without changing it. "
                "Pass the Python module that it was scripted from."
            )
        new = object.__new__(type(module))
        new.__dict__.update(module.__dict__)
        self.memo.setdefault(id(module), new)
        own: dict[int, Any] = {}
        for registry, is_buffer in (("_parameters", False), ("_buffers", True)):
            copies: dict[str, Tensor | None] = {}
            for name, value in module.__dict__[registry].items():
                copies[name] = value
                if value is not None:
                    copies[name] = own[id(value)] = self._tensor(prefix, name, value, new, is_buffer)
                    self.memo.setdefault(id(value), copies[name])
            new.__dict__[registry] = copies
        self.made.append((new, own))
        new.__dict__["_modules"] = {
            name: None if child is None else self._module(child, None if prefix is None else f"{prefix}{name}.")
            for name, child in module.__dict__["_modules"].items()
        }
        return new

    def _tensor(self, prefix: str | None, name: str, value: Tensor, owner: nn.Module, is_buffer: bool) -> Tensor:
        if is_buffer and id(value) in self.memo:
            tied: Tensor = self.memo[id(value)]
            return tied
        if prefix is None:
            return value.clone() if is_buffer else value
        return self.tensor(prefix + name, value, owner, is_buffer)

    def _rewire(self, module: nn.Module, own: dict[int, Any]) -> None:
        """Make the plain attributes of a new module refer to the new modules and tensors."""
        attributes = module.__dict__
        for name, value in attributes.items():
            kind = type(value)
            if kind in _ATOMIC or name in _REGISTRIES:
                continue
            if not value and kind in _EMPTY:  # most of all: the hooks of nn.Module
                attributes[name] = kind()
                continue
            new = self._replaced(value, own, _OBJECT_DEPTH)
            if new is value:
                if isinstance(value, Tensor):
                    new = self.memo[id(value)] = value if value.requires_grad else value.clone()
                    self.keep.append(value)
                elif kind in _MUTABLE:
                    new = value.copy()
            attributes[name] = new

    def _replaced(self, value: Any, own: dict[int, Any], depth: int) -> Any:
        """The value with every module and tensor of the tree replaced; the value itself if there is none."""
        if type(value) in _ATOMIC:
            return value
        if id(value) in own:
            return own[id(value)]
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            return value
        if isinstance(value, nn.Module):
            return self._module(value, None)
        if isinstance(value, dict):
            return self._copied(value, list(value.values()), own, depth, lambda new: _like_dict(value, new))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._copied(value, list(value), own, depth, lambda new: type(value)(*new))
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return self._copied(value, list(value), own, depth, type(value))
        if isinstance(value, types.MethodType):
            parts = [value.__self__]
            return self._copied(value, parts, own, depth, lambda new: types.MethodType(value.__func__, new[0]))
        if isinstance(value, functools.partial):
            n = len(value.args)
            parts = [value.func, *value.args, *value.keywords.values()]
            return self._copied(value, parts, own, depth, lambda new: functools.partial(
                new[0], *new[1 : n + 1], **dict(zip(value.keywords, new[n + 1 :], strict=True))))  # fmt: skip
        if isinstance(value, types.FunctionType):
            return self._function(value, own, depth)
        if depth > 0 and hasattr(value, "__dict__") and not isinstance(value, (weakref.ref, type)):
            return self._object(value, own, depth - 1)
        return value

    def _copied(
        self, value: Any, parts: list[Any], own: dict[int, Any], depth: int, build: Callable[[list[Any]], Any]
    ) -> Any:
        """`build` over the replaced parts, or the value itself if no part changed."""
        self.memo[id(value)] = value  # ends cycles
        self.keep.append(value)
        new = [self._replaced(part, own, depth) for part in parts]
        changed = any(n is not p for n, p in zip(new, parts, strict=True))
        if not changed:
            return value
        # Not remembered: what a container holds may depend on the module that asks (`own`).
        del self.memo[id(value)]
        return build(new)

    def _function(self, value: types.FunctionType, own: dict[int, Any], depth: int) -> Any:
        cells = value.__closure__ or ()
        try:
            contents = [cell.cell_contents for cell in cells]
        except ValueError:  # an empty cell: the function is still being defined
            return value

        def build(new: list[Any]) -> types.FunctionType:
            closure = tuple(types.CellType(content) for content in new)
            copy = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
            copy.__kwdefaults__ = value.__kwdefaults__
            copy.__dict__.update(value.__dict__)
            return copy

        return self._copied(value, contents, own, depth, build) if contents else value

    def _object(self, value: Any, own: dict[int, Any], depth: int) -> Any:
        def build(new: list[Any]) -> Any:
            copy = object.__new__(type(value))
            copy.__dict__.update(zip(value.__dict__, new, strict=True))
            return copy

        return self._copied(value, list(value.__dict__.values()), own, depth, build)


def _like_dict(value: dict[Any, Any], new: list[Any]) -> dict[Any, Any]:
    """A dict of the same class and keys with new values."""
    copy = value.copy()
    for key, item in zip(value, new, strict=True):
        copy[key] = item
    return copy

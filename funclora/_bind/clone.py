"""A structural copy of a module tree: new module objects over given tensors, sharing everything immutable.

`torch.func.functional_call` swaps the tensors of the live modules during a call: another thread, a recomputation in
backward or an exception in between sees the wrong weights. A copy of the module objects (not of their parameters)
avoids this: it belongs to one caller, and code that runs later (activation checkpointing, hooks, generators) still
finds the weights with which the copy was made.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from funclora._bind.checks import refuse_unbindable
from funclora._bind.state import attributes_of, copied_leaf, copied_object, is_one_way, set_attribute
from funclora.errors import UnsupportedError

M = TypeVar("M", bound=nn.Module)
Replacements = dict[int, Any]  # id of an original -> its replacement

# The attributes that nn.Module itself sets, before all others: registries, which are rebuilt, and containers of hooks,
# which are usually empty.
_OWN = tuple(nn.Module().__dict__)
_REGISTRIES = frozenset(("_parameters", "_buffers", "_modules"))
_HOOKS = {
    name: type(value)
    for name, value in nn.Module().__dict__.items()
    if isinstance(value, (dict, set)) and name not in _REGISTRIES
}
_hooks = operator.itemgetter(*_HOOKS)
_ATOMIC = frozenset((
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size,
    types.BuiltinFunctionType, types.ModuleType,
))  # fmt: skip
_MUTABLE = frozenset((list, set, dict, OrderedDict, defaultdict, deque))
_CONTAINERS = (list, set, dict, deque)
_WEAK = frozenset((weakref.ref, weakref.WeakMethod, *weakref.ProxyTypes))
_LRU_CACHE = type(functools.lru_cache(len))
# Types that only refer to other objects, and have no state of their own.
_REFERENCES: tuple[Any, ...] = (type, types.FunctionType, types.MethodType, functools.partial, _LRU_CACHE, *_WEAK)
# The depth to which plain objects that are not modules (configurations, helpers) are searched for modules.
_OBJECT_DEPTH = 4


def clone_module(model: M, tensor: Callable[[str, Tensor, nn.Module, bool], Tensor]) -> M:
    """A copy of the module tree whose parameters and buffers come from `tensor`.

    Plain attributes that refer to modules or parameters of the tree (lists of layers, bound methods, partials,
    closures, helpers, `nn.LSTM`'s flat weights) refer to the copied modules in the copy, and two modules that share a
    value also share its copy. Containers, unregistered tensors, random generators and helper objects that belong to a
    module are copied, so that a forward pass can write to them without changing the original. Functions that lead to no
    module are shared, and so are values that `funclora._bind.state` cannot copy.

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
        self.kinds: set[type] = set()  # classes of modules that can be bound
        self.parametrizations_cached = bool(getattr(parametrize, "_cache_enabled", 0))
        self.made: list[tuple[_Rewirer, dict[str, Any], list[str]]] = []  # attributes of a copy, and names to rewire
        self.nodes: Replacements = {}  # modules and tensors
        self.replacements: Replacements = {}  # everything else
        self.keep: list[Any] = []  # originals, so that no id is reused

    def clone(self, model: M) -> M:
        try:
            new = self._module(model, "")
            for scope, attributes, names in self.made:  # grows when unregistered modules are found
                for name in names:
                    scope.attribute = name
                    attributes[name] = scope.replaced(attributes[name])
        finally:
            self.made.clear()  # ends the cycle with the scopes, so that the copy dies with its last reference
        return new

    def _module(self, module: M, prefix: str | None) -> M:
        """Copy a module and its registered children; `prefix` is None for a module outside the tree."""
        kind = type(module)
        attributes = module.__dict__.copy()
        if kind not in self.kinds or "_is_replica" in attributes:
            refuse_unbindable(module, prefix)
            self.kinds.add(kind)
        if self.parametrizations_cached and parametrize.is_parametrized(module):
            raise UnsupportedError(
                f"{prefix or 'the model'!r} is parametrized, and torch.nn.utils.parametrize.cached() would give it the "
                "weights of another call. Bind and call it outside that context."
            )
        new = object.__new__(kind)
        object.__setattr__(new, "__dict__", attributes)
        attributes.pop("_compiled_call_impl", None)  # compiled for the original: the copy runs eagerly
        nodes = self.nodes
        # The copies of a module under several names have their own weights, so they share nothing.
        replacements = self.replacements if nodes.setdefault(id(module), new) is new else {}
        parameters, buffers = attributes["_parameters"], attributes["_buffers"]
        copies = attributes["_parameters"] = dict(parameters)
        for name, value in parameters.items():
            if value is not None:
                copies[name] = tensor = value if prefix is None else self.tensor(prefix + name, value, new, False)
                nodes.setdefault(id(value), tensor)
        copies = attributes["_buffers"] = dict(buffers)
        for name, value in buffers.items():
            if value is not None:
                tensor = value.clone() if prefix is None else self.tensor(prefix + name, value, new, True)
                copies[name] = nodes.setdefault(id(value), tensor)
        names = _renew_hooks(attributes)
        if isinstance(module, nn.RNNBase):
            # torch's functional_call leaves the tensors of its call in the original's list. They may belong to a
            # finished transform, and are then unreadable.
            flat = zip(module._flat_weights_names, attributes["_flat_weights"], strict=True)
            attributes["_flat_weights"] = [attributes["_parameters"].get(name, weight) for name, weight in flat]
            names.remove("_flat_weights")
        if names:
            own: Replacements = {}
            for registry, originals in (("_parameters", parameters), ("_buffers", buffers)):
                own |= {id(value): attributes[registry][name] for name, value in originals.items() if value is not None}
            self.made.append((_Rewirer(self, kind, own, replacements), attributes, names))
        children = attributes["_modules"] = attributes["_modules"].copy()
        for name, child in children.items():
            if child is not None:
                children[name] = self._module(child, None if prefix is None else f"{prefix}{name}.")
        if "_orig_mod" in children and "dynamo_ctx" in attributes:  # the result of torch.compile(model)
            attributes["forward"] = children["_orig_mod"]
        return new


def _renew_hooks(attributes: dict[str, Any]) -> list[str]:
    """New containers of hooks for a copy without hooks; the names of its attributes that may refer to the original."""
    pairs = iter(attributes.items())
    if tuple(islice(attributes, len(_OWN))) == _OWN and not any(_hooks(attributes)):
        # Nearly always. To look at each of them would take longer than the rest.
        for name, kind in _HOOKS.items():
            attributes[name] = kind()
        pairs = islice(pairs, len(_OWN), None)
    return [name for name, value in pairs if type(value) not in _ATOMIC and name not in _REGISTRIES]


class _Rewirer:
    """Replaces the objects that the attributes of one module refer to."""

    def __init__(self, cloner: _Cloner, owner: type, own: Replacements, replacements: Replacements) -> None:
        self.cloner = cloner
        self.owner = owner  # the module's class
        self.attribute = ""  # the current attribute
        self.own = own  # the module's own tensors
        self.replacements = replacements

    def replaced(self, value: Any, depth: int = _OBJECT_DEPTH) -> Any:
        """The value with every module and tensor of the tree replaced; the value itself if it contains none."""
        kind = type(value)
        if kind in _ATOMIC:
            return value
        key = id(value)
        for known in (self.own, self.cloner.nodes, self.replacements):
            if key in known:
                return known[key]
        if _is_engine(kind):
            return value
        if kind not in _WEAK:  # proxies have their referent's class
            if isinstance(value, nn.Module):
                return self.cloner._module(value, None)
            if isinstance(value, Tensor):
                new = value if value.requires_grad else value.clone()
                self.cloner.nodes[id(value)] = new
                self.cloner.keep.append(value)
                return new
        if kind in _MUTABLE:
            return self._container(value, depth)
        if isinstance(value, (tuple, frozenset)):
            parts = [self.replaced(part, depth) for part in value]
            if not any(n is not p for n, p in zip(parts, value, strict=True)):
                return value
            self._remember(value, (tuple if isinstance(value, tuple) else frozenset).__new__(kind, parts))
            return self.replacements[key]
        if not isinstance(value, _REFERENCES):
            new = self._state(value, depth)
            if new is not None:
                return new
        if not self._leads_to_the_tree(value, depth, set()):
            if depth == _OBJECT_DEPTH:
                self._remember(value, value)
            return value
        return self._copied(value, depth - 1)

    def _state(self, value: Any, depth: int) -> Any:
        """A copy of a value that is not a reference to another object; None if the value should be shared."""
        if isinstance(value, _CONTAINERS):
            new = self._container(value, depth)
        else:
            new = copied_leaf(value)
            if new is not None:
                self._remember(value, new)
                return new
            if is_one_way(value):
                raise UnsupportedError(
                    f"{self._where()} is a {type(value).__name__}, which forward would also consume for the model, and "
                    "which cannot be copied. Keep a list and a position in it instead."
                )
            new = copied_object(value) if depth > 0 else None
            depth -= 1
        if new is None:
            return None
        self._remember(value, new)
        parts = [(name, part) for name, part in attributes_of(new).items() if type(part) not in _ATOMIC]
        for name, part in parts:
            set_attribute(new, name, self.replaced(part, depth))
        return new

    def _where(self) -> str:
        return f"the attribute {self.attribute!r} of {self.owner.__name__}"

    def _leads_to_the_tree(self, value: Any, depth: int, seen: set[int]) -> bool:
        if id(value) in seen or _is_engine(type(value)):
            return False
        if id(value) in self.own or id(value) in self.cloner.nodes:
            return True
        if type(value) in _WEAK:  # only the tree would keep the copy of its referent alive
            return id(_referent(value)) in self.cloner.nodes
        if isinstance(value, (nn.Module, Tensor)):
            return isinstance(value, nn.Module)
        seen.add(id(value))
        parts, is_object = _parts(value)
        if is_object and depth <= 0:
            return False
        return any(
            type(part) not in _ATOMIC and self._leads_to_the_tree(part, depth - is_object, seen) for part in parts
        )

    def _remember(self, value: Any, new: Any) -> None:
        self.replacements[id(value)] = new
        self.cloner.keep.append(value)

    def _container(self, value: Any, depth: int) -> Any:
        """A copy of a container; None if its class cannot be copied."""
        try:
            new = value.copy() if type(value) in _MUTABLE else copy.copy(value)
        except Exception:  # noqa: BLE001  a class of the model may raise any error
            return None
        if new is value:
            return None
        self._remember(value, new)  # before its items, which may refer back to it
        atomic = _ATOMIC.issuperset
        if atomic(map(type, value)) and (not isinstance(value, dict) or atomic(map(type, value.values()))):
            return new
        if isinstance(value, dict):
            items = [(self.replaced(k, depth), self.replaced(v, depth)) for k, v in value.items()]
            kind = OrderedDict if isinstance(value, OrderedDict) else dict  # not through methods of the model's class
            kind.clear(new)
            for k, v in items:
                kind.__setitem__(new, k, v)
        else:
            parts = [self.replaced(part, depth) for part in value]
            new.clear()
            (new.update if isinstance(value, set) else new.extend)(parts)
        return new

    def _copied(self, value: Any, depth: int) -> Any:
        """A copy of a value that leads to a module of the tree."""
        new: Any
        if isinstance(value, types.MethodType):
            return types.MethodType(self.replaced(value.__func__, depth + 1), self.replaced(value.__self__, depth + 1))
        if isinstance(value, types.FunctionType):
            return self._function(value, depth + 1)
        if isinstance(value, functools.partial):
            args, kwargs = self.replaced(value.args, depth + 1), self.replaced(value.keywords, depth + 1)
            new = functools.partial(self.replaced(value.func, depth + 1), *args, **kwargs)
            new.__dict__.update(self.replaced(value.__dict__, depth + 1))
            return new
        if isinstance(value, _LRU_CACHE):
            return functools.lru_cache(**value.cache_parameters())(self.replaced(value.__wrapped__, depth + 1))
        if type(value) in (weakref.ref, weakref.WeakMethod):
            return type(value)(self.replaced(value(), depth + 1))
        if type(value) in weakref.ProxyTypes:
            return weakref.proxy(self.replaced(_referent(value), depth + 1))
        try:
            new = object.__new__(type(value))
        except TypeError as error:
            raise UnsupportedError(
                f"{self._where()} holds a {type(value).__name__} that refers to one of the model's modules and cannot "
                "be copied, so it would use the base weights."
            ) from error
        self._remember(value, new)
        for name, part in attributes_of(value).items():
            set_attribute(new, name, self.replaced(part, depth))
        return new

    def _function(self, value: types.FunctionType, depth: int) -> types.FunctionType:
        cells = []
        for cell in value.__closure__ or ():
            if id(cell) not in self.replacements:  # functions that share a variable still share it
                self._remember(cell, types.CellType())
            cells.append(self.replacements[id(cell)])
        new = types.FunctionType(
            value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells) or None
        )
        self._remember(value, new)
        functools.update_wrapper(new, value, updated=())
        del new.__dict__["__wrapped__"]
        new.__defaults__ = self.replaced(value.__defaults__, depth)
        new.__kwdefaults__ = self.replaced(value.__kwdefaults__, depth)
        new.__dict__.update({name: self.replaced(part, depth) for name, part in value.__dict__.items()})
        for cell, original in zip(cells, value.__closure__ or (), strict=True):
            if _is_empty(cell) and not _is_empty(original):
                cell.cell_contents = self.replaced(original.cell_contents, depth)
        return new


def _is_engine(kind: type) -> bool:
    """Whether objects of a class gather and free the weights of the modules that they were made for: FSDP's states."""
    return kind.__module__.startswith("torch.distributed.fsdp.") and not issubclass(kind, nn.Module)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _referent(weak: Any) -> Any:
    """The object behind a weak reference, the owner of the method behind a weak method."""
    if type(weak) in weakref.ProxyTypes:
        return weak.__reduce_ex__.__self__
    return getattr(weak(), "__self__", None) if type(weak) is weakref.WeakMethod else weak()


def _parts(value: Any) -> tuple[list[Any], bool]:
    """The objects that a value refers to, and whether it is a plain object."""
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__], False
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        return [*cells, value.__defaults__, value.__kwdefaults__, *value.__dict__.values()], False
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords, value.__dict__], False
    if isinstance(value, _LRU_CACHE):
        return [value.__wrapped__], False
    if isinstance(value, type):
        return [], False
    items: list[Any] = []
    if isinstance(value, dict):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        items = list(value)
    return [*items, *attributes_of(value).values()], not items

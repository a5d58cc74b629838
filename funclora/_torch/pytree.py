"""Pytree registration of a class with both optree and torch's own pytree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any, TypeVar

import optree
import torch
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor

from funclora._torch.functions import is_mapped
from funclora.errors import ParamsError

C = TypeVar("C", bound=type[Any])
TensorFunction = Callable[[Tensor], Tensor]

FROZEN: Mapping[str, Any] = MappingProxyType({"funclora.frozen": True})
"""The metadata of a dataclass field that holds a frozen tensor: `field(kw_only=True, metadata=FROZEN)`.

In a class registered by `pytree_node` such a tensor is not a leaf: it is not trained, decayed or differentiated, and no
transform maps over it. It is part of the structure. Two trees have the same structure if their frozen tensors are the
same tensor, or equal in shape, dtype, device and every value. The comparison is cheapest if all rules share one tensor.

`pickle` and `copy.deepcopy` keep it. `optree.tree_map` does not reach it; `map_tensors` does.

Examples:
    >>> from dataclasses import dataclass, field
    >>> from funclora.rules import FROZEN, pytree_node
    >>> @pytree_node
    ... @dataclass(frozen=True, eq=False)
    ... class Scaled:
    ...     gain: Tensor
    ...     direction: Tensor = field(kw_only=True, metadata=FROZEN)
    ...     leaf_names = ("gain",)
    >>> node = Scaled(torch.ones(1), direction=torch.zeros(3))
    >>> [leaf.shape for leaf in optree.tree_leaves(node)]
    [torch.Size([1])]
"""


class StaticTensors(ABC):
    """Static data of a node that holds tensors, which `map_tensors` reaches."""

    @abstractmethod
    def mapped(self, function: TensorFunction) -> StaticTensors:
        """The same data with the results of the function in place of the tensors."""


class _Frozen(StaticTensors):
    """A frozen tensor as static data of a tree, which is compared and hashed."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def mapped(self, function: TensorFunction) -> _Frozen:
        return _Frozen(function(self.tensor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and (self.tensor is other.tensor or _equal(self.tensor, other.tensor))

    def __hash__(self) -> int:
        return hash((self.tensor.shape, self.tensor.dtype))

    def __repr__(self) -> str:
        return f"frozen {list(self.tensor.shape)}"


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one kind and have the same values, if the values can be read."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    unseen = one.is_meta or torch.compiler.is_compiling() or is_mapped(one, other)
    return not unseen and torch.equal(one, other)


def pytree_node(cls: C) -> C:
    """Register a frozen dataclass as a pytree node of optree and of torch.

    The fields named in `cls.leaf_names` are its children. All other fields are static: part of the structure, compared
    with `==` and hashed. A static field that holds a tensor is marked with `FROZEN`.

    Args:
        cls: a class made by `@dataclass(frozen=True, eq=False)`, with a class attribute `leaf_names`.

    Returns:
        The class itself, so that it can be used as a decorator.

    Raises:
        ParamsError: `leaf_names` is missing or names something that is no field, or a field is both a leaf and marked
            as frozen.

    Examples:
        >>> from dataclasses import dataclass
        >>> from funclora.rules import pytree_node
        >>> @pytree_node
        ... @dataclass(frozen=True, eq=False)
        ... class Shifted:
        ...     shift: Tensor
        ...     times: int = 1
        ...     leaf_names = ("shift",)
        >>> optree.tree_map(lambda x: x + 1, Shifted(torch.zeros(2), times=3))
        Shifted(shift=tensor([1., 1.]), times=3)
    """
    names: tuple[str, ...] = getattr(cls, "leaf_names", None)  # type: ignore[assignment]
    own = [f.name for f in fields(cls)]
    if not isinstance(names, tuple) or not {*names} <= {*own}:
        raise ParamsError(f"{cls.__name__}.leaf_names: expected a tuple with names of the fields {own}, got {names!r}.")
    static = tuple(n for n in own if n not in names)
    cls.frozen_names = tuple(f.name for f in fields(cls) if f.metadata.get("funclora.frozen"))
    if both := set(names).intersection(cls.frozen_names):
        raise ParamsError(f"{cls.__name__}: {min(both)} is in leaf_names and marked as frozen. It is one or the other.")
    frozen = tuple(n in cls.frozen_names for n in static)

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        context = [getattr(node, n) for n in static]
        if any(frozen):
            context = [_Frozen(x) if f else x for x, f in zip(context, frozen, strict=True)]
        return [getattr(node, n) for n in names], tuple(context)

    def unflatten(context: Any, children: Iterable[Any]) -> Any:
        # Not through __init__: transforms fill trees with placeholders that are not tensors.
        node: Any = object.__new__(cls)
        if any(frozen):
            context = [x.tensor if f else x for x, f in zip(context, frozen, strict=True)]
        for n, value in zip((*names, *static), (*children, *context), strict=True):
            object.__setattr__(node, n, value)
        return node

    def flatten_optree(node: Any) -> tuple[list[Any], tuple[Any, ...], tuple[str, ...]]:
        return *flatten(node), names

    def flatten_with_keys(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, context = flatten(node)
        return [(torch_pytree.GetAttrKey(n), c) for n, c in zip(names, children, strict=True)], context

    optree.register_pytree_node(
        cls,
        flatten_optree,
        unflatten,
        path_entry_type=optree.GetAttrEntry,
        namespace=GLOBAL_NAMESPACE,
    )
    torch_pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, context: unflatten(context, list(children)),
        serialized_type_name=f"funclora.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    _NODES.add(cls)
    return cls


_NODES: set[type[Any]] = set()  # the classes that pytree_node has registered


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`optree.tree_map` that reaches frozen tensors too: to move adapters to another device or dtype.

    Args:
        function: called with every leaf and every frozen tensor. It may change values, dtype and device.
        tree: a rule, adapters, a stack of them, or any other tree.

    Returns:
        The tree with the results. A frozen tensor that is shared stays shared: the function is called once for it.

    Examples:
        >>> import funclora as fl
        >>> adapters = {"weight": fl.LoRA(torch.ones(1, 3), torch.ones(2, 1))}
        >>> fl.rules.map_tensors(lambda x: x.to(torch.bfloat16), adapters)["weight"].a.dtype
        torch.bfloat16
    """
    return _mapped(function, _once(function), tree)


def map_frozen(function: TensorFunction, tree: Any) -> Any:
    """The tree with the results of the function in place of the frozen tensors; leaves stay as they are."""
    return _mapped(lambda x: x, _once(function), tree)


def _once(function: TensorFunction) -> TensorFunction:
    """The function, called once for each tensor."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor itself, so that no other one gets its id

    def once(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = x, function(x)
        return done[id(x)][1]

    return once


def _mapped(of_leaf: TensorFunction, of_frozen: TensorFunction, tree: Any) -> Any:
    def mapped(x: Any) -> Any:
        if type(x) not in _NODES:
            return of_leaf(x)
        node: Any = object.__new__(type(x))
        for f in fields(x):
            value = getattr(x, f.name)
            if f.name in x.leaf_names:
                value = _mapped(of_leaf, of_frozen, value)
            elif f.name in x.frozen_names:
                value = of_frozen(value)
            elif isinstance(value, StaticTensors):
                value = value.mapped(of_frozen)
            object.__setattr__(node, f.name, value)
        return node

    return optree.tree_map(mapped, tree, is_leaf=lambda x: type(x) in _NODES)


def leaf_keys(spec: optree.PyTreeSpec) -> list[str]:
    """A name for each leaf: its path, with slashes.

    Examples:
        >>> leaf_keys(optree.tree_structure({"a": [1, 2]}))
        ['a/0', 'a/1']
    """
    return ["/".join(map(str, path)) for path in spec.paths()]


def keyed_copies(tree: Any) -> dict[str, Tensor]:
    """The leaves by `leaf_keys`, on the CPU, contiguous and each with its own memory, as safetensors requires."""
    leaves, spec = optree.tree_flatten(tree)
    return {key: leaf.detach().cpu().contiguous().clone() for key, leaf in zip(leaf_keys(spec), leaves, strict=True)}

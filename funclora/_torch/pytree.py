"""Pytree registration: one class, known to optree and to torch's own pytree alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

import optree
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor

C = TypeVar("C", bound=type[Any])


def pytree_node(cls: C) -> C:
    """Register a frozen dataclass as a pytree node: `cls.leaf_names` name its children, all else is static."""
    names: tuple[str, ...] = cls.leaf_names
    static = tuple(f.name for f in fields(cls) if f.name not in names)

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, n) for n in names], tuple(getattr(node, n) for n in static)

    def unflatten(context: Any, children: Iterable[Any]) -> Any:
        # Not through __init__: transforms fill trees with placeholders that are no tensors.
        node: Any = object.__new__(cls)
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
    return cls


def leaf_keys(spec: optree.PyTreeSpec) -> list[str]:
    """A name for each leaf: the way to it, with slashes.

    Examples:
        >>> leaf_keys(optree.tree_structure({"a": [1, 2]}))
        ['a/0', 'a/1']
    """
    return ["/".join(map(str, path)) for path in spec.paths()]


def keyed_copies(tree: Any) -> dict[str, Tensor]:
    """The leaves by `leaf_keys`, on the CPU, contiguous and each with memory of its own: what safetensors can write."""
    leaves, spec = optree.tree_flatten(tree)
    return {key: leaf.detach().cpu().contiguous().clone() for key, leaf in zip(leaf_keys(spec), leaves, strict=True)}

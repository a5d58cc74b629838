"""Arithmetic over trees of tensors, with one number for all or one for each member of a stack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from funclora._api.arguments import refuse
from funclora.errors import ConfigError
from funclora.optim._values import PerMember, wide

PyTree: TypeAlias = Any
"""A tree of tensors, in containers that optree knows: dicts, tuples, lists, rules, stacks."""


def check_leaves(where: str, tree: PyTree) -> None:
    """Raise `ArgumentError` unless all leaves of a tree are tensors."""
    leaves: list[Any] = optree.tree_leaves(tree)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        paths, leaves, _ = optree.tree_flatten_with_path(tree)
        path, leaf = next((p, x) for p, x in zip(paths, leaves, strict=True) if not isinstance(x, Tensor))
        refuse(f"{where} at {path}" if path else where, "a tree of tensors", leaf)


def by_member(value: PerMember, leaf: Tensor) -> PerMember:
    """`value` so that it broadcasts over `leaf`: a number or `[]` to all, `[n]` along the leading axis."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 1:
        if value.shape != leaf.shape[:1]:
            raise ConfigError(
                f"n_adapters: expected leaves [{len(value)}, ...] for {len(value)} values, one per adapter, "
                f"got a leaf of shape {list(leaf.shape)}; stack the adapters, or pass one number for all"
            )
        value = value.reshape(-1, *[1] * (leaf.dim() - 1))
    return value.to(leaf.device, leaf.dtype)


def times(leaf: Tensor, factor: PerMember) -> Tensor:
    x = leaf.to(wide(leaf.dtype))
    return (x * by_member(factor, x)).to(leaf.dtype)


def widest(tree: PyTree) -> torch.dtype:
    return functools.reduce(torch.promote_types, {x.dtype for x in optree.tree_leaves(tree)}, torch.float32)


def tree_map(fn: Callable[..., Any], outputs: int = 1, /, **trees: PyTree) -> Any:
    """`optree.tree_map` over trees with names; refuses other structures, and shapes that would broadcast.

    With `outputs` other than 1, `fn` returns a tuple of this length, and there is one tree for each item.
    """
    spec, columns = aligned(**trees)
    if outputs == 1:
        return optree.tree_unflatten(spec, map(fn, *columns))
    rows = list(map(fn, *columns))
    return tuple(optree.tree_unflatten(spec, [row[i] for row in rows]) for i in range(outputs))


def aligned(**trees: PyTree) -> tuple[Any, list[list[Tensor]]]:
    """The structure of trees with names, and the leaves of each; refuses other structures, and other shapes."""
    (first, tree), *others = trees.items()
    leaves, spec = optree.tree_flatten(tree)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        check_leaves(first, tree)
    columns = [leaves]
    for name, other in others:
        try:
            column: list[Any] = spec.flatten_up_to(other)
        except ValueError as error:
            raise ConfigError(
                f"{name}: expected the tree structure of {first}, got another one. Gradients, parameters and "
                f"state must belong to the same adapters: {str(error).splitlines()[0]:.200}"
            ) from error
        for i, (x, y) in enumerate(zip(leaves, column, strict=True)):
            if not isinstance(y, Tensor) or x.shape != y.shape:
                got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ConfigError(
                    f"{name} at {spec.paths()[i]}: expected a tensor {list(x.shape)} as in {first}, "
                    f"got {got}; gradients, parameters and state must belong to the same adapters"
                )
        columns.append(column)
    return spec, columns

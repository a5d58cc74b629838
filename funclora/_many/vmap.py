"""`vmap`: any function of an adapter, mapped over the members of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._api.arguments import check_function
from funclora._api.deprecated import warn_old
from funclora._many.stack import Group, Stack, check_stack
from funclora.errors import ConfigError

Dims = tuple[Any, ...]


def vmap(
    function: Callable[..., Any], in_dims: Any = None, out_dims: Any = 0, randomness: str = "error"
) -> Callable[..., Any]:
    """`torch.func.vmap` over the members of a stack.

    General but slower than `route`: any model, any loss, members of any structure. Each group is mapped at once.

    Args:
        function: `function(adapters, *args)`, called with one member (its tensors are batched by `vmap`).
        in_dims: as in `torch.func.vmap`: the dimension of the members, one int for all arguments, or a tuple with
            an entry for each, None for an argument that all members share. The first entry, for the stack, is 0. An
            entry may be nested like its argument: `(0, {"ids": 0, "mask": None})`. Optional if the stack is the only
            argument.
        out_dims: as in `torch.func.vmap`: the dimension of the members in the results, one int for all tensors, or
            nested like the result.
        randomness: as in `torch.func.vmap`: "different", "same" or "error".

    Returns:
        A function `(stack, *args)` that returns the results of `function`, with a dimension `[n_members]` added to each
        tensor.

    Raises:
        ConfigError: an option is invalid; or, when called, `in_dims` or `out_dims` do not fit the arguments or the
            result, or the results of members differ in shape or structure.

    Examples:
        The members differ in rank; `x` is shared, or each member has its own:

        >>> import funclora as fl
        >>> model = torch.nn.Linear(3, 2)
        >>> params = fl.base_params(model)
        >>> members = fl.stack([{"weight": fl.LoRA(torch.ones(r, 3), torch.ones(2, r))} for r in (1, 2)])
        >>> outputs = lambda adapters, x: fl.apply(model, params, adapters, x)
        >>> vmap(outputs, in_dims=(0, None))(members, torch.ones(5, 3)).shape
        torch.Size([2, 5, 2])
        >>> vmap(outputs, in_dims=(0, 1), out_dims=1)(members, torch.ones(5, 2, 3)).shape
        torch.Size([5, 2, 2])
    """
    check_function(function, "function", "function(adapters, *args)")
    if randomness not in ("error", "same", "different"):
        raise ConfigError(f"vmap: randomness: expected 'error', 'same' or 'different', got {randomness!r}.")

    def mapped(stack: Stack[Any], *args: Any) -> Any:
        check_stack(stack)
        given: Any = args
        leaves, spec = optree.tree_flatten(given, none_is_leaf=True)
        dims = _spread("in_dims", _dims(in_dims, len(args)), given)
        results = []
        for group in stack.groups:
            index = torch.tensor(group.members)
            scalings = _scalings(group)
            some = [_taken(leaf, dim, index, len(stack)) for leaf, dim in zip(leaves, dims, strict=True)]

            def call(k: Tensor, tree: Any, scalings: dict[str, Tensor], *leaves: Any) -> Any:
                for name, scaling in scalings.items():
                    tree = {**tree, name: tree[name].with_scaling(scaling)}
                return function(tree, *optree.tree_unflatten(spec, leaves))

            # The index always has a dimension of members, also for the member {}, which has no tensors.
            by_member = torch.func.vmap(call, (0, 0, 0, *dims), randomness=randomness)
            results.append(by_member(index, group.tree(), scalings, *some))
        return _placed(_joined(stack, results), out_dims)

    return mapped


def _dims(in_dims: Any, n: int) -> Dims:
    """An entry for each of n arguments after the stack."""
    if in_dims is None:
        if n:
            new = ", ".join(["0"] + ["None"] * n)
            warn_old("vmap without in_dims, with arguments that all members share,", f"in_dims=({new})", 4)
        return (None,) * n
    if isinstance(in_dims, (tuple, list)) and len(in_dims) == n + 1:
        if not _is_int(in_dims[0]) or in_dims[0] != 0:
            raise ConfigError(f"vmap: in_dims[0] is the stack's dimension of members, 0; got {in_dims[0]!r}.")
        return tuple(in_dims[1:])
    if _is_int(in_dims):
        if in_dims and n:
            new = ", ".join(["0"] + [str(in_dims)] * n)
            warn_old(f"vmap with in_dims={in_dims}, which the stack does not have,", f"in_dims=({new})", 4)
        return (in_dims,) * n
    if isinstance(in_dims, (tuple, list)) and len(in_dims) == n:
        new = ", ".join(map(str, (0, *in_dims)))
        warn_old("vmap with in_dims that leave out the stack", f"in_dims=({new})", 4)
        return tuple(in_dims)
    raise ConfigError(
        f"vmap: in_dims: expected an int or a tuple with an entry for each of {n + 1} arguments, the stack's 0 first, "
        f"got {in_dims!r}."
    )


def _spread(option: str, dims: Any, tree: Any) -> list[int | None]:
    """The dimension of each leaf: an entry applies to all leaves of its subtree."""
    try:
        found: list[Any] = optree.broadcast_prefix(dims, tree, none_is_leaf=True)
    except ValueError as error:
        raise ConfigError(f"vmap: {option}={dims!r} is not nested like the value that it describes: {error}") from error
    for dim in found:
        if dim is not None and not _is_int(dim):
            raise ConfigError(f"vmap: {option}: expected ints or None, got {dim!r}.")
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _taken(leaf: Any, dim: int | None, index: Tensor, n: int) -> Any:
    """The part of an argument that belongs to some of the members."""
    if dim is None:
        return leaf
    if not isinstance(leaf, Tensor):
        raise ConfigError(f"vmap: in_dims has {dim} for a {type(leaf).__name__}, which is not a tensor. Pass None.")
    if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != n:
        raise ConfigError(f"vmap: an argument of shape {list(leaf.shape)} has no {n} members along dimension {dim}.")
    return leaf.index_select(dim, index.to(leaf.device))


def _joined(stack: Stack[Any], results: list[Any]) -> Any:
    """The results of the groups as one, the members in their own order along the first dimension."""
    try:
        return optree.tree_map(lambda *parts: stack.in_order(torch.cat(parts)), *results)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"vmap: the members' results cannot be joined: {error} Return tensors whose shapes depend on no "
            "member's own rank or targets, or map over stack[i : i + 1]."
        ) from error


def _placed(result: Any, out_dims: Any) -> Any:
    """The result with the members along the dimension that `out_dims` gives."""
    if out_dims == 0:
        return result
    leaves, spec = optree.tree_flatten(result)
    moved = []
    for leaf, dim in zip(leaves, _spread("out_dims", out_dims, result), strict=True):
        if dim is None or not -leaf.dim() <= dim < leaf.dim():
            raise ConfigError(f"vmap: out_dims has {dim} for a result of shape {list(leaf.shape)}, members included.")
        moved.append(leaf.movedim(0, dim))
    return optree.tree_unflatten(spec, moved)


def _scalings(group: Group[Any]) -> dict[str, Tensor]:
    """The scalings `[n_members]` of the rules in which members of a group differ."""
    tree: Any = group.tree()
    found = {}
    for name, scalings in group.scalings().items():
        if len(set(scalings)) > 1 and tree[name].scaling is not None:  # and not tied to one
            leaf = optree.tree_leaves(tree[name])[0]
            found[name] = torch.tensor(scalings, device=leaf.device, dtype=leaf.dtype)
    return found

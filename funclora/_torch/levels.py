"""`torch.func.vmap` as the steps that it consists of.

torch.compile ignores the rule for `vmap` of an `autograd.Function`, and writes the entering and leaving of a transform
into its graph as calls of these private functions. With them, a function inside of `vmap` can compute on all members at
once. Outside of the compiler, functions of many tensors are mapped without torch's handling of trees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._functorch.predispatch import (
    _add_batch_dim,
    _remove_batch_dim,
    _vmap_decrement_nesting,
    _vmap_increment_nesting,
)

Dims = Sequence["int | None"]


def vmapped(function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`torch.func.vmap(function)(*tensors)`, quick for hundreds of tensors: torch looks through trees for them."""
    sizes = {x.shape[:1] for x in tensors}
    if torch.compiler.is_compiling() or len(sizes) != 1 or () in sizes:  # the compiler, or an error
        return torch.func.vmap(function)(*tensors)
    n = len(tensors[0])
    level = _vmap_increment_nesting(n, "error")
    try:
        outs = function(*(torch._C._functorch._add_batch_dim(x, 0, level) for x in tensors))
        return tuple(torch._C._functorch._remove_batch_dim(x, level, n, 0) for x in outs)
    finally:
        _vmap_decrement_nesting()


def outside_of_vmap(
    function: Callable[[list[Tensor], Dims], Sequence[tuple[Tensor, int | None]]], n: int, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """`function(tensors, dims)` outside of the innermost `vmap`, with randomness "different", over n members.

    Args:
        function: gets the tensors with the members along `dims`, None where all share one; returns such pairs.
        n: the number of members.
        tensors: as they are inside of the `vmap`.

    Returns:
        The results, as they are inside of it.
    """
    level = _vmap_decrement_nesting()
    dims = [0 if torch._C._functorch.is_batchedtensor(x) else None for x in tensors]
    whole = [x if d is None else _remove_batch_dim(x, level, n, 0) for x, d in zip(tensors, dims, strict=True)]
    try:
        outs = function(whole, dims)
    finally:
        _vmap_increment_nesting(n, "different")
    return [x if d is None else _add_batch_dim(x, d, level) for x, d in outs]

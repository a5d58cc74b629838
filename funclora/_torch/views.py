"""Which part of a tensor a view shows: found by applying the view to a tensor that has strides but no values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A rectangular part of a tensor, its dimensions in some order.

    Attributes:
        dims: for each dimension of the view the dimension of the tensor; None for a new one, of size 1. A dimension of
            the tensor that is not among them is shown at a single position.
        starts: for each dimension of the tensor the first position that is shown.
        lengths: for each dimension of the tensor the number of positions that are shown.
    """

    dims: tuple[int | None, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether this is a complete tensor of that shape, with its dimensions in order."""
        return self.dims == tuple(range(len(shape))) and self.lengths == tuple(shape)


def seen(
    func: Callable[..., Any], shape: Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> View | tuple[View | None, ...] | None:
    """The part that `func(x, *args, **kwargs)` shows of a tensor x of that shape.

    Returns:
        The view, or one for each tensor that the operation returns. None means that the result is not a `View`: it has
        steps, repeats positions, joins dimensions, has no elements, or is a copy; or the arguments do not fit.
    """
    given = (func, tuple(shape), args, tuple(kwargs.items()))
    try:
        return _seen_before(*given) if _is_plain((args, *kwargs.values())) else _seen(*given)
    except TypeError:  # a list, which cannot be a cache key
        return _seen(*given)


# The compiler cannot trace strides. This is all that torch.compiler.assume_constant_result does (torch 2.10 to 2.13),
# but a call of that imports the whole compiler, which takes a second.
seen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_plain(x: Any) -> bool:
    """Whether there are only numbers in tuples: a cache must not keep tensors, slices cannot be keys, True equals 1."""
    return all(map(_is_plain, x)) if isinstance(x, tuple) else not isinstance(x, (Tensor, slice, bool))


def _seen(
    func: Callable[..., Any], shape: tuple[int, ...], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> View | tuple[View | None, ...] | None:
    # Strides are larger than necessary, so that no two positions coincide, and even: the last stride of a copy is 1.
    strides = [2 * math.prod(size + 1 for size in shape[i + 1 :]) for i in range(len(shape))]
    memory = torch.empty(1 + sum(map(math.prod, zip(shape, strides, strict=True))), device="meta")
    probe = memory.as_strided(shape, strides, 1)  # the first position of a copy is 0
    try:
        out = func(probe, *args, **dict(kwargs))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return _read(out, probe) if isinstance(out, Tensor) else tuple(_read(each, probe) for each in out)


_seen_before = functools.lru_cache(maxsize=1024)(_seen)  # a layer makes the same query at every call


def _read(out: Tensor, probe: Tensor) -> View | None:
    offset = out.storage_offset() - probe.storage_offset()
    if out.dtype != probe.dtype or 0 in out.shape or offset < 0:
        return None
    strides = probe.stride()
    dims: list[int | None] = [None] * out.dim()
    lengths = [1] * probe.dim()
    # A dimension of size 1 may have any stride: it gets a position that no other dimension uses.
    for i in sorted(range(out.dim()), key=lambda i: out.shape[i] == 1):
        size, stride = out.shape[i], out.stride(i)
        dim = strides.index(stride) if stride in strides else None
        if dim is not None and dim not in dims and size <= probe.shape[dim]:
            dims[i], lengths[dim] = dim, size
        elif size > 1:
            return None
    left = [dim for dim in range(probe.dim()) if dim not in dims]
    for i, dim in enumerate(dims):
        if dim is None and left:
            dims[i] = left.pop(0)
    starts = []
    for stride in strides:
        starts.append(offset // stride)
        offset %= stride
    return View(tuple(dims), tuple(starts), tuple(lengths))

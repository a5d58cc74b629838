"""Where the rows enter a model and leave it."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funclora._tracking.propagation import Place
from funclora._tracking.tensor import ForwardCall, RowTensor, rows_of
from funclora.errors import UnsupportedError


class Entrance:
    """Where a batch of n rows enters a model: the outermost module that is called.

    An input tensor of that call holds the rows if its first dimension is n, or n·repeats with each row `repeats`
    times in succession. Masks are not tracked: they are aligned with the rows by position, and models compute with
    them in ways that cannot be tracked.
    """

    def __init__(self, n: int, repeats: int) -> None:
        self.n = n
        self.repeats = repeats
        self.known: dict[Any, Place] = {}
        self.inside = threading.local()

    def guard(self, module: nn.Module) -> None:
        """Route the calls of a module of a bound model, which belongs to one caller, through this entrance."""
        forward, reference = module.__dict__.get("forward"), weakref.ref(module)

        def entered(*args: Any, **kwargs: Any) -> Any:
            inner: Callable[..., Any] = forward or functools.partial(type(module_of()).forward, module_of())
            return self.call(inner, args, kwargs)

        def module_of() -> Any:
            return reference()

        kind: Any = type(module)
        entered.__signature__ = _signature(kind)  # type: ignore[attr-defined]
        entered.entrance = self  # type: ignore[attr-defined]
        module.__dict__["forward"] = entered

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], alone: bool = False
    ) -> Any:
        """`function(*args, **kwargs)`; rows are tracked from here on, unless this is inside another tracked call."""
        if getattr(self.inside, "now", False):
            return function(*args, **kwargs)
        self.inside.now = True
        try:
            return with_rows(function, args, kwargs, self.n, self.repeats, self.known, alone)
        finally:
            self.inside.now = False


def with_rows(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    n: int,
    repeats: int,
    known: dict[Any, Place],
    alone: bool = False,
) -> Any:
    """`function(*args, **kwargs)` on tracked inputs; with `alone`, the rows must be dimension 0 of every output."""
    scope = ForwardCall(n, known)
    entered: list[Tensor] = []

    def enter(x: Any) -> Any:
        if isinstance(x, RowTensor) and x.scope.n == n:  # recomputed in backward: tracked since the forward pass
            entered.append(x)
            return scope.enter(x.view_as(x), x.place)
        if isinstance(x, Tensor) and x.dim() and x.shape[0] in (n, n * repeats) and x.dtype != torch.bool:
            entered.append(x)
            return scope.enter(x, Place(0, x.shape[0] // n))
        return x

    args = tree_map(enter, args)
    kwargs = {name: x if "mask" in name else tree_map(enter, x) for name, x in kwargs.items()}
    if not entered:
        sizes = f"{n}" if repeats == 1 else f"{n} or {n * repeats}"
        raise UnsupportedError(
            f"the adapters are routed for {n} rows, and no input tensor has {sizes} as its first dimension. Pass one "
            "id for each row; for beam search: route(..., repeats=num_beams)."
        )

    def leave(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        plain, place = rows_of(x)
        if isinstance(place, str) and place and x.dim():
            raise UnsupportedError(
                f"the model returns a tensor of shape {list(x.shape)} whose rows {place} may have mixed or reordered. "
                "Call the model once for each member, or use funclora.vmap over the stack."
            )
        if alone and place != Place(0, 1):
            raise UnsupportedError(
                f"the model returns a tensor of shape {list(x.shape)} for {n} rows, whose first dimension does not "
                "hold the rows: it joins the members' results, or is the same for all of them. Compute the loss "
                "outside of the model, from outputs with examples as their first dimension."
            )
        return plain if isinstance(x, RowTensor) else x

    try:
        return tree_map(leave, function(*args, **kwargs))
    finally:
        scope.close()


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a module's forward, which callers read."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])

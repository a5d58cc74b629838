"""Where the rows enter a model and leave it."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funclora._tracking.batch import Batch
from funclora._tracking.calls import Owner
from funclora._tracking.owners import Lost, Owners, Place
from funclora._tracking.tensor import ForwardCall, RowTensor, rows_of
from funclora.errors import UnsupportedError


class Entrance:
    """Where a batch enters a model: the outermost module that is called."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.known: dict[Any, Owner] = {}
        self.inside = threading.local()

    def guard(self, module: nn.Module) -> None:
        """Route the calls of a module of a bound model, which belongs to one caller, through this entrance."""
        forward, reference = module.__dict__.get("forward"), weakref.ref(module)

        def entered(*args: Any, **kwargs: Any) -> Any:
            inner: Callable[..., Any] = forward or functools.partial(type(module_of()).forward, module_of())
            return self.call(inner, args, kwargs, names=tuple(entered.__signature__.parameters))  # type: ignore[attr-defined]

        def module_of() -> Any:
            return reference()

        kind: Any = type(module)
        entered.__signature__ = _signature(kind)  # type: ignore[attr-defined]
        entered.entrance = self  # type: ignore[attr-defined]
        module.__dict__["forward"] = entered

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        names: tuple[str, ...] = (),
        alone: bool = False,
    ) -> Any:
        """`function(*args, **kwargs)`; rows are tracked from here on, unless this is inside another tracked call."""
        if getattr(self.inside, "now", False):
            return function(*args, **kwargs)
        self.inside.now = True
        try:
            return with_rows(function, args, kwargs, self.batch, self.known, names=names, alone=alone)
        finally:
            self.inside.now = False


def with_rows(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: Batch,
    known: dict[Any, Owner],
    *,
    names: tuple[str, ...] = (),
    alone: bool = False,
) -> Any:
    """`function(*args, **kwargs)` on tracked inputs.

    Args:
        function: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        batch: how they hold the rows.
        known: results of earlier propagations.
        names: the names of its arguments.
        alone: the rows must be dimension 0 of every output.
    """
    scope = ForwardCall(batch.n, known)
    entered: list[Tensor] = []

    def enter(x: Any, name: str | None) -> Any:
        if isinstance(x, RowTensor) and x.scope.n == batch.n:  # recomputed in backward: tracked since the forward pass
            entered.append(x)
            return scope.enter(x.view_as(x), x.place)
        if not isinstance(x, Tensor):
            return x
        owner = batch.owner_of(name, x)
        if owner is None:
            return x
        entered.append(x)
        return scope.enter(x, owner)

    def all_of(value: Any, name: str | None) -> Any:
        if type(value) is dict:
            masks = name is not None and "mask" in name
            return {key: all_of(x, name if masks or not isinstance(key, str) else key) for key, x in value.items()}
        return tree_map(lambda x: enter(x, name), value)

    named = [names[i] if i < len(names) else None for i in range(len(args))]
    args = tuple(all_of(x, name) for x, name in zip(args, named, strict=True))
    kwargs = {name: all_of(x, name) for name, x in kwargs.items()}
    if not entered:
        raise UnsupportedError(
            f"the adapters are routed for {batch.describe()}. Pass one id for each row; for beam search: "
            "route(..., repeats=num_beams); for inputs whose rows are not first: route(..., rows_of={...})."
        )

    def leave(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return strip(x)
        plain, place = rows_of(x)
        if isinstance(place, str) and place and x.dim() and x.is_floating_point():
            where = f" ({place.where})" if isinstance(place, Lost) and place.where else ""
            raise UnsupportedError(
                f"the model returns a tensor of shape {list(x.shape)} whose rows {place}{where} may have mixed or "
                "reordered. Call the model once for each member, or use funclora.vmap over the stack."
            )
        if isinstance(place, Owners) and (other := batch.other_owner(x, place)) is not None:
            raise UnsupportedError(
                f"the model returns a tensor of shape {list(x.shape)} whose row {other[0]} holds values of row "
                f"{other[1]}: the model takes the rows of some inputs in another order than those of others. Call the "
                "model once for each member, or use funclora.vmap over the stack."
            )
        if alone and place != Place(0, 1):
            raise UnsupportedError(
                f"the model returns a tensor of shape {list(x.shape)} for {batch.n} rows, whose first dimension does "
                "not hold the rows in order: the model reorders them, joins the members' results, or gives the same "
                "for all of them. Compute the loss outside of the model, from outputs with examples as their first "
                "dimension."
            )
        return plain if isinstance(x, RowTensor) else x

    try:
        out = tree_map(leave, function(*args, **kwargs))
        tree_map(strip, (args, kwargs))  # a cache that was passed in
        return out
    finally:
        scope.close()


def strip(x: Any, depth: int = 4) -> Any:
    """Make the tensors plain that an object keeps, such as a cache of keys and values.

    Args:
        x: any value; a tensor itself is returned as it is.
        depth: how many objects deep tensors are looked for.
    """
    if isinstance(x, (Tensor, nn.Module, type)) or not depth:
        return x
    items: Any = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in list(items):
        x[key] = rows_of(value)[0] if isinstance(value, RowTensor) else strip(value, depth - 1)
    fields = getattr(x, "__dict__", None)
    if isinstance(fields, dict) and type(x).__module__ != "builtins" and not callable(x):
        for key, value in list(fields.items()):
            if isinstance(value, RowTensor):
                fields[key] = rows_of(value)[0]
            else:
                strip(value, depth - 1)
    return x


def argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a module or a method, as far as they are known."""
    if isinstance(function, nn.Module):
        kind: Any = type(function)
        return tuple(_signature(kind).parameters)
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a module's forward, which callers read."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])

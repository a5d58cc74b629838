"""Where the rows enter a model and leave it."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from funclora._tracking.batch import Batch
from funclora._tracking.calls import Owner
from funclora._tracking.tensor import ForwardCall, RowTensor, rows_of
from funclora.errors import UnsupportedError


class Part(NamedTuple):
    """An output that holds a part for each member of a population, in order along a dimension."""

    value: Tensor
    dim: int


class Mixed:
    """An output that holds no part for each member of a population: any use of it raises `UnsupportedError`."""

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the error."""
        raise UnsupportedError(self._refusal)

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Mixed):
                x.refuse()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __neg__ = __invert__ = __abs__ = refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = refuse
    __matmul__ = __rmatmul__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = refuse


class Entrance:
    """Where a batch enters a model: the outermost module that is called."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.known: dict[bool, dict[Any, Owner]] = {False: {}, True: {}}  # by whether owners are kept apart
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
        batch: Batch | None = None,
    ) -> Any:
        """`function(*args, **kwargs)`; rows are tracked from here on, unless this is inside another tracked call."""
        if getattr(self.inside, "now", False):
            return function(*args, **kwargs)
        self.inside.now = True
        try:
            batch = batch or self.batch
            return with_rows(function, args, kwargs, batch, self.known[batch.apart], names=names)
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
) -> Any:
    """`function(*args, **kwargs)` on tracked inputs.

    Args:
        function: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        batch: how they hold the rows.
        known: results of earlier propagations.
        names: the names of its arguments.

    Returns:
        The outputs as they are; for the members of a population a `Part` or `Mixed` in the place of each tensor.
    """
    scope = ForwardCall(batch.n, known, apart=batch.apart)
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
        refusal = batch.refusal(x, place)
        if batch.apart:
            return Mixed(refusal) if refusal else Part(plain, place.dim)  # type: ignore[union-attr]
        if refusal:
            raise UnsupportedError(refusal)
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

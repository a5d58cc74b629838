"""Tensors that track which dimension holds the rows of the batch.

With a different adapter for every row, a layer must know which rows it gets. A shape does not prove that: an expert
may get as many tokens as there are rows. So the inputs of the model are `RowTensor`s, which track the dimension that
holds the rows. Each operation that keeps rows separate has a propagation, which returns their place in its result; the
result of any other operation is *lost*: the model may use it, but no adapter that differs by row can read it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._torch.functions import plain_tensors, undispatched, written
from funclora._tracking.propagation import (
    LostError,
    OpCall,
    Place,
    Places,
    Propagation,
    batch_norm,
    constant,
    number,
    propagations,
    question,
)  # fmt: skip
from funclora.errors import UnsupportedError


@dataclass(eq=False)
class ForwardCall:
    """One call of a model.

    Attributes:
        n: the number of rows.
        active: false after the call; its tensors are then like any other.
        known: results of earlier propagations, by the operation and everything that its propagation reads.
        spoilt: memory that rows were written to in a way that no `RowTensor` can track.
        taken: the tensors that `take` took.
        read: the operation that gave Python values of rows, "" if none did: numbers cannot be tracked.
    """

    n: int
    known: dict[Any, Place]
    active: bool = True
    spoilt: dict[int, Any] = field(default_factory=dict)
    read: str = ""
    taken: list[RowTensor] = field(default_factory=list)

    def lost(self, *tensors: Tensor) -> str:
        """What lost the rows of these tensors, other than the operations that made them; "" if nothing did."""
        if self.read:
            return self.read
        spoilt = self.spoilt and any(x.untyped_storage()._cdata in self.spoilt for x in tensors)
        return "a write in place" if spoilt else ""

    def take(self, x: Tensor | None) -> None:
        """Make a plain tensor that rows were written to a tensor of this call, so that its uses are lost too."""
        if type(x) is Tensor and not torch.compiler.is_compiling():
            x.__class__ = RowTensor
            self.enter_as(x, "a write in place")  # type: ignore[arg-type]
            self.taken.append(x)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the call, and make the taken tensors plain again."""
        self.active = False
        for x in self.taken:
            del x.scope, x.place
            x.__class__ = Tensor  # type: ignore[assignment]
        self.taken.clear()

    def enter_as(self, rows: RowTensor, place: Place | str) -> RowTensor:
        rows.scope = self
        rows.place = place
        return rows

    def enter(self, x: Tensor, place: Place | str) -> RowTensor:
        """The tensor with the place of its rows, or with the name of the operation that lost them."""
        return self.enter_as(x.as_subclass(RowTensor), place)


_streams: ContextVar[list[torch.Generator] | None] = ContextVar("funclora.streams", default=None)


@contextlib.contextmanager
def streams(generators: list[torch.Generator] | None) -> Iterator[None]:
    """Draw dropout from one generator for each member of a population, whose rows follow each other."""
    token = _streams.set(generators)
    try:
        yield
    finally:
        _streams.reset(token)


def dropped(x: Tensor, p: float, first_rows: Sequence[int], n: int) -> Tensor:
    """Dropout on `[members, *]`, of members whose rows begin at `first_rows` of n: each draws as in its own run."""
    generators = _streams.get()
    if generators is None:
        return F.dropout(x, p)
    keep = 1 - p
    by_member = n // len(generators)
    masks = [
        torch.empty_like(x[i]).bernoulli_(keep, generator=generators[row // by_member]).div_(keep)
        for i, row in enumerate(first_rows)
    ]
    return x * torch.stack(masks)


class RowTensor(torch.Tensor):
    """A tensor that tracks the place of the rows of the batch in it.

    Attributes:
        scope: the call that it belongs to.
        place: the place of the rows, or the name of the operation that lost them.
    """

    scope: ForwardCall
    place: Place | str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        constants = False
        for kind in kinds:
            if kind is not RowTensor and kind not in _PLAIN and not issubclass(kind, RowTensor):
                if not getattr(kind, "holds_no_rows", False):
                    return NotImplemented  # lets the lazy weight handle it
                constants = True
        kwargs = kwargs or {}
        propagation = propagations.get(func)
        if propagation is question:
            with plain_tensors():
                return func(*args, **kwargs)
        if func is F.dropout and _streams.get() is not None:
            return _dropout(*args, **kwargs)
        if propagation is None and isinstance(func, types.FunctionType) and func.__module__ != "torch.functional":
            return undispatched(func)(*args, **kwargs)  # Python code: each operation in it has its propagation
        if constants:  # their own class computes on plain tensors; the place of the rows is added here
            out = func(*map(_plain, args), **{name: _plain(x) for name, x in kwargs.items()})
            with plain_tensors():
                return _placed(func, propagation, args, kwargs, out)
        with plain_tensors():
            out = func(*args, **kwargs)
            if propagation is None or torch.compiler.is_compiling():
                return _placed(func, propagation, args, kwargs, out)
            if type(out) is not Tensor:
                if func in _MAY_RETURN_SELF and out is args[0]:
                    return out
                return _placed(func, propagation, args, kwargs, out)
            # The layers of a model repeat the same operations.
            key, scope = _looks(func, args, kwargs)
            if scope is None:
                return _placed(func, propagation, args, kwargs, out)
            place = scope.known.get(key)
            if place is not None and not (scope.spoilt or scope.read):
                if any(x is out for x in args):
                    return scope.enter(out, place)
                out.__class__ = RowTensor  # nothing else refers to it yet: no alias is needed
                return scope.enter_as(cast(RowTensor, out), place)
            placed = _placed(func, propagation, args, kwargs, out)
            if type(placed) is RowTensor and isinstance(placed.place, Place):
                scope.known[key] = placed.place
            return placed


_MAY_RETURN_SELF = frozenset((Tensor.to, Tensor.contiguous, Tensor.float, Tensor.type_as))
_NUMBERS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, type(...)))


def _looks(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ForwardCall | None]:
    """All arguments of an operation that its propagation may read, to compare, and the call whose rows they hold.

    The call is None if there are several, or if the arguments cannot be compared.
    """
    key: list[Any] = [func]
    scopes: list[ForwardCall] = []
    for value in args:
        _look(value, key, scopes)
    for name, value in kwargs.items():
        key.append(name)
        _look(value, key, scopes)
    looks = tuple(key)
    try:
        hash(looks)
    except TypeError:  # an array among the arguments, for example
        return looks, None
    return looks, scopes[0] if len(scopes) == 1 else None


def _look(value: Any, key: list[Any], scopes: list[ForwardCall]) -> None:
    kind = type(value)
    if kind is RowTensor and value.scope.active:
        if not scopes or scopes[0] is not value.scope:
            scopes.append(value.scope)
        key += (value.place, value.shape, value.dtype)
    elif kind in _NUMBERS:
        key += (kind, value)
    elif kind is tuple or kind is list:
        key += (kind, len(value))
        for part in value:
            _look(part, key, scopes)
    elif kind is slice:
        key.append(kind)
        for part in (value.start, value.stop, value.step):
            _look(part, key, scopes)
    elif isinstance(value, Tensor):
        key += (Tensor, value.shape, value.dtype)
    else:
        key += (kind, value)


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def rows_of(x: Tensor) -> tuple[Tensor, Place | str]:
    """The plain tensor, and the place of its rows, or the operation that lost them; "" if it never had any."""
    if not isinstance(x, RowTensor):
        return x, ""
    with plain_tensors():  # as_subclass could not be traced by torch.compile
        return x.view_as(x), (x.scope.lost(x) or x.place) if x.scope.active else ""


def _plain(x: Any) -> Any:
    return rows_of(x)[0] if isinstance(x, RowTensor) else x


def rows_first(x: Tensor, place: Place, n: int) -> Tensor:
    """A plain tensor with n rows as `[n, *]`: the positions of one row stay in the rows' place."""
    if place.inner == 0:  # one row, which is the complete tensor
        return x.unsqueeze(0)
    if place.inner != 1:
        x = x.unflatten(place.dim, (n, place.inner))
    return x.movedim(place.dim, 0) if place.dim else x


def rows_back(x: Tensor, place: Place) -> Tensor:
    """The inverse of `rows_first`."""
    if place.inner == 0:
        return x.squeeze(0)
    if place.dim:
        x = x.movedim(0, place.dim)
    return x if place.inner == 1 else x.flatten(place.dim, place.dim + 1)


def _dropout(input: RowTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with separate draws for each member of a population."""
    generators, x = _streams.get(), input
    if not training or p == 0 or generators is None or not input.scope.active:
        return input
    plain, place = rows_of(x)
    if not isinstance(place, Place):
        raise UnsupportedError(f"dropout with a seed for each member, on rows that {place} mixed.")
    n = input.scope.n
    rows = rows_first(plain, place, n).unflatten(0, (len(generators), -1))
    out = dropped(rows, p, range(0, n, n // len(generators)), n).flatten(0, 1)
    return input.scope.enter(rows_back(out, place), place)


def _placed(
    func: Callable[..., Any], propagation: Propagation | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Any:
    """The result of an operation, with the place of its rows. `__torch_function__` of subclasses is disabled here."""
    writes = written(func, args, kwargs)
    if not (writes or propagation is number or isinstance(out, (Tensor, tuple, list))):
        return out
    call = OpCall(args, kwargs, out)
    scope = call.scope
    if scope is None:
        return _kept(func, args, out)
    if propagation is number:
        scope.read = func.__name__
        return out
    if propagation is constant and not any(isinstance(x, RowTensor) for x in call.tensors if x is not call.x):
        return out
    places = _places(func, propagation, call)
    if propagation is batch_norm and isinstance(places, str):  # in training mode the statistics of all rows are kept
        writes = [x for x in call.tensors if x is call.arg(1, "running_mean") or x is call.arg(2, "running_var")]
        for x in writes:
            _note_write(scope, x, places)
    elif writes:
        for x in call.tensors:
            if any(x is target for target in writes):
                _note_write(scope, x, places)
        if not isinstance(out, Tensor) or any(out is target for target in writes):
            return out
    if isinstance(out, Tensor):
        return scope.enter(out, places)
    each = places if isinstance(places, tuple) and not isinstance(places, Place) else (places,) * len(out)
    parts = [scope.enter(x, place) if isinstance(x, Tensor) else x for x, place in zip(out, each, strict=True)]
    return parts if isinstance(out, list) else tuple(parts) if type(out) is tuple else type(out)(parts)


def _places(func: Callable[..., Any], propagation: Propagation | None, call: OpCall) -> Places:
    name = getattr(func, "__name__", str(func))
    cause: str = call.scope.lost(*call.tensors) if call.scope else ""
    if cause:
        return cause
    for x in call.tensors:
        if isinstance(x, RowTensor) and x.scope is call.scope and isinstance(x.place, str):
            return x.place  # lost before
        if isinstance(x, RowTensor) and x.scope is not call.scope and x.scope.active:
            return f"{name} of two models' rows"
    try:
        return name if propagation is None else _proven(propagation(call), call, name)
    except LostError:
        return name


def _proven(places: Places, call: OpCall, name: str) -> Places:
    """The places that a propagation returns; the operation's name instead of a place that does not fit the result."""

    def checked(place: Place | str | None, out: Any) -> Place | str | None:
        if isinstance(place, Place) and isinstance(out, Tensor):
            n = call.scope.n  # type: ignore[union-attr]
            fits = 0 <= place.dim < out.dim() and out.shape[place.dim] == n * place.inner
            return place if fits and place.inner else name
        return place

    if isinstance(places, tuple) and not isinstance(places, Place):
        return tuple(map(checked, places, call.out))
    if isinstance(call.out, (tuple, list)) and isinstance(places, Place):
        return tuple(checked(places, out) for out in call.out)
    return checked(places, call.out)


def _kept(func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> Any:
    """A tensor that is detached after its call, as recomputation in backward does, keeps its place."""
    if func in (Tensor.detach, torch.detach) and isinstance(args[0], RowTensor):
        return args[0].scope.enter(out, args[0].place)
    return out


def _note_write(scope: ForwardCall, x: Tensor, places: Places) -> None:
    """Mark everything that shares memory with x as lost, unless x already held rows in the same place."""
    if not (isinstance(x, RowTensor) and x.scope is scope and isinstance(places, Place) and x.place == places):
        scope.spoilt[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that its address is not used again
        for plain in (x, x._base):
            scope.take(plain)

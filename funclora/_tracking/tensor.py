"""Tensors that track who each of their positions belongs to.

With a different adapter for every row, a layer must know which rows it gets. A shape does not prove that: an expert
may get as many tokens as there are rows. So the inputs of the model are `RowTensor`s, which track the owner of each
position. Each operation that is known has a propagation, which says who its result belongs to; the result of any other
operation is *lost*: the model may use it, but no adapter that differs by row can read it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._torch.functions import plain_tensors, undispatched, written
from funclora._tracking import products
from funclora._tracking.adoption import Adopted
from funclora._tracking.calls import OpCall, Owner, Places
from funclora._tracking.owners import Lost, LostError, Owners, Place
from funclora._tracking.propagation import Propagation, constant, exported, number, propagations, question
from funclora.errors import UnsupportedError


@dataclass(eq=False)
class ForwardCall:
    """One call of a model.

    Attributes:
        n: the number of owners.
        active: false after the call; its tensors are then like any other.
        known: results of earlier propagations, by the operation and everything that its propagation reads.
        spoilt: memory that values of unknown owners were written to.
        adopted: memory without owners that values of known ones were written to.
        taken: the tensors that `take` took.
        apart: results that combine positions of several owners are lost.
        read: the operation that gave values to Python that may come back as a tensor, "" if none did.
    """

    n: int
    known: dict[Any, Owner]
    active: bool = True
    spoilt: dict[int, tuple[Any, str]] = field(default_factory=dict)
    adopted: dict[int, Adopted] = field(default_factory=dict)
    read: str = ""
    taken: list[RowTensor] = field(default_factory=list)
    apart: bool = False

    def lost(self, x: Tensor) -> str:
        """What lost the owners of a tensor, other than the operation that made it; "" if nothing did."""
        spoilt = self.spoilt.get(x.untyped_storage()._cdata) if self.spoilt else None
        return self.read or (spoilt[1] if spoilt else "")

    def refresh(self, x: Tensor) -> None:
        """Look up the owners of a tensor whose memory was written to through another one."""
        key, plain = x.untyped_storage()._cdata, type(x) is Tensor
        tracked = isinstance(x, RowTensor) and x.scope is self
        if key in self.spoilt:
            cause = self.spoilt[key][1]
            if plain:
                self.take(x, cause)
            elif tracked:
                self.enter_as(cast(RowTensor, x), cause)
        elif plain and key in self.adopted:
            self.take(x, self.adopted[key].owner_of(x, self.n) or lost_at("a view of memory that is written to"))

    def take(self, x: Tensor | None, place: Owner | str) -> None:
        """Make a plain tensor that values were written to a tensor of this call, until the call ends."""
        if type(x) is Tensor and not torch.compiler.is_compiling():
            x.__class__ = RowTensor
            self.enter_as(x, place)  # type: ignore[arg-type]
            self.taken.append(x)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the call, and make the taken tensors plain again."""
        self.active = False
        for x in self.taken:
            if type(x) is RowTensor:
                del x.scope, x.place
                x.__class__ = Tensor  # type: ignore[assignment]
        self.taken.clear()
        self.spoilt.clear()
        self.adopted.clear()

    def enter_as(self, rows: RowTensor, place: Owner | str) -> RowTensor:
        rows.scope = self
        rows.place = place
        return rows

    def enter(self, x: Tensor, place: Owner | str) -> RowTensor:
        """The tensor with its owners, or with the name of the operation that lost them."""
        return self.enter_as(x.as_subclass(RowTensor), place)


Streams = Sequence["torch.Generator | None"]
_streams: ContextVar[Streams | None] = ContextVar("funclora.streams", default=None)


@contextlib.contextmanager
def streams(generators: Streams | None) -> Iterator[None]:
    """Draw dropout from one generator for each owner; None for an owner whose positions nobody reads."""
    token = _streams.set(generators)
    try:
        yield
    finally:
        _streams.reset(token)


def streams_of_owners() -> Streams | None:
    """The generators of `streams`. The compiler, which cannot trace them, has none."""
    return None if torch.compiler.is_compiling() else _streams.get()


def dropped(x: Tensor, p: float, owners: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Dropout on `[m, count, *]`: each owner draws for its first positions as it would in a run of its own."""
    generators = streams_of_owners()
    if generators is None:
        return F.dropout(x, p)
    keep = 1 - p
    mask = torch.ones_like(x)
    for own, owner, count in zip(mask, owners, counts, strict=True):
        generator = generators[owner] if 0 <= owner < len(generators) else None
        if generator is not None:
            own[:count] = torch.empty_like(own[:count]).bernoulli_(keep, generator=generator).div_(keep)
    return x * mask


class RowTensor(torch.Tensor):
    """A tensor that tracks who each of its positions belongs to.

    Attributes:
        scope: the call that it belongs to.
        place: the owners, or the name of the operation that lost them.
    """

    scope: ForwardCall
    place: Owner | str

    def __format__(self, spec: str) -> str:
        return format(_plain(self), spec)  # names made of numbers: f"expert_{index}"

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
        if func is F.dropout and streams_of_owners() is not None:
            return _dropout(*args, **kwargs)
        if propagation is None and isinstance(func, types.FunctionType) and func.__module__ != "torch.functional":
            return undispatched(func)(*args, **kwargs)  # Python code: each operation in it has its propagation
        if func in _PYTHON and torch.compiler.is_compiling():  # which would dispatch in vain to its arguments
            constants = True
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
            looks = _looks(func, args, kwargs)
            if looks is None:
                return _placed(func, propagation, args, kwargs, out)
            key, scope = looks
            place = scope.known.get(key)
            if place is None or scope.spoilt or scope.read or scope.adopted:
                return _placed(func, propagation, args, kwargs, out, key)
            for x in args:
                if x is out:
                    return scope.enter(out, place)
            out.__class__ = RowTensor  # nothing else refers to it yet: no alias is needed
            return scope.enter_as(cast(RowTensor, out), place)


# Functions of torch that are written in Python.
_PYTHON = frozenset(func for func in propagations if isinstance(func, types.FunctionType))
_MAY_RETURN_SELF = frozenset((Tensor.to, Tensor.contiguous, Tensor.float, Tensor.type_as))
_NUMBERS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, type(...)))


def _looks(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], ForwardCall] | None:
    """All arguments of an operation that its propagation may read, to compare, and the call whose rows they hold.

    None if there are several calls, or if the arguments cannot be compared.
    """
    key: list[Any] = [func]
    scopes: list[ForwardCall] = []
    _look(args, key, scopes)
    if kwargs:
        key += kwargs
        _look(kwargs.values(), key, scopes)
    looks = tuple(key)
    try:
        hash(looks)
    except TypeError:  # an array among the arguments, for example
        return None
    return (looks, scopes[0]) if len(scopes) == 1 else None


def _look(values: Iterable[Any], key: list[Any], scopes: list[ForwardCall]) -> None:
    for value in values:
        kind = type(value)
        if kind is RowTensor and value.scope.active:
            if value.scope not in scopes:
                scopes.append(value.scope)
            key += (value.place, value.shape, value.dtype)  # owners are compared by identity
        elif kind in _NUMBERS:
            key += (kind, value)
        elif kind is tuple or kind is list:
            key += (kind, len(value))
            _look(value, key, scopes)
        elif kind is slice:
            key.append(kind)
            _look((value.start, value.stop, value.step), key, scopes)
        elif isinstance(value, Tensor):
            key += (Tensor, value.shape, value.dtype)
        else:
            key += (kind, value)


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def rows_of(x: Tensor) -> tuple[Tensor, Owner | str]:
    """The plain tensor, and its owners, or the operation that lost them; "" if it never had any."""
    if not isinstance(x, RowTensor):
        return x, ""
    with plain_tensors():  # as_subclass could not be traced by torch.compile
        return x.view_as(x), (x.scope.lost(x) or x.place) if x.scope.active else ""


def _plain(x: Any) -> Any:
    return rows_of(x)[0] if isinstance(x, RowTensor) else x


def rows_first(x: Tensor, place: Owner, n: int) -> Tensor:
    """A plain tensor as `[n, *]`, one owner after the other: their positions stay in the owners' place.

    Where no `Place` says the owners, every position along which they vary comes first, `[positions, *]`.
    """
    if isinstance(place, Owners):
        varying = place.varying()
        return x.movedim(varying, tuple(range(len(varying)))).flatten(0, len(varying) - 1) if varying else x[None]
    if place.inner == 0:  # one row, which is the complete tensor
        return x.unsqueeze(0)
    if place.inner != 1:
        x = x.unflatten(place.dim, (n, place.inner))
    return x.movedim(place.dim, 0) if place.dim else x


def rows_back(x: Tensor, place: Owner) -> Tensor:
    """The inverse of `rows_first`, in the order of memory that a dense operation gives."""
    if isinstance(place, Owners):
        varying = place.varying()
        if not varying:
            return x[0]
        x = x.unflatten(0, [place.index.shape[d] for d in varying])
        return x.movedim(tuple(range(len(varying))), varying).contiguous()
    if place.inner == 0:
        return x.squeeze(0)
    if place.dim:
        x = x.movedim(0, place.dim)
    x = x if place.inner == 1 else x.flatten(place.dim, place.dim + 1)
    return x.contiguous() if place.dim else x


def refuse_seeds() -> None:
    """Raise `UnsupportedError` if each member draws dropout by its own generator, where rows are not in order."""
    if streams_of_owners() is not None:
        raise seeds_error()


def seeds_error() -> UnsupportedError:
    return UnsupportedError(
        "dropout with a seed for each member needs to know whose positions it drops, and the model sorts or mixes them "
        "here, as experts do. Leave out the seeds, or set the dropout to 0."
    )


def _dropout(input: RowTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`F.dropout` with separate draws for each owner."""
    generators = _streams.get()
    if not training or p == 0 or generators is None or not input.scope.active:
        return input
    plain, place = rows_of(input)
    if isinstance(place, str):
        raise seeds_error()
    n = input.scope.n
    rows = rows_first(plain, place, n)
    if isinstance(place, Place):
        out = dropped(rows.unsqueeze(1) if place.inner == 1 else rows, p, range(n), [max(place.inner, 1)] * n)
        out = out.reshape(rows.shape)
    else:
        order = place.index.flatten().argsort(stable=True)
        parts = [part[None] for part in rows[order].split(_counts(place, n))]
        drawn = [dropped(part, p, [owner], [part.shape[1]])[0] for owner, part in enumerate(parts, -1)]
        out = torch.cat(drawn)[order.argsort()]
    return input.scope.enter(rows_back(out, place), place)


def _counts(owners: Owners, n: int) -> list[int]:
    """The number of positions of nobody, and of each owner."""
    counts: list[int] = (owners.index.flatten() + 1).bincount(minlength=n + 1).tolist()
    return counts


def _placed(
    func: Callable[..., Any],
    propagation: Propagation | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    key: Any = None,
) -> Any:
    """The result of an operation, with its owners. `__torch_function__` of subclasses is disabled here.

    Args:
        func: the operation.
        propagation: its propagation.
        args: its arguments.
        kwargs: its keyword arguments.
        out: its result.
        key: where to remember the owners of a result that depend on no values.
    """
    writes = written(func, args, kwargs)
    reads = propagation is number or propagation is exported
    if not (writes or reads or isinstance(out, (Tensor, tuple, list))):
        return out
    call = OpCall(args, kwargs, out)
    scope = call.scope
    if scope is None:
        return _kept(func, args, out)
    if reads:
        if propagation is exported or (isinstance(out, list) and call.x.is_floating_point()):
            scope.read = lost_at(func.__name__)
        return out
    if propagation is constant and not any(isinstance(x, RowTensor) for x in call.tensors if x is not call.x):
        return out
    if scope.adopted or scope.spoilt:
        for x in call.tensors:
            scope.refresh(x)
    places = _places(func, propagation, call)
    if propagation is products.batch_norm and isinstance(
        places, str
    ):  # in training mode the statistics of all rows are kept
        writes = [x for x in call.tensors if x is call.arg(1, "running_mean") or x is call.arg(2, "running_var")]
        for x in writes:
            _note_write(scope, x, places)
    elif writes:
        for x in call.tensors:
            if any(x is target for target in writes):
                _note_write(scope, x, places)
        if not isinstance(out, Tensor) or any(out is target for target in writes):
            return out
    if places is None:
        return out
    if isinstance(out, Tensor):
        if key is not None and not call.by_value and (isinstance(places, Place) or _lasts(places)):
            scope.known[key] = cast(Owner, places)
        return scope.enter(out, cast(Any, places))
    each = places if type(places) is tuple else (places,) * len(out)
    parts = [
        scope.enter(x, place) if isinstance(x, Tensor) and place is not None else x
        for x, place in zip(out, each, strict=True)
    ]
    return parts if isinstance(out, list) else tuple(parts) if type(out) is tuple else type(out)(parts)


def _lasts(places: Places) -> bool:
    return isinstance(places, Owners) and places.lasting


def _places(func: Callable[..., Any], propagation: Propagation | None, call: OpCall) -> Places:
    assert call.scope is not None
    if read := cast(str, call.scope.read):
        return read
    for x in call.tensors:
        if isinstance(x, RowTensor) and x.scope is not call.scope and x.scope.active:
            return lost_at(f"{_name(func)} of two models' rows")
    try:
        if propagation is None:
            call.owned()
            raise LostError
        return _proven(propagation(call), call, func)
    except LostError as error:
        return error.cause or lost_at(_name(func))


def _name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def lost_at(operation: str) -> Lost:
    """The loss of owners in an operation that the model calls now."""
    where = ""
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            frame = frame.f_back  # type: ignore[assignment]
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
    return Lost.at(operation, where)


_NOT_THE_MODEL = tuple(
    f"{Path(file).resolve().parents[up]}{os.sep}" for file, up in ((torch.__file__, 0), (__file__, 1))
)


def _proven(places: Places, call: OpCall, func: Callable[..., Any]) -> Places:
    """The owners that a propagation returns; the operation's name instead of owners that do not fit the result."""

    def checked(place: Owner | str | None, out: Any) -> Owner | str | None:
        if isinstance(place, Place) and isinstance(out, Tensor):
            fits = 0 <= place.dim < out.dim() and out.shape[place.dim] == call.n * place.inner
            return place if fits and place.inner else lost_at(_name(func))
        if isinstance(place, Owners) and isinstance(out, Tensor):
            shape = place.index.shape
            fits = len(shape) == out.dim() and all(a in (1, b) for a, b in zip(shape, out.shape, strict=True))
            return place if fits else lost_at(_name(func))
        return place

    if type(places) is tuple:
        return tuple(checked(cast(Any, place), out) for place, out in zip(places, call.out, strict=True))
    if isinstance(call.out, (tuple, list)) and not isinstance(places, str):
        return tuple(checked(cast(Any, places), out) for out in call.out)
    # A write without a result has owners of its target.
    return checked(cast(Any, places), call.x if call.out is None else call.out)


def _kept(func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> Any:
    """A tensor that is detached after its call, as recomputation in backward does, keeps its owners."""
    if func in (Tensor.detach, torch.detach) and isinstance(args[0], RowTensor):
        return args[0].scope.enter(out, args[0].place)
    return out


def _note_write(scope: ForwardCall, x: Tensor, places: Places) -> None:
    """Follow a write to x: its owners stay, or memory that belonged to nobody gets owners; else its memory is lost."""
    tracked = isinstance(x, RowTensor) and x.scope is scope
    if places is None or (tracked and not isinstance(places, str) and x.place == places):  # type: ignore[attr-defined]
        return
    storage = x.untyped_storage()
    if isinstance(places, (Place, Owners)) and not torch.compiler.is_compiling():
        adopted = Adopted.of(x, places, scope.adopted.get(storage._cdata))
        if adopted is not None and (not tracked or isinstance(x.place, Owners)):  # type: ignore[attr-defined]
            scope.adopted[storage._cdata] = adopted
            for each in (x, x._base):
                if type(each) is Tensor:
                    scope.take(each, adopted.owner_of(each, scope.n) or lost_at("a write in place"))
            if tracked:
                scope.enter_as(cast(RowTensor, x), places)
            return
    cause = places if isinstance(places, str) and places else lost_at("a write in place")
    scope.spoilt[storage._cdata] = storage, cause  # held, so that its address is not used again
    for plain in (x, x._base):
        scope.take(plain, cause)

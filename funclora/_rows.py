"""Rows with an identity: which part of a tensor belongs to which row of the batch.

With another adapter for every row, a layer must know which rows it was given. A shape does not prove that: an expert
may be given as many tokens as there are rows. So the inputs of the model are `RowTensor`s, which remember along which
dimension the rows lie. An operation that is known to keep rows apart says where they lie in its result; the result of
any other is *lost*: the model may use it, but no adapter that differs by row can read it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funclora.errors import UnsupportedError


class Place(NamedTuple):
    """The rows of the batch lie along `dim`, one after the other, `inner` positions each."""

    dim: int
    inner: int


class LostError(Exception):
    """An operation mixes rows, or nothing is known about it."""


@dataclass(eq=False)
class Scope:
    """One call of a model.

    Attributes:
        n: the number of rows.
        active: false when the call is over; its tensors are then like any other.
        known: what earlier operations found, by the operation and all that its rule looks at.
        spoilt: memory that rows were written to in a way that no `RowTensor` can tell.
        taken: the tensors that `take` took.
        read: the operation by which Python learnt values of rows, "" if none did: numbers cannot be followed.
    """

    n: int
    known: dict[Any, Place]
    active: bool = True
    spoilt: dict[int, Any] = field(default_factory=dict)
    read: str = ""
    taken: list[RowTensor] = field(default_factory=list)

    def lost(self, *tensors: Tensor) -> str:
        """What lost the rows of these tensors other than the operations that made them; "" if nothing did."""
        if self.read:
            return self.read
        spoilt = self.spoilt and any(x.untyped_storage()._cdata in self.spoilt for x in tensors)
        return "a write in place" if spoilt else ""

    def take(self, x: Tensor | None) -> None:
        """Make a plain tensor that rows were written to one of this call, so that what is made of it is lost too."""
        if type(x) is Tensor and not torch.compiler.is_compiling():
            x.__class__ = RowTensor
            self.enter_as(x, "a write in place")  # type: ignore[arg-type]
            self.taken.append(x)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the call, and give back the tensors that were taken."""
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
    """Draw dropout from one generator for each member of a population, whose rows lie one after the other."""
    token = _streams.set(generators)
    try:
        yield
    finally:
        _streams.reset(token)


def dropped(x: Tensor, p: float, first_rows: Sequence[int], n: int) -> Tensor:
    """Dropout on `[members, *]`, of members whose rows begin at `first_rows` of n: the draws of a run alone."""
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
    """A tensor that knows where the rows of the batch lie in it.

    Attributes:
        scope: the call that it belongs to.
        place: where the rows lie, or the name of the operation that lost them.
    """

    scope: Scope
    place: Place | str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for kind in kinds:
            if kind not in _PLAIN and not issubclass(kind, RowTensor):
                return NotImplemented  # it is a lazy weight's turn
        kwargs = kwargs or {}
        if func is F.dropout and _streams.get() is not None:
            return _dropout(*args, **kwargs)
        rule = _rules.get(func)
        if rule is None and isinstance(func, types.FunctionType) and func.__module__ != "torch.functional":
            return undispatched(func)(*args, **kwargs)  # Python code: its operations shall say
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if rule is _question:
                return out
            if rule is None or type(out) is not Tensor or torch.compiler.is_compiling():
                return _placed(func, rule, args, kwargs, out)
            # The layers of a model ask the same questions again and again.
            scopes: list[Scope] = []
            key = (func, _looks((args, *kwargs.items()), scopes))
            scope = scopes[0] if len(scopes) == 1 and _is_hashable(key) else None
            if scope is not None and not (scope.spoilt or scope.read) and scope.known.get(key) is not None:
                return scope.enter(out, scope.known[key])
            placed = _placed(func, rule, args, kwargs, out)
            if scope is not None and type(placed) is RowTensor and isinstance(placed.place, Place):
                scope.known[key] = placed.place
            return placed


def _looks(value: Any, scopes: list[Scope]) -> Any:
    """All of an argument that a rule may look at, to be compared; the scopes of its rows are collected."""
    kind = type(value)
    if kind is RowTensor and value.scope.active:
        if not scopes or scopes[0] is not value.scope:
            scopes.append(value.scope)
        return len(scopes), value.place, value.shape, value.dtype
    if kind in (tuple, list):
        return kind, tuple([_looks(part, scopes) for part in value])
    if kind is slice:
        return kind, value.start, value.stop, value.step
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return kind, value


def _is_hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:  # an array among the arguments, for example
        return False
    return True


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Call:
    """An operation that was carried out, on at least one `RowTensor`."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.tensors: list[Tensor] = []  # the arguments that are tensors, those in lists too
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, (list, tuple)):
                self.tensors += [x for x in value if isinstance(x, Tensor)]
        self.scope = next((x.scope for x in self.tensors if isinstance(x, RowTensor) and x.scope.active), None)

    def arg(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its position or one of its names."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def x(self) -> Tensor:
        """The first argument."""
        first: Tensor = self.arg(0, "input", "self")
        return first

    def rows(self) -> list[tuple[Tensor, Place]]:
        """The arguments with rows, and where these lie."""
        return [(x, x.place) for x in self.tensors if isinstance(x, RowTensor) and x.scope is self.scope]  # type: ignore[misc]

    def has_rows(self, x: Any) -> bool:
        return isinstance(x, RowTensor) and x.scope is self.scope

    def place(self) -> Place:
        """Where the rows lie in the first argument, the only one that has any."""
        if [x for x, _ in self.rows() if x is not self.x]:
            raise LostError
        return self.place_of(self.x)

    def place_of(self, x: Tensor) -> Place:
        if not self.has_rows(x):
            raise LostError
        return x.place  # type: ignore[attr-defined, no-any-return]


# A rule gives the place of the rows in a result, None for a result that holds nothing of them, or one for each part.
Places = Place | tuple[Place | str | None, ...] | str | None
RowRule = Callable[[Call], Places]


def rows_of(x: Tensor) -> tuple[Tensor, Place | str]:
    """The plain tensor, and the place of its rows, or the operation that lost them; "" if it never had any."""
    if not isinstance(x, RowTensor):
        return x, ""
    with torch._C.DisableTorchFunctionSubclass():  # not as_subclass, which cannot be traced back
        return x.view_as(x), (x.scope.lost(x) or x.place) if x.scope.active else ""


def rows_first(x: Tensor, place: Place, n: int) -> Tensor:
    """A plain tensor with n rows as `[n, *]`: the positions of one row stay in the rows' place."""
    if place.inner == 0:  # one row, which is the whole tensor
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
    """`F.dropout` with draws of its own for each member of a population."""
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


def is_elementwise(func: Callable[..., Any]) -> bool:
    """Whether an operation broadcasts its arguments against each other and does nothing else with them."""
    return _rules.get(func) is _aligned


class Entrance:
    """Where a batch of n rows enters a model: the outermost of its modules that is called.

    The tensors among the inputs of that call whose first dimension is n hold the rows, or those where it is
    n·repeats, each row that many times in succession. Masks are left as they are: they are aligned with the rows by
    position, and models compute with them in ways that cannot be followed.
    """

    def __init__(self, n: int, repeats: int) -> None:
        self.n = n
        self.repeats = repeats
        self.known: dict[Any, Place] = {}
        self.inside = threading.local()

    def guard(self, module: nn.Module) -> None:
        """Let the calls of a module of a bound model, which belongs to one caller, pass through here."""
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
        """`function(*args, **kwargs)`; the rows go in and come out here, unless this is inside another call."""
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
    """`function(*args, **kwargs)` on inputs that know their rows; `alone`: every output must have them in front."""
    scope = Scope(n, known)
    entered: list[Tensor] = []

    def enter(x: Any) -> Any:
        if isinstance(x, RowTensor) and x.scope.n == n:  # recomputed in backward: what the forward pass knew
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
                f"the model returns a tensor of shape {list(x.shape)} for {n} rows, which do not lie along the "
                "first dimension: it joins the members' results, or is the same for all of them. Compute the loss "
                "outside of the model, from outputs with examples as their first dimension."
            )
        return plain if isinstance(x, RowTensor) else x

    try:
        return tree_map(leave, function(*args, **kwargs))
    finally:
        scope.close()


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """The signature of a module's forward, which callers look at."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def undispatched(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function of torch that does not hand itself to its arguments' subclass, but runs its body."""
    names = {name: (lambda *_: False) for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    found = [kwargs.get("out")]
    writes = _writers.get(func, False) if torch.compiler.is_compiling() else _writes(getattr(func, "__name__", ""))
    if writes or kwargs.get("inplace"):
        found += [*args, *kwargs.values()][:1]
    elif isinstance(func, _OPS) and _is_mutable(func):
        found += [*args, *kwargs.values()]
    each = (x for some in found for x in (some if isinstance(some, (list, tuple)) else (some,)))
    return [x for x in each if isinstance(x, Tensor)]


_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _is_mutable(op: Any) -> bool:
    """Whether an operation of `torch.ops` may write to its arguments."""
    if isinstance(op, torch._ops.OpOverload):
        return bool(op._schema.is_mutable)
    return any(_is_mutable(getattr(op, name)) for name in op.overloads() if "out" not in name)


def _writes(name: str) -> bool:
    """Whether torch's function of that name writes to its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    dunder = name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__")
    return in_place or dunder or name in ("__setitem__", "__set__")


# For the compiler, which cannot look at the names of functions.
_writers = {
    function: True
    for space in (vars(torch), {name: getattr(Tensor, name) for name in dir(Tensor)}, vars(F))
    for name, function in space.items()
    if callable(function) and _writes(name) and not name.startswith(("_foreach", "__init"))
}


def _placed(
    func: Callable[..., Any], rule: RowRule | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Any:
    """The result of an operation, with the place of the rows in it. Torch functions of subclasses are off here."""
    writes = written(func, args, kwargs)
    if not (writes or rule is _number or isinstance(out, (Tensor, tuple, list))):
        return out
    call = Call(args, kwargs, out)
    scope = call.scope
    if scope is None:
        return _kept(func, args, out)
    if rule is _number:
        scope.read = func.__name__
        return out
    if rule is _constant and not any(isinstance(x, RowTensor) for x in call.tensors if x is not call.x):
        return out
    places = _places(func, rule, call)
    if rule is _batch_norm and isinstance(places, str):  # in training mode the statistics of all rows are kept
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
        return scope.enter(out, places)  # type: ignore[arg-type]
    each = places if isinstance(places, tuple) and not isinstance(places, Place) else (places,) * len(out)
    parts = [scope.enter(x, place) if isinstance(x, Tensor) else x for x, place in zip(out, each, strict=True)]  # type: ignore[arg-type]
    return parts if isinstance(out, list) else tuple(parts) if type(out) is tuple else type(out)(parts)


def _places(func: Callable[..., Any], rule: RowRule | None, call: Call) -> Places:
    name = getattr(func, "__name__", str(func))
    if call.scope and (cause := call.scope.lost(*call.tensors)):
        return cause
    for x in call.tensors:
        if isinstance(x, RowTensor) and x.scope is call.scope and isinstance(x.place, str):
            return x.place  # lost before
        if isinstance(x, RowTensor) and x.scope is not call.scope and x.scope.active:
            return f"{name} of two models' rows"
    try:
        return name if rule is None else _proven(rule(call), call, name)
    except LostError:
        return name


def _proven(places: Places, call: Call, name: str) -> Places:
    """The places that a rule gives, those that do not fit the results' shapes replaced by the operation's name."""

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
    """A tensor detached when its call is over, as recomputation in backward does, remembers its place."""
    if func in (Tensor.detach, torch.detach) and isinstance(args[0], RowTensor):
        return args[0].scope.enter(out, args[0].place)
    return out


def _note_write(scope: Scope, x: Tensor, places: Places) -> None:
    """Whatever shares memory with x is lost from now on, unless x held rows in that very place."""
    if not (isinstance(x, RowTensor) and x.scope is scope and isinstance(places, Place) and x.place == places):
        scope.spoilt[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that its address is not used again
        for plain in (x, x._base):
            scope.take(plain)


# --- rules -----------------------------------------------------------------------------------------------------


def _question(call: Call) -> Places:
    """Of the shape, the dtype, the device."""
    return None


def _constant(call: Call) -> Places:
    """A new tensor that holds no values of its first argument."""
    raise LostError  # it may hold those of another


def _number(call: Call) -> Places:
    """Values as Python's own: nobody knows what becomes of them."""
    raise LostError


def _aligned(call: Call) -> Place:
    """Elementwise operations, which broadcast: the rows lie in the same place, counted from the last dimension."""
    found = {(place.dim - x.dim(), place.inner) for x, place in call.rows()}
    if len(found) != 1 or not isinstance(call.out, Tensor):
        raise LostError
    ((dim, inner),) = found
    if call.out.dim() + dim < 0 or call.out.shape[dim] != call.scope.n * inner:  # type: ignore[union-attr]
        raise LostError
    return Place(call.out.dim() + dim, inner)


def _own(call: Call) -> Place:
    """Operations that keep the shape of the first argument, the only one whose values with rows they take."""
    return call.place_of(call.x)


def _reshaped(call: Call) -> Places:
    """view, reshape, flatten: the rows begin where as many elements lie before them, and may take more positions."""
    place, old, new, n = call.place_of(call.x), call.x.shape, call.out.shape, call.scope.n  # type: ignore[union-attr]
    before, passed = math.prod(old[: place.dim]), 1
    if math.prod(old) == math.prod(new):
        for i, size in enumerate(new):
            if passed == before and size and size % n == 0:
                return Place(i, size // n)
            passed *= size
    raise LostError


def _viewed(func: Callable[..., Any]) -> RowRule:
    """Views that move, cut or add dimensions: seen on strides, with a stride along the rows alone."""

    def rule(call: Call) -> Places:
        place = (
            call.place_of(call.x) if func is Tensor.expand_as else call.place()
        )  # expand_as looks at the shape alone
        size = call.x.shape[place.dim]
        strides = [0] * call.x.dim()
        strides[place.dim] = 1
        like = torch.empty_strided(call.x.shape, strides, device="meta")
        kwargs = {name: value for name, value in call.kwargs.items() if value is not call.x}
        out = func(like, *call.args[1:], **kwargs)

        def found(view: Tensor) -> Place | str:
            dims = [i for i, stride in enumerate(view.stride()) if stride == 1 and view.shape[i] == size]
            return Place(dims[0], place.inner) if len(dims) == 1 else func.__name__

        return found(out) if isinstance(out, Tensor) else tuple(found(view) for view in out)

    return rule


_sliced = _viewed(Tensor.__getitem__)


def _indexed(call: Call) -> Places:
    """x[index]: slices of rows are views; a table without rows may be looked up by rows of indices."""
    index = call.args[1]
    if call.has_rows(index) and not call.has_rows(call.x) and index.dtype in (torch.int64, torch.int32):
        return call.place_of(index)
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, bool) or not isinstance(part, (int, slice, type(None), type(Ellipsis))):
            raise LostError  # it gathers
    return _sliced(call)


def _joined(*, new_dim: bool) -> RowRule:
    """cat and stack, along another dimension than the rows'."""

    def rule(call: Call) -> Places:
        places = {place for _, place in call.rows()}
        dim = call.arg(1, "dim", "axis", default=0) % call.out.dim()
        place = places.pop()
        at = place.dim + (new_dim and dim <= place.dim)
        if places or dim == at or call.out.shape[at] != call.scope.n * place.inner:  # type: ignore[union-attr]
            raise LostError
        return Place(at, place.inner)

    return rule


def _along(position: int, default: Any = None) -> RowRule:
    """Operations along some dimensions (all, if none is given), which must not be that of the rows."""

    def rule(call: Call) -> Places:
        dims = call.arg(position, "dim", "axis", default=default)
        place, n_dims = call.place(), call.x.dim()
        if dims is None or isinstance(dims, (bool, Tensor)):
            raise LostError
        along = {d % n_dims for d in (dims if isinstance(dims, Sequence) else (dims,))}
        out = call.out if isinstance(call.out, Tensor) else call.out[0]
        if place.dim in along or not along:
            raise LostError
        if out.dim() == n_dims and out.shape[place.dim] == call.x.shape[place.dim]:
            return place
        if out.dim() == n_dims - len(along):
            return Place(place.dim - sum(d < place.dim for d in along), place.inner)
        raise LostError

    return rule


def _extreme(call: Call) -> Places:
    """max and min: along a dimension, or elementwise of two tensors."""
    return _aligned(call) if isinstance(call.arg(1, "dim", "axis", "other"), Tensor) else _along(1)(call)


def _last(call: Call) -> Places:
    """layer_norm, rms_norm: along the last dimensions, as many as the normalised shape has."""
    place = call.place()
    if place.dim >= call.x.dim() - len(call.arg(1, "normalized_shape")):
        raise LostError
    return place


def _linear(call: Call) -> Places:
    place = call.place()
    if place.dim == call.x.dim() - 1:
        raise LostError
    return place


def _product(first: int) -> RowRule:
    """matmul and its kind: rows along batch dimensions, or along the outer dimension of one factor alone."""

    def rule(call: Call) -> Places:
        left = call.arg(first, "mat1", "batch1", *(() if first else ("input", "self")))
        right = call.arg(first + 1, "other", "mat2", "batch2")
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() < 2 or right.dim() < 2:
            raise LostError
        place = _aligned(call)
        end = place.dim - call.out.dim()
        if end == -2 and (call.has_rows(right) or not call.has_rows(left)):
            raise LostError
        if end == -1 and (call.has_rows(left) or not call.has_rows(right)):
            raise LostError
        return place

    return rule


def _einsum(call: Call) -> Places:
    equation = call.args[0]
    operands = list(call.args[1]) if isinstance(call.args[1], (list, tuple)) else list(call.args[1:])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise LostError
    terms, result = equation.replace(" ", "").split("->")
    letters = {(term[call.place_of(x).dim], call.place_of(x).inner)
               for term, x in zip(terms.split(","), operands, strict=True) if call.has_rows(x)}  # fmt: skip
    if len(letters) != 1:
        raise LostError
    ((letter, inner),) = letters
    if letter not in result or any(term.count(letter) > 1 for term in (*terms.split(","), result)):
        raise LostError
    return Place(result.index(letter), inner)


def _attention(call: Call) -> Places:
    """scaled_dot_product_attention: rows along batch dimensions."""
    place = _aligned(call)
    if place.dim >= call.out.dim() - 2:
        raise LostError
    return place


def _alone(call: Call) -> Places:
    """embedding, prelu: rows of the first argument, which keep their place."""
    return call.place()


def _batched(spatial: int) -> RowRule:
    """Convolutions, pooling: the first dimension of a batch."""

    def rule(call: Call) -> Places:
        out = call.out if isinstance(call.out, Tensor) else call.out[0]
        place = call.place()
        if place.dim or (spatial and out.dim() != spatial + 2):
            raise LostError
        return place

    return rule


def _images(call: Call) -> Places:
    """Operations on `[*batch, channels, height, width]`."""
    place = call.place()
    if place.dim >= call.x.dim() - 3:
        raise LostError
    return place


def _batch_norm(call: Call) -> Places:
    if call.arg(5, "training", "use_input_stats", default=True):
        raise LostError  # its statistics are those of all rows
    return _batched(0)(call)


def _padded(call: Call) -> Places:
    place = call.place()
    if place.dim >= call.x.dim() - len(call.arg(1, "pad")) // 2:
        raise LostError
    return place


def _gathered(call: Call) -> Places:
    """gather along another dimension than the rows', by an index that has them in the same place, or none."""
    place, index = call.place_of(call.x), call.arg(2, "index")
    if call.arg(1, "dim") % call.x.dim() == place.dim or (call.has_rows(index) and call.place_of(index) != place):
        raise LostError
    return place


def _selected(call: Call) -> Places:
    """index_select: one index for all rows."""
    place = call.place()
    if call.arg(1, "dim") % call.x.dim() == place.dim:
        raise LostError
    return place


def _repeated(call: Call) -> Places:
    """repeat_interleave: along another dimension, or each position of a row several times."""
    place, times, dim = call.place(), call.arg(1, "repeats"), call.arg(2, "dim")
    if dim is None or not isinstance(times, int):
        raise LostError
    return Place(place.dim, place.inner * times) if dim % call.x.dim() == place.dim else place


def _triangle(call: Call) -> Places:
    place = call.place()
    if place.dim >= call.x.dim() - 2:
        raise LostError
    return place


_rules: dict[Callable[..., Any], RowRule] = {}
_matmul = _product(0)


def _know(rule: Any, names: str, *spaces: Any, by_function: bool = False) -> None:
    """Enter a rule for the functions of those names, wherever torch has them, their in-place forms too."""
    for name in names.split():
        for space in spaces or (torch, Tensor, F, torch.special, torch.linalg):
            for form in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
                function: Any = getattr(space, form, None)
                if hasattr(function, "__set__"):  # a property
                    function = function.__get__
                if by_function and form == f"{name}_":
                    continue  # it changes the shape of its argument: whatever knows that is too old
                if form == f"__r{name}__" and rule is _matmul:
                    continue  # its factors are the other way round
                if callable(function):
                    _rules[function] = rule(function) if by_function else rule


_know(_question, """shape dtype device ndim layout names requires_grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse
    is_quantized is_nested is_mkldnn itemsize nbytes is_leaf grad_fn size dim numel nelement ndimension stride
    is_floating_point is_complex element_size get_device is_contiguous storage_offset is_tensor untyped_storage
    data_ptr is_same_size __len__ __hash__ retain_grad register_hook __repr__ _version output_nr""")  # fmt: skip
_know(_constant, """empty_like full_like ones_like zeros_like rand_like randn_like randint_like
    new_empty new_full new_ones new_tensor new_zeros""")  # fmt: skip
_know(_aligned, """abs absolute acos acosh add addcdiv addcmul alpha_dropout and angle asin asinh atan atan2 atanh
    bernoulli bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max clamp_min clip
    clone contiguous copy copysign cos cosh deg2rad detach div divide double dropout elu eq erf erfc erfinv exp exp2
    expm1 fill float floor floor_divide floordiv fmod frac ge gelu greater greater_equal gt half hardsigmoid
    hardswish hardtanh heaviside hypot int invert isfinite isinf isnan isneginf isposinf ldexp le leaky_relu lerp
    less less_equal lgamma log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor logit
    logsigmoid long lt masked_fill maximum minimum mish mod mul multiply nan_to_num ne neg negative not_equal or
    positive pow pos rad2deg reciprocal relu relu6 remainder round rsqrt rsub selu sgn short sigmoid sign silu
    sin sinc sinh softplus softsign sqrt square sub subtract tan tanh tanhshrink threshold true_divide truediv
    trunc where xlogy xor zero""")  # fmt: skip
_know(_own, "to type type_as")
_know(_alone, "prelu")
_know(_reshaped, "view reshape flatten unflatten ravel view_as reshape_as")
_know(_viewed, """transpose swapaxes swapdims permute movedim moveaxis unsqueeze squeeze expand expand_as T mT H mH
    select narrow chunk split tensor_split unbind unsafe_chunk unsafe_split split_with_sizes t""",
    by_function=True)  # fmt: skip
_know(_indexed, "getitem")
_know(_joined(new_dim=False), "cat concat concatenate")
_know(_joined(new_dim=True), "stack")
_know(_along(1), """sum mean amax amin prod std var any all logsumexp argmax argmin softmax log_softmax
    softmin cumsum cumprod cummax cummin count_nonzero median nanmean nansum""")  # fmt: skip
_know(_extreme, "max min")
_know(_along(1, default=-1), "sort argsort glu")
_know(_along(2, default=-1), "topk kthvalue")
_know(_along(2), "norm vector_norm")
_know(_along(2, default=1), "normalize", F)
_know(_last, "layer_norm rms_norm")
_know(_linear, "linear", F)
_know(_matmul, "matmul mm bmm")
_know(_product(1), "addmm baddbmm")
_know(_einsum, "einsum")
_know(_attention, "scaled_dot_product_attention", F)
_know(_alone, "embedding", F)
for _n in (1, 2, 3):
    _know(_batched(_n), f"conv{_n}d conv_transpose{_n}d max_pool{_n}d avg_pool{_n}d adaptive_avg_pool{_n}d "
          f"adaptive_max_pool{_n}d dropout{_n}d", F)  # fmt: skip
_know(_batched(0), "group_norm interpolate", F)
_know(_images, "pixel_shuffle pixel_unshuffle unfold", F)
_know(_batch_norm, "batch_norm instance_norm", F)
_know(_padded, "pad", F)
_know(_gathered, "gather")
_know(_selected, "index_select")
_know(_repeated, "repeat_interleave")
_know(_triangle, "tril triu")
_numbers = """item tolist numpy is_nonzero equal allclose __bool__ __int__ __float__ __complex__ __index__ __contains__
    __array__ __dlpack__"""
for _space in (Tensor, torch):
    for _name in _numbers.split():
        if callable(getattr(_space, _name, None)):
            _rules[getattr(_space, _name)] = _number

"""The effect of torch's operations on the rows of a batch: for each, which dimension of its result holds the rows.

`propagations` maps an operation to its propagation: a function of an `OpCall` that returns the place of the rows, or
raises `LostError`. An operation that is not in it mixes rows, or is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import IDENTITY, INDEX, NEW, QUESTIONS, RESHAPES, STRIDES, VIEWS


class Place(NamedTuple):
    """The rows of the batch are along `dim`, one after the other, `inner` positions each."""

    dim: int
    inner: int


class LostError(Exception):
    """An operation mixes rows, or is unknown."""


class OpCall:
    """A completed operation on at least one `RowTensor` (this module uses only its attributes)."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.out = out
        self.tensors: list[Tensor] = []  # the arguments that are tensors, also in lists
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, (list, tuple)):
                self.tensors += [x for x in value if isinstance(x, Tensor)]
        self.scope = next((scope for x in self.tensors if (scope := getattr(x, "scope", None)) and scope.active), None)

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
        """The arguments with rows, and the places of the rows."""
        return [(x, cast(Any, x).place) for x in self.tensors if self.has_rows(x)]

    def has_rows(self, x: Any) -> bool:
        return getattr(x, "scope", None) is self.scope

    def place(self) -> Place:
        """The place of the rows in the first argument, the only one with rows."""
        if [x for x, _ in self.rows() if x is not self.x]:
            raise LostError
        return self.place_of(self.x)

    def place_of(self, x: Tensor) -> Place:
        if not self.has_rows(x):
            raise LostError
        return x.place  # type: ignore[attr-defined, no-any-return]


# A propagation returns the place of the rows in a result, None for a result without rows, or one for each part.
Places = Place | tuple[Place | str | None, ...] | str | None
Propagation = Callable[[OpCall], Places]


def question(call: OpCall) -> Places:
    """Operations that read only the shape, the dtype or the device."""
    return None


def constant(call: OpCall) -> Places:
    """A new tensor that holds no values of its first argument."""
    raise LostError  # it may hold values of another argument


def number(call: OpCall) -> Places:
    """Values as Python objects: their use cannot be tracked."""
    raise LostError


def _aligned(call: OpCall) -> Place:
    """Elementwise operations, which broadcast: the rows keep their place, counted from the last dimension."""
    found = {(place.dim - x.dim(), place.inner) for x, place in call.rows()}
    if len(found) != 1 or not isinstance(call.out, Tensor):
        raise LostError
    ((dim, inner),) = found
    if call.out.dim() + dim < 0 or call.out.shape[dim] != call.scope.n * inner:  # type: ignore[union-attr]
        raise LostError
    return Place(call.out.dim() + dim, inner)


def _own(call: OpCall) -> Place:
    """Operations that keep the shape of the first argument, the only one from which they read values with rows."""
    return call.place_of(call.x)


def _reshaped(call: OpCall) -> Places:
    """view, reshape, flatten: the same number of elements precedes the rows; a row may take more positions."""
    place, old, new, n = call.place_of(call.x), call.x.shape, call.out.shape, call.scope.n  # type: ignore[union-attr]
    before, passed = math.prod(old[: place.dim]), 1
    if math.prod(old) == math.prod(new):
        for i, size in enumerate(new):
            if passed == before and size and size % n == 0:
                return Place(i, size // n)
            passed *= size
    raise LostError


def _viewed(func: Callable[..., Any]) -> Propagation:
    """Views that move, cut or add dimensions: found on a tensor with stride 0 in all dimensions without rows."""

    def propagation(call: OpCall) -> Places:
        place = call.place_of(call.x) if func is Tensor.expand_as else call.place()  # expand_as reads only the shape
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

    return propagation


_sliced = _viewed(Tensor.__getitem__)


def _indexed(call: OpCall) -> Places:
    """x[index]: slices of rows are views; rows of indices may index a tensor without rows."""
    index = call.args[1]
    if call.has_rows(index) and not call.has_rows(call.x) and index.dtype in (torch.int64, torch.int32):
        return call.place_of(index)
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, bool) or not isinstance(part, (int, slice, type(None), type(Ellipsis))):
            raise LostError  # it gathers rows
    return _sliced(call)


def _joined(*, new_dim: bool) -> Propagation:
    """cat and stack, along a dimension that does not hold the rows."""

    def propagation(call: OpCall) -> Places:
        places = {place for _, place in call.rows()}
        dim = call.arg(1, "dim", "axis", default=0) % call.out.dim()
        place = places.pop()
        at = place.dim + (new_dim and dim <= place.dim)
        if places or dim == at or call.out.shape[at] != call.scope.n * place.inner:  # type: ignore[union-attr]
            raise LostError
        return Place(at, place.inner)

    return propagation


def _along(position: int, default: Any = None) -> Propagation:
    """Operations along some dimensions (all, if none is given), which must not hold the rows."""

    def propagation(call: OpCall) -> Places:
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

    return propagation


def _extreme(call: OpCall) -> Places:
    """max and min: along a dimension, or elementwise of two tensors."""
    return _aligned(call) if isinstance(call.arg(1, "dim", "axis", "other"), Tensor) else _along(1)(call)


def _last(call: OpCall) -> Places:
    """layer_norm, rms_norm: along the last dimensions, which the normalised shape counts."""
    place = call.place()
    if place.dim >= call.x.dim() - len(call.arg(1, "normalized_shape")):
        raise LostError
    return place


def _linear(call: OpCall) -> Places:
    place = call.place()
    if place.dim == call.x.dim() - 1:
        raise LostError
    return place


def _product(first: int) -> Propagation:
    """matmul and similar: rows along batch dimensions, or along the outer dimension of only one factor."""

    def propagation(call: OpCall) -> Places:
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

    return propagation


def _einsum(call: OpCall) -> Places:
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


def _attention(call: OpCall) -> Places:
    """scaled_dot_product_attention: rows along batch dimensions."""
    place = _aligned(call)
    if place.dim >= call.out.dim() - 2:
        raise LostError
    return place


def _alone(call: OpCall) -> Places:
    """embedding, prelu: rows of the first argument, which keep their place."""
    return call.place()


def _batched(spatial: int) -> Propagation:
    """Convolutions, pooling: the first dimension of a batch."""

    def propagation(call: OpCall) -> Places:
        out = call.out if isinstance(call.out, Tensor) else call.out[0]
        place = call.place()
        if place.dim or (spatial and out.dim() != spatial + 2):
            raise LostError
        return place

    return propagation


def _images(call: OpCall) -> Places:
    """Operations on `[*batch, channels, height, width]`."""
    place = call.place()
    if place.dim >= call.x.dim() - 3:
        raise LostError
    return place


def batch_norm(call: OpCall) -> Places:
    if call.arg(5, "training", "use_input_stats", default=True):
        raise LostError  # its statistics are over all rows
    return _batched(0)(call)


def _padded(call: OpCall) -> Places:
    place = call.place()
    if place.dim >= call.x.dim() - len(call.arg(1, "pad")) // 2:
        raise LostError
    return place


def _gathered(call: OpCall) -> Places:
    """gather along a dimension that does not hold the rows; the index has them in the same place, or has no rows."""
    place, index = call.place_of(call.x), call.arg(2, "index")
    if call.arg(1, "dim") % call.x.dim() == place.dim or (call.has_rows(index) and call.place_of(index) != place):
        raise LostError
    return place


def _selected(call: OpCall) -> Places:
    """index_select: one index for all rows."""
    place = call.place()
    if call.arg(1, "dim") % call.x.dim() == place.dim:
        raise LostError
    return place


def _repeated(call: OpCall) -> Places:
    """repeat_interleave: along a dimension without rows, or each position of a row several times."""
    place, times, dim = call.place(), call.arg(1, "repeats"), call.arg(2, "dim")
    if dim is None or not isinstance(times, int):
        raise LostError
    return Place(place.dim, place.inner * times) if dim % call.x.dim() == place.dim else place


def _triangle(call: OpCall) -> Places:
    place = call.place()
    if place.dim >= call.x.dim() - 2:
        raise LostError
    return place


propagations: dict[Callable[..., Any], Propagation] = {}
_matmul = _product(0)


def _know(propagation: Propagation, names: str, *spaces: Any) -> None:
    """Register a propagation for the functions of those names in all of torch, and for their in-place forms."""
    for name in names.split():
        for space in spaces or (torch, Tensor, F, torch.special, torch.linalg):
            for form in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
                function: Any = getattr(space, form, None)
                if hasattr(function, "__set__"):  # a property
                    function = function.__get__
                if form == f"__r{name}__" and propagation is _matmul:
                    continue  # its factors are in reverse order
                if callable(function):
                    propagations[function] = propagation


propagations |= dict.fromkeys(QUESTIONS | STRIDES | IDENTITY, question)
propagations |= dict.fromkeys(NEW, constant)
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
propagations |= dict.fromkeys(RESHAPES, _reshaped)
propagations |= {view: _viewed(view) for view in VIEWS}
propagations[INDEX] = _indexed
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
_know(batch_norm, "batch_norm instance_norm", F)
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
            propagations[getattr(_space, _name)] = number


def is_elementwise(func: Callable[..., Any]) -> bool:
    """Whether an operation only broadcasts its arguments against each other."""
    return propagations.get(func) is _aligned

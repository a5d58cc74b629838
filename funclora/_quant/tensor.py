"""A weight of few bits that behaves like the dense one.

`Quantized` replaces a dense weight in a params dict. An operation that is linear in its other input (a linear layer, a
matrix product, a convolution) unpacks the weight, uses it and frees it, and does so again in backward: a dense weight
exists for one layer at a time. An embedding unpacks only the rows that it reads. Any other operation gets the dense
weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
import torch.nn.functional as F
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor
from torch.utils import _pytree as pytree

from funclora._quant.packing import Parts
from funclora._quant.products import left_product, through
from funclora._quant.source import UNPACKED_DTYPES, Op, Source, Step
from funclora._torch.contractions import contractions
from funclora._torch.functions import (
    CASTS,
    INDEX,
    NEW,
    QUESTIONS,
    RESHAPES,
    SAME,
    STRIDES,
    VIEWS,
    NoFormError,
    in_transform,
    named,
    placeholder,
    plain_tensors,
    table,
    written,
)
from funclora._torch.memory import place_of
from funclora._torch.views import View, seen
from funclora.errors import PurityError, UnsupportedError


class Quantized(torch.Tensor):
    """A weight stored in few bits, a constant. Made by `quantize`, and by `base_params` of a quantised model.

    Its shape, dtype and device equal the dense weight's; it is unpacked to that dtype and computed in it. Inputs of
    another dtype are cast to it, and the result is cast back, as in the modules of bitsandbytes. `nbytes` is the size
    of the packed weight.

    Attributes:
        source: how it is unpacked.
        parts: the tensors from which it is unpacked.

    Examples:
        >>> import funclora as fl
        >>> params = fl.quantize({"weight": torch.ones(64, 128)}, ["weight"], "nf4")
        >>> params["weight"], params["weight"].nbytes
        (Quantized([64, 128], torch.float32, nf4), 4672)
        >>> params["weight"].dequantize()[0, :3]
        tensor([1., 1., 1.])
    """

    holds_no_rows = True  # the same for all rows: a tracked tensor lets it compute, and adds the place of the rows
    source: Source
    parts: Parts
    _held: list[Tensor] | None = None  # the dense weight, while `held` keeps it

    @staticmethod
    def of(source: Source, parts: Parts) -> Quantized:
        """The weight that `source` unpacks from `parts`."""
        device = getattr(parts[0], "device", torch.device("cpu"))  # transforms fill trees with non-tensors
        weight = source.viewed(placeholder(source.stored, source.dtype, device)).as_subclass(Quantized)
        weight.source = source
        weight.parts = parts
        return weight

    def dequantize(self) -> Tensor:
        """The dense weight."""
        return self.source.dense(self.parts)

    @property
    def is_exact(self) -> bool:
        """Whether `dequantize` gives the very weight that was packed: it is divided among processes, not quantised."""
        return self.source.packing.is_exact

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that the packed weight takes."""
        return sum(part.nbytes for part in self.parts)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        packing = self.source.packing
        kind = getattr(packing, "kind", type(packing).__name__.lower())
        return f"Quantized({list(self.shape)}, {self.source.dtype}, {kind})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        return _clone(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Quantized.of, (self.source, self.parts)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asks_type = func is Tensor.type and len(args) == 1 and not kwargs
        is_cast = func in CASTS and not asks_type
        is_view = func in VIEWS or func in RESHAPES or func == INDEX
        if (is_cast or is_view) and torch.compiler.is_compiling():  # the tracer supports none that is made inside
            return func(*_mapped_tree(plain_weight, args), **_mapped_tree(plain_weight, kwargs))
        if is_cast:
            return _cast(func, *args, **kwargs)
        if asks_type or func in QUESTIONS or func in STRIDES or func in NEW or func in _OF_PLACEHOLDER:
            with plain_tensors():
                return func(*args, **kwargs)
        if any(kind is not Quantized and kind not in _PLAIN for kind in types):
            return NotImplemented  # lets a lazy weight, or a tensor that tracks its rows, handle it
        if func in _OWN:
            return _OWN[func](*args, **kwargs)
        if is_view and isinstance(args[0], Quantized) and _is_static((*args[1:], *kwargs.values())):
            return _viewed(func, *args, **kwargs)
        with contextlib.suppress(NoFormError):
            if func in _operations:
                return _operations[func](*args, **kwargs)
        with contextlib.suppress(NoFormError):
            if func in contractions:
                return contractions[func](Quantized, *args, **kwargs)
        if any(isinstance(x, Quantized) for x in written(func, args, kwargs)):
            raise PurityError(
                f"{getattr(func, '__name__', func)} would write to a quantised weight, which is a constant. Compute "
                "the new value from its dequantize(), or leave it out of the targets of quantize."
            )
        return func(*_mapped_tree(plain_weight, args), **_mapped_tree(plain_weight, kwargs))


def place_of_weight(weight: Tensor) -> tuple[object, ...] | None:
    """As `place_of`; for a quantised weight, the places of its parts, and None for a view of it."""
    if not isinstance(weight, Quantized):
        return place_of(weight)
    places = tuple(map(place_of, weight.parts))
    return None if weight.source.steps or None in places else places


def plain_weight(x: Any) -> Any:
    """The dense weight of a quantised one; any other value unchanged."""
    if not isinstance(x, Quantized):
        return x
    if x._held is None:
        return x.dequantize()
    if not x._held:
        x._held.append(x.dequantize())
    return x._held[0]


def held(x: Any) -> Any:
    """The weight for several uses in sequence, unpacked only for the first one. Do not keep it longer."""
    if not isinstance(x, Quantized):
        return x
    weight = Quantized.of(x.source, x.parts)
    weight._held = []
    return weight


def _mapped_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    return pytree.tree_map(function, tree, is_leaf=lambda x: isinstance(x, Quantized))


# A quantised weight is a node, so that transforms (torch.func.grad over params, for example) reach its parts: they
# would wrap the placeholder.
def _flatten(weight: Quantized) -> tuple[list[Any], Source]:
    return list(weight.parts), weight.source


def _unflatten(source: Source, parts: Iterable[Any]) -> Quantized:
    return Quantized.of(source, tuple(parts))


pytree.register_pytree_node(
    Quantized,
    _flatten,
    lambda parts, source: _unflatten(source, parts),
    serialized_type_name="funclora.Quantized",
    flatten_with_keys_fn=lambda weight: (
        [(pytree.SequenceKey(i), part) for i, part in enumerate(weight.parts)],
        weight.source,
    ),
)
optree.register_pytree_node(Quantized, _flatten, _unflatten, namespace=GLOBAL_NAMESPACE)  # type: ignore[arg-type]


def _product(op: Op, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    """`op(x, weight) + bias`, computed in the weight's dtype and returned in x's; under autocast, both in its dtype."""
    if not isinstance(weight, Quantized) or not isinstance(x, Tensor) or isinstance(x, Quantized) or hasattr(x, "rule"):
        raise NoFormError
    kind, source = weight.device.type, weight.source
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    if autocast:
        source = source._replace(dtype=torch.get_autocast_dtype(kind))
    x_ = x.to(source.dtype)
    if torch.compiler.is_compiling():  # the tracer supports no such function, and decides itself what to keep
        y: Tensor = op(x_, source.dense(weight.parts))
    else:
        dense = weight._held[0].to(source.dtype) if weight._held else None
        y = through(x_, op, source, dense, *weight.parts)
    if bias is not None:
        y = y + bias.to(source.dtype)
    return y if autocast else y.to(x.dtype)


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    return _product(F.linear, input, weight, bias)


def _matmul(input: Any, other: Any) -> Tensor:
    if isinstance(input, Quantized):
        return _product(left_product, other, input)
    return _product(torch.matmul, input, other)


def _mm(input: Any, mat2: Any) -> Tensor:
    return _matmul(input, mat2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if (beta, alpha) != (1, 1) or input.dim() != 1:
        raise NoFormError
    return _product(torch.matmul, mat1, mat2, input)


def _conv(conv: Callable[..., Tensor], spatial: int) -> Callable[..., Tensor]:
    def convolved(input: Tensor, weight: Any, bias: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        def op(x: Tensor, weight: Tensor) -> Tensor:
            return conv(x, weight, None, *args, **options)

        return _product(op, input, weight, None if bias is None else bias.reshape(-1, *(1 for _ in range(spatial))))

    return convolved


def _grouped_mm(grouped: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multiplied(mat_a: Tensor, mat_b: Any, *, offs: Tensor | None = None, bias: None = None,
                   out_dtype: None = None) -> Tensor:  # fmt: skip
        if (bias, out_dtype) != (None, None):
            raise NoFormError
        return _product(lambda x, weight: grouped(x, weight, offs=offs), mat_a, mat_b)

    return multiplied


def _embedding(
    input: Tensor,
    weight: Quantized,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    source = weight.source
    if max_norm is not None or source.steps or in_transform() or source.dtype not in UNPACKED_DTYPES:
        raise NoFormError
    rows = source.packing.rows(weight.parts, source.stored, input, source.dtype)
    if rows is None:
        raise NoFormError
    return rows


_operations: dict[Callable[..., Any], Callable[..., Tensor]] = table(
    linear=_linear,
    matmul=_matmul,
    mm=_mm,
    addmm=_addmm,
    embedding=_embedding,
    conv=_conv,
    conv_transpose=_conv,
    grouped_mm=_grouped_mm,
)


def _viewed(func: Callable[..., Any], weight: Quantized, *args: Any, **kwargs: Any) -> Any:
    """A view of the dense weight, or several, applied when the weight is unpacked."""
    source = weight.source
    views: Any = None if source.steps else seen(func, source.stored, args, kwargs)
    with plain_tensors():
        out = func(weight, *args, **kwargs)  # of the placeholder
    if isinstance(out, Tensor):
        return _part(weight, views, (func, args, tuple(kwargs.items()), None))
    parts = views or [None] * len(out)
    return tuple(_part(weight, view, (func, args, tuple(kwargs.items()), i)) for i, view in enumerate(parts))


def _part(weight: Quantized, view: View | None, step: Step) -> Quantized:
    """One view; for a view of rows, only these are unpacked, if rows are stored separately."""
    source, parts, stored = weight.source, weight.parts, weight.source.stored
    dims = tuple(range(len(stored)))
    if view is not None and view.is_whole(stored):
        return weight
    if view is not None and view.dims in (dims, dims[1:]) and view.lengths[1:] == stored[1:]:
        found = source.packing.narrowed(parts, stored, view.starts[0], view.lengths[0])
        if found is not None:
            rest = stored[1:] if view.dims == dims[1:] else (view.lengths[0], *stored[1:])
            return Quantized.of(Source(found[0], torch.Size(rest), source.dtype), found[1])
    return Quantized.of(source._replace(steps=(*source.steps, step)), parts)


def _is_static(args: Any) -> bool:
    """Whether arguments of a view are numbers, not tensors."""
    parts = args if isinstance(args, (tuple, list)) else (args,)
    return all(_is_static(x) if isinstance(x, (tuple, list)) else x is None or isinstance(x, (int, slice)) or x is ...
               for x in parts)  # fmt: skip


def _cast(func: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
    """A cast of a quantised weight to another dtype or device, or of a tensor to a quantised weight's."""
    args, kwargs = _mapped_tree(_empty, args), _mapped_tree(_empty, kwargs)
    if not isinstance(x, Quantized):
        return func(x, *args, **kwargs)
    like = func(_empty(x), *args, **kwargs)
    if not like.is_floating_point():
        return func(x.dequantize(), *args, **kwargs)
    if (like.dtype, like.device) == (x.source.dtype, x.parts[0].device):
        return x
    return Quantized.of(x.source._replace(dtype=like.dtype), tuple(part.to(like.device) for part in x.parts))


def _empty(x: Any) -> Any:
    return torch.empty(0, dtype=x.source.dtype, device=x.parts[0].device) if isinstance(x, Quantized) else x


def _clone(x: Quantized, *, memory_format: torch.memory_format = torch.preserve_format) -> Quantized:
    return Quantized.of(x.source, tuple(part.clone() for part in x.parts))


def _same(x: Quantized, *args: Any, **kwargs: Any) -> Quantized:
    return x


def _requires_grad_(x: Quantized, requires_grad: bool = True) -> Quantized:
    if requires_grad:
        raise UnsupportedError("a quantised weight is a constant and cannot require a gradient.")
    return x


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
# The operations that the placeholder answers itself.
_OF_PLACEHOLDER = named("requires_grad")
_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(named("clone"), _clone),
    Tensor.requires_grad_: _requires_grad_,
    Tensor.data_ptr: lambda x: x.parts[0].data_ptr(),
    Tensor.untyped_storage: lambda x: x.parts[0].untyped_storage(),
}

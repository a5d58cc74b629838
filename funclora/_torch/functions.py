"""torch's functions as data: which only query a tensor, which write, which are linear in a weight; and placeholders.

A placeholder represents another tensor: a shape, a dtype and a device over storage that holds only one NaN. A subclass
of `torch.Tensor` made from one handles operations in `__torch_function__`. An operation that bypasses it gives NaN,
never another wrong value.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._python_dispatch import _disable_current_modes


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape, dtype and device that stores one element: NaN."""
    if not torch.compiler.is_compiling() and _len_torch_dispatch_stack():
        with _disable_current_modes():  # FakeTensorMode would make a subclass of torch's, which cannot change class
            return torch.full((1,) * len(shape), float("nan"), dtype=dtype, device=device).expand(shape)
    return torch.full((1,) * len(shape), float("nan"), dtype=dtype, device=device).expand(shape)


def named(names: str) -> frozenset[Callable[..., Any]]:
    """The functions of these names in all places where this version of torch has them; for properties the getter."""
    spaces: tuple[Any, ...] = (torch, Tensor, F, torch.linalg)
    found = [getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name)]
    return frozenset(filter(callable, (getattr(x, "__get__", x) if hasattr(x, "__set__") else x for x in found)))


# Queries about a tensor's kind. A placeholder answers them.
QUESTIONS = named("""shape dtype device ndim layout names grad is_cuda is_cpu is_meta is_mps is_xpu is_sparse is_leaf
    is_quantized is_nested is_mkldnn itemsize nbytes _backward_hooks size dim numel nelement ndimension is_complex
    is_floating_point element_size get_device __len__ __hash__ is_inference is_signed is_conj is_neg has_names
    is_tensor is_same_size _base _is_view""")
# Queries about its order in memory.
STRIDES = named("stride is_contiguous storage_offset")
# Queries about its identity: its memory, its place in a graph.
IDENTITY = named("""requires_grad requires_grad_ grad_fn untyped_storage data_ptr retain_grad register_hook __repr__
    _version output_nr""")
# New tensors of its kind, which hold none of its values.
NEW = named("""empty_like full_like ones_like zeros_like rand_like randn_like randint_like new_empty new_full new_ones
    new_tensor new_zeros""")
# Its values in another dtype, or on another device. `Tensor.type` is a query too.
CASTS = named("to type type_as cpu cuda float half bfloat16 double")
# Its values unchanged. The result of `clone` can be written to.
SAME = named("contiguous detach data clone")
# A part of it, or its dimensions in another order.
VIEWS = named("""T mT H mH t adjoint transpose swapaxes swapdims permute movedim moveaxis unsqueeze squeeze expand
    expand_as select narrow chunk split tensor_split hsplit vsplit unbind unsafe_chunk unsafe_split split_with_sizes""")
# Its elements in the same order, in another shape.
RESHAPES = named("view reshape flatten unflatten ravel view_as reshape_as")
INDEX = Tensor.__getitem__


@functools.cache
def undispatched(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function of torch that runs its body instead of dispatching to its arguments' subclass."""
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


# For the compiler, which cannot read the names of functions.
_writers = {
    function: True
    for space in (vars(torch), {name: getattr(Tensor, name) for name in dir(Tensor)}, vars(F))
    for name, function in space.items()
    if callable(function) and _writes(name) and not name.startswith(("_foreach", "__init"))
}


@contextlib.contextmanager
def no_gradients() -> Iterator[None]:
    """Disables reverse- and forward-mode differentiation in this block."""
    with torch.no_grad(), _set_fwd_grad_enabled(False):
        yield


# Code in `with plain_tensors():` treats tensors of every subclass as plain ones. torch's own subclasses use the same
# function, which is private since torch 1.13.
plain_tensors = torch._C.DisableTorchFunctionSubclass


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Keeps products in their own dtype in this block. There is no autocast on the meta device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def is_mapped(*tensors: Tensor) -> bool:
    """True inside a transform of `torch.func` over one of the tensors."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def without_gradient(tensor: Tensor) -> Tensor:
    """The values that `torch.func.grad` differentiates at."""
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_transform() -> bool:
    """True inside a transform of `torch.func` over any argument: ordinary autograd does not work there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def vmapped_once() -> bool:
    """True inside one `torch.func.vmap` and no other transform."""
    level = torch._C._functorch.peek_interpreter_stack()
    return level is not None and level.key() == TransformType.Vmap and level.level() == 1


def of_all_mapped(
    function: Callable[[list[Tensor]], tuple[Tensor, ...]], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Inside one `torch.func.vmap`: a function of what it maps, all at once, as `torch.library.register_vmap` calls it.

    Args:
        function: takes and returns tensors `[n, *]`, with the mapped dimension first.
        tensors: its arguments as the mapped function sees them, `[*]`.
    """
    mapping: Any = retrieve_current_functorch_interpreter()
    n, level = mapping.batch_size(), mapping.level()
    with mapping.lower():
        each = [torch._C._functorch._unwrap_batched(x, level) for x in tensors]
        outs = function([x.expand(n, *x.shape) if d is None else x.movedim(d, 0) if d else x for x, d in each])
    return tuple(torch._C._functorch._add_batch_dim(x, 0, level) for x in outs)


def is_differentiated() -> bool:
    """True if reverse or forward mode records the computation."""
    return torch.is_grad_enabled() or is_forward_mode()


def is_forward_mode() -> bool:
    """True if forward mode records the computation."""
    return forward_ad._current_level >= 0


def overwriting() -> Callable[..., Tensor]:
    """`op(x, ...)`, in place if no autograd, transform, mode or tracer can see it; x must be a temporary of the caller.

    New memory for every result would be a large part of the cost of a step.
    """
    watched = torch.is_grad_enabled() or is_watched()

    def over(op: Callable[..., Tensor], x: Tensor, *rest: Any, **options: float) -> Tensor:
        return op(x, *rest, **options) if watched or type(x) is not Tensor else op(x, *rest, **options, out=x)

    return over


def is_watched(*tensors: Tensor) -> bool:
    """Whether autograd, a transform, a mode or a tracer sees an operation on these tensors."""
    return (
        (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or is_forward_mode()
        or torch.compiler.is_compiling()
        or in_transform()
        or _len_torch_function_stack() > 0
        or _len_torch_dispatch_stack() > 0
    )


def has_values(tensor: Tensor) -> bool:
    """False for tensors that only have a shape, and inside a transform, where values cannot be read."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor) or is_mapped(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of a tensor: a DTensor, whose module is slow to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class NoFormError(Exception):
    """This call of an operation has no form without the dense weight."""


CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

H = TypeVar("H")


def table(
    *,
    linear: H,
    matmul: H,
    mm: H,
    addmm: H,
    embedding: H,
    conv: Callable[[Callable[..., Tensor], int], H],
    conv_transpose: Callable[[Callable[..., Tensor], int], H],
    grouped_mm: Callable[[Callable[..., Tensor]], H],
) -> dict[Callable[..., Any], H]:
    """Every operation that is linear in a weight, with the function that handles it.

    Args:
        linear: the function for `F.linear`.
        matmul: for `torch.matmul` and `@`.
        mm: for `torch.mm` and `torch.bmm`, whose arguments have other names.
        addmm: for `torch.addmm`.
        embedding: for `F.embedding`.
        conv: `(F.conv2d, 2)` -> the function.
        conv_transpose: the same for transposed convolutions.
        grouped_mm: the same for the products of experts.
    """
    found: dict[Callable[..., Any], H] = {
        F.linear: linear,
        F.embedding: embedding,
        torch.addmm: addmm,
        Tensor.addmm: addmm,
    }
    found |= dict.fromkeys((torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__), matmul)
    found |= dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), mm)
    for spatial, op in CONVS.items():
        found[op] = conv(op, spatial)
    for spatial, transposed in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), start=1):
        found[transposed] = conv_transpose(transposed, spatial)
    for name in ("grouped_mm", "_grouped_mm"):  # the public one is new in torch 2.10
        for space in (F, torch):
            if grouped := getattr(space, name, None):
                found[grouped] = grouped_mm(grouped)
    return found

"""The effect of torch's operations on the owners of positions.

`propagations` maps an operation to its propagation: a function of an `OpCall` that returns the owners of the result, or
raises `LostError`. An operation that is not in it is unknown: nobody knows who its result belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._torch.functions import IDENTITY, INDEX, NEW, QUESTIONS, RESHAPES, STRIDES, VIEWS
from funclora._tracking import products, structure, writes
from funclora._tracking.calls import OpCall, Places
from funclora._tracking.owners import LostError

Propagation = Callable[[OpCall], Places]


def question(call: OpCall) -> Places:
    """Operations that read only the shape, the dtype or the device."""
    return None


def constant(call: OpCall) -> Places:
    """A new tensor that holds no values of its first argument."""
    raise LostError  # it may hold values of another argument


def number(call: OpCall) -> Places:
    """Values as Python numbers: what the model decides by them does not move positions."""
    return None


def exported(call: OpCall) -> Places:
    """Values that may come back as a tensor: nobody knows in which order."""
    raise LostError


def _where(call: OpCall) -> Places:
    return structure.nonzero(call) if isinstance(call.out, (tuple, list)) else products.aligned(call)


propagations: dict[Callable[..., Any], Propagation] = {}
_matmul = products.product(0)


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
_know(products.aligned, """abs absolute acos acosh add addcdiv addcmul alpha_dropout and angle asin asinh atan atan2
    atanh bernoulli bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max clamp_min
    clip clone conj contiguous copy copysign cos cosh deg2rad detach div divide double dropout elu eq erf erfc erfinv
    exp exp2 expm1 fill float floor floor_divide floordiv fmod frac ge gelu greater greater_equal gt half hardshrink
    hardsigmoid hardswish hardtanh heaviside hypot imag int invert isfinite isinf isnan isneginf isposinf ldexp le
    leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logical_and logical_not logical_or
    logical_xor logit logsigmoid long lt masked_fill maximum minimum mish mod mul multiply nan_to_num ne neg negative
    not_equal or polar positive pow pos rad2deg real reciprocal relu relu6 remainder round rsqrt rsub selu sgn short
    sigmoid sign silu sin sinc sinh softplus softsign sqrt square sub subtract tan tanh tanhshrink threshold true_divide
    truediv trunc xlogy xor zero""")  # fmt: skip
_know(products.own, "to type type_as tril triu")
_know(products.within(0), "prelu bucketize")
_know(_where, "where")
propagations |= dict.fromkeys(RESHAPES, structure.reshape)
propagations |= {view: structure.view(view) for view in VIEWS}
propagations |= {view: structure.view(view) for view in (Tensor.unfold, torch.broadcast_to, Tensor.broadcast_to)}
_know(structure.view(torch.diagonal), "diagonal", torch, Tensor)
propagations[INDEX] = structure.indexed
_know(structure.strided, "as_strided", torch, Tensor)
for _reordering in (torch.flip, Tensor.flip, torch.roll, Tensor.roll):
    propagations[_reordering] = structure.reorder(_reordering)
_know(structure.repeat, "repeat tile")
_know(structure.repeat_interleave, "repeat_interleave")
_know(structure.select, "index_select")
_know(structure.gather, "gather take_along_dim")
_know(structure.masked_select, "masked_select")
_know(structure.nonzero, "nonzero argwhere")
_know(structure.join(new_dim=False), "cat concat concatenate")
_know(structure.join(new_dim=True), "stack")
_know(structure.pad, "pad", F)
_know(structure.sort(1), "sort argsort")
_know(structure.sort(2), "topk")
_know(writes.set_item, "setitem", Tensor)
_know(writes.index_put, "index_put")
_know(writes.along, "index_add index_copy index_reduce")
_know(writes.scatter, "scatter scatter_add scatter_reduce")
_know(writes.masked_scatter, "masked_scatter")
_know(products.along(1), """sum mean amax amin prod std var std_mean var_mean any all logsumexp argmax argmin softmax
    log_softmax softmin cumsum cumprod cummax cummin logcumsumexp count_nonzero median nanmean nansum""")  # fmt: skip
_know(products.extreme, "max min")
_know(products.along(1, default=-1), "glu")
_know(products.along(2, default=-1), "kthvalue diff")
_know(products.along(2), "norm vector_norm")
_know(products.along(2, default=1), "normalize", F)
_know(products.last, "layer_norm rms_norm")
_know(products.within(1), "linear", F)
_know(_matmul, "matmul mm bmm")
_know(products.product(1), "addmm baddbmm")
_know(products.outer, "outer")
_know(products.einsum, "einsum")
_know(products.bilinear, "bilinear", F)
_know(products.attention, "scaled_dot_product_attention", F)
_know(products.sorted_product, "grouped_mm _grouped_mm", F, torch)
_know(products.new_last, "embedding one_hot", F)
_know(products.new_last, "view_as_real", torch)
_know(products.without_last, "view_as_complex", torch)
_know(products.matrices, "inv solve_triangular cholesky matrix_exp pinv", torch.linalg)
_know(products.along(2), "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn", torch.fft)
_know(products.embedding_bag, "embedding_bag", F)
for _n in (1, 2, 3):
    _know(products.batched(_n), f"conv{_n}d conv_transpose{_n}d max_pool{_n}d avg_pool{_n}d adaptive_avg_pool{_n}d "
          f"adaptive_max_pool{_n}d dropout{_n}d", F)  # fmt: skip
_know(products.batched(0), "group_norm interpolate grid_sample", F)
_know(products.within(3), "pixel_shuffle pixel_unshuffle", F)
_know(products.patches, "unfold", F)
_know(products.batch_norm, "batch_norm", F)
_know(products.instance_norm, "instance_norm", F)
_know(products.cosine, "cosine_similarity", F, torch)
_know(products.cell, "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", torch)
_know(products.recurrent(2), "lstm", torch)
_know(products.recurrent(1), "gru rnn_tanh rnn_relu", torch)
_numbers = """item tolist is_nonzero equal allclose __bool__ __int__ __float__ __complex__ __index__ __contains__"""
for _space in (Tensor, torch):
    for _name in _numbers.split():
        if callable(getattr(_space, _name, None)) and getattr(_space, _name) not in propagations:
            propagations[getattr(_space, _name)] = number
    for _name in ("numpy", "__array__", "__dlpack__"):
        if callable(getattr(_space, _name, None)):
            propagations[getattr(_space, _name)] = exported


def is_elementwise(func: Callable[..., Any]) -> bool:
    """Whether an operation only broadcasts its arguments against each other."""
    return propagations.get(func) in (products.aligned, _where)

"""Quantised params: `quantize`, `dequantize`, and the weights of models that bitsandbytes quantised."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._api.arguments import check_dtype, check_params, refuse
from funclora._quant.packing import FourBit, Int8, Packing, Repacked
from funclora._quant.source import UNPACKED_DTYPES, Source
from funclora._quant.tensor import Quantized
from funclora._torch.functions import is_sharded
from funclora._torch.memory import place_of
from funclora.errors import ConfigError, NonFiniteError, ParamsError, TargetError, UnsupportedError, near

V = TypeVar("V")


def quantize(
    params: Mapping[str, Tensor],
    targets: Iterable[str],
    kind: Literal["nf4", "fp4", "int8"] = "nf4",
    *,
    double_quant: bool = False,
    blocksize: int = 64,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The params with weights of 4 (or 8) bits, as in QLoRA (Dettmers et al., arXiv 2305.14314).

    `apply`, `bind`, `init`, training steps and stacks accept the result like any params. Weights are unpacked where
    they are used, one layer at a time, in forward and again in backward. bitsandbytes packs each weight on its device.

    Args:
        params: full name -> tensor, as `base_params` returns them.
        targets: the weights to quantise: full names of parameters or of their modules, or last components of either
            ("q_proj" is every "...q_proj.weight"). A dict of adapters names the weights that they rewrite.
        kind: "nf4", "fp4" (blocks of 4-bit values) or "int8" (rows of 8-bit values; matrices only).
        double_quant: whether to quantise the scales of the blocks too (4 bits only).
        blocksize: the number of values that share a scale (4 bits only).
        dtype: the dtype to which weights are unpacked and in which they are computed: float32, float16 or bfloat16; by
            default each weight's own. Inputs of another dtype are cast to it, and the result is cast back.

    Returns:
        A new dict whose targets are quantised weights; the other entries are shared.

    Raises:
        TargetError: a target matches nothing, or names a parameter that is not a matrix.
        ParamsError: a weight is quantised already, on the meta device, or of a dtype that bitsandbytes does not pack.
        NonFiniteError: a weight holds NaN or infinity.
        ConfigError: an option is invalid.
        UnsupportedError: bitsandbytes is not installed.

    Examples:
        >>> import funclora as fl
        >>> model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 2))
        >>> params = fl.base_params(model)
        >>> packed = quantize(params, ["0"], "nf4", double_quant=True)
        >>> packed["0.weight"]
        Quantized([64, 64], torch.float32, nf4)
        >>> config = fl.LoraConfig(r=2, target_modules=["0"])
        >>> fl.apply(model, packed, fl.init(model, config, params=packed), torch.ones(3, 64)).shape
        torch.Size([3, 2])
    """
    check_params(params)
    packing = packing_of(kind, double_quant, blocksize)
    if dtype is not None and dtype not in UNPACKED_DTYPES:
        raise ConfigError(f"quantize: dtype: expected one of {', '.join(map(str, UNPACKED_DTYPES))}, got {dtype}.")
    packed = dict(params)
    done: dict[Any, Quantized] = {}  # tied weights stay tied
    for name in targeted(params, targets):
        weight = params[name].detach()
        place = place_of(weight) or name
        if place not in done:
            done[place] = quantized(name, weight, packing, dtype)
        packed[name] = done[place]
    return packed


def dequantize(params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The params with dense weights in place of quantised ones: the values with which `apply` computes.

    Args:
        params: full name -> tensor.
        dtype: the dtype for the weights that were quantised; by default each weight's own.

    Returns:
        A new dict; the entries that are not quantised are shared.

    Examples:
        >>> packed = quantize({"weight": torch.randn(64, 64)}, ["weight"])
        >>> type(dequantize(packed)["weight"]).__name__
        'Tensor'
    """
    check_params(params)
    check_dtype(dtype)
    return {
        name: tensor.dequantize().to(dtype or tensor.dtype) if isinstance(tensor, Quantized) else tensor
        for name, tensor in params.items()
    }


def quantized(name: str, weight: Tensor, packing: Packing, dtype: torch.dtype | None = None) -> Quantized:
    """A weight, quantised; `dtype` as for `quantize`."""
    check_packable(name, weight)
    return Quantized.of(Source(packing, weight.shape, dtype or weight.dtype), packing.pack(weight))


def packing_of(kind: str, double_quant: bool = False, blocksize: int = 64) -> Packing:
    """The packing that these arguments of `quantize` name."""
    if kind == "int8":
        if double_quant or blocksize != 64:
            raise ConfigError("quantize: double_quant and blocksize are options of 4 bits; 'int8' has none.")
        return Int8()
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"quantize: kind: expected 'nf4', 'fp4' or 'int8', got {kind!r}.")
    return FourBit(cast(Any, kind), blocksize, double_quant)


def targeted(params: Mapping[str, Tensor], targets: Iterable[str]) -> list[str]:
    """The names of the weights that the targets name."""
    if not isinstance(targets, Iterable) or isinstance(targets, (Tensor, nn.Module)):
        refuse("targets", "names of parameters or modules, or a dict of adapters", targets)
    if isinstance(targets, str):
        raise ConfigError(
            f"quantize: targets: expected names of parameters or modules, got the string {targets!r}. For all linear "
            "layers: [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]."
        )
    found = []
    for entry in targets:
        if not isinstance(entry, str):
            refuse("targets", "names of parameters or modules", entry)
        named = [name for name in params if name == entry or name.endswith(f".{entry}")]
        within = [name for name in params if f".{name.rpartition('.')[0]}".endswith(f".{entry}") and entry]
        matched = named + [name for name in within if params[name].dim() > 1 and params[name].is_floating_point()]
        if not matched:
            raise TargetError(f"quantize: targets: {entry!r} matches no weight of params.{near(entry, params)}")
        found += matched
    for name in found:
        if params[name].dim() < 2:
            raise TargetError(f"quantize: {name!r} has shape {list(params[name].shape)}. Only matrices are quantised.")
    return list(dict.fromkeys(found))


def check_packable(name: str, weight: Tensor) -> None:
    """Raise an error unless a weight, or a piece of one, can be quantised."""
    if isinstance(weight, Quantized) and not weight.is_exact:
        raise ParamsError(f"quantize: {name!r} is quantised already: {weight!r}.")
    if isinstance(weight, Quantized) or is_sharded(weight):
        kind = "a DTensor" if is_sharded(weight) else repr(weight)
        raise ParamsError(
            f"quantize: {name!r} is {kind}: it is divided among processes, and its parts cannot be packed. Quantise "
            "whole weights, and divide them with funclora.distributed.shard; or leave it out."
        )
    if weight.dtype not in UNPACKED_DTYPES:
        raise ParamsError(
            f"quantize: {name!r} has dtype {weight.dtype}, expected one of {', '.join(map(str, UNPACKED_DTYPES))}."
        )
    if weight.is_meta or not weight.numel():
        what = "is on the meta device" if weight.is_meta else f"has shape {list(weight.shape)}"
        raise ParamsError(f"quantize: {name!r} {what}: there are no values to quantise.")
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"quantize: {name!r} holds NaN or infinity. Check the weights.")


# Models that bitsandbytes quantised.


def of_bitsandbytes(name: str, tensor: V, owner: nn.Module, model: nn.Module) -> V | Quantized:
    """The value of a parameter that may be packed by bitsandbytes; any other tensor unchanged.

    Args:
        name: the parameter's full name.
        tensor: the tensor that its module holds.
        owner: that module.
        model: the module that `name` starts from.
    """
    kind = type(tensor).__name__
    if kind not in ("Params4bit", "Int8Params") or "bitsandbytes" not in sys.modules:
        return tensor
    weight: Any = tensor
    if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
        return tensor  # not packed yet, or 16-bit values that are packed in each forward pass
    if kind == "Int8Params":
        return _int8(name, weight, owner, model)
    state = weight.quant_state if weight.quant_state is not None else getattr(owner, "quant_state", None)
    if state is None:
        raise ParamsError(f"{name!r} is a Params4bit without its quant_state. Load the model again.")
    dtype = getattr(owner, "compute_dtype", None) or state.dtype
    shape = torch.Size(state.shape)
    if hasattr(state, "packing_format_for_cpu"):  # False: brought back into the old order, after rounding
        return Quantized.of(Source(Repacked(name), shape, dtype), (weight.data,))
    packing = FourBit(state.quant_type, state.blocksize, state.nested)
    return Quantized.of(Source(packing, shape, dtype), FourBit.parts(weight.data, state))


def refuse_repacked(tensor: Tensor) -> None:
    """Raise `UnsupportedError` for a weight whose values cannot be read any more."""
    if isinstance(tensor, Quantized) and isinstance(tensor.source.packing, Repacked):
        tensor.source.packing.refuse()


def _int8(name: str, weight: Any, owner: Any, model: nn.Module) -> Quantized:
    state = getattr(owner, "state", None)
    scales = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    if scales is None:
        raise ParamsError(f"{name!r} is an Int8Params without its scales SCB. Load the model again.")
    # The module computes in the dtype of its input, which is the dtype of the weights that are not packed.
    dtype = next((p.dtype for p in model.parameters() if p.dtype in UNPACKED_DTYPES), torch.float32)
    return Quantized.of(Source(Int8(), weight.shape, dtype), (weight.data, scales))


def reads_packed_weights(module: nn.Module) -> bool:
    """Whether a module belongs to bitsandbytes, so that its forward accepts only its own packed weight."""
    kind = type(module)
    if torch.compiler.is_compiling():  # which would check the dict before every call
        return _packs_weights(kind)
    if kind not in _packs:  # not functools.cache, about which the compiler warns
        _packs[kind] = _packs_weights(kind)
    return _packs[kind]


def _packs_weights(kind: type[nn.Module]) -> bool:
    return any(_is_theirs(base) and base.__name__ in _PACKERS for base in kind.__mro__)


_PACKERS = ("Linear4bit", "Linear8bitLt", "Embedding4bit", "Embedding8bit")
_packs: dict[type[nn.Module], bool] = {}


def _is_theirs(thing: Any) -> bool:
    return str(thing.__module__).startswith("bitsandbytes.")


def read_any_weight(module: nn.Module, name: str) -> None:
    """Make a module of bitsandbytes read the weight that it holds, like the plain layer that it replaces."""
    kind = type(module)
    if issubclass(kind, (_Linear, _Embedding)):
        return
    if not _is_theirs(kind.forward):
        raise UnsupportedError(
            f"{name!r} belongs to a {kind.__name__}, whose own forward reads a weight that bitsandbytes packed. Bind a "
            "model with plain layers instead: the same params fit it."
        )
    if kind not in _readers:
        layer = _Linear if issubclass(kind, nn.Linear) else _Embedding
        _readers[kind] = type(kind.__name__, (layer, kind), {"__module__": kind.__module__})
    module.__class__ = _readers[kind]


_readers: dict[type[nn.Module], type[nn.Module]] = {}


class _Linear(nn.Module):
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        dtype, bias = self.weight.dtype, self.bias
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        return F.linear(x.to(dtype), self.weight, bias).to(x.dtype)


class _Embedding(nn.Module):
    weight: Any
    dtype: torch.dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight).to(self.dtype)

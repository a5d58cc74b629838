"""Merging adapters into base weights."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from funclora._bind.checks import check_adapters
from funclora._quant.tensor import Quantized, place_of_weight, plain_weight
from funclora._torch.functions import has_values
from funclora._torch.mesh import whole
from funclora.distributed._live import at_rest
from funclora.distributed._shards import divided_as
from funclora.errors import NonFiniteError, TiedWeightsWarning, UnsupportedError
from funclora.rules.base import Adapters, Params, Rule, dense_of
from funclora.rules.tokens import Tied, untied


def merge(params: Params, adapters: Adapters) -> dict[str, Tensor]:
    """The rewritten weights, as a new dict.

    Each target is computed in float32 (float64 if the weight or the rule is float64) and rounded once to its base
    dtype. Keys, dtypes and devices are the same as in `params`; entries without an adapter are shared, not copied.

    An adapter on one of several tied parameters changes only that one: the result contains them as different tensors,
    and a `TiedWeightsWarning` names them. Parameters that are tied by `Tied` rules stay one tensor.

    Weights that are divided among processes stay divided, and are gathered one at a time: every process must call it.
    Those of `fully_shard` and of tensor parallelism become DTensors, also the ones without an adapter.

    Args:
        params: full name -> tensor, as from `base_params` or a state dict.
        adapters: full name of a parameter -> rule.

    Returns:
        Full name -> tensor; `model.load_state_dict(merged)` takes it.

    Raises:
        ParamsError: an adapter's parameter is missing, or a rule does not fit its weight.
        NonFiniteError: a rewritten weight holds NaN or infinity, or overflows its dtype.
        UnsupportedError: an adapter's weight is quantised; merge into `dequantize(params)` or into the original.

    Examples:
        >>> from funclora import LoRA
        >>> params = {"weight": torch.zeros(1, 2, dtype=torch.float16), "bias": torch.zeros(1)}
        >>> merged = merge(params, {"weight": LoRA(torch.ones(1, 2), torch.ones(1, 1), scaling=0.5)})
        >>> merged["weight"]
        tensor([[0.5000, 0.5000]], dtype=torch.float16)
        >>> merged["bias"] is params["bias"]
        True
    """
    check_adapters(params, adapters, values=True)
    params = {name: at_rest(weight) for name, weight in params.items()}
    _report_ties(params, adapters)
    merged = dict(params)
    for name, rule in untied(adapters).items():
        weight, tie = params[name], adapters[name]
        if isinstance(tie, Tied) and _are_tied(weight, params[tie.to]):
            continue
        if isinstance(weight, Quantized) and not weight.is_exact:
            raise UnsupportedError(
                f"merge: {name!r} is quantised, and a merged weight is dense. Choose the base to merge into: "
                "merge(dequantize(params), adapters) keeps the weights that were trained with, "
                "merge(original_params, adapters) uses the weights from before quantize."
            )
        merged[name] = _merged(name, rule, weight)
    for name, tie in adapters.items():
        if isinstance(tie, Tied) and _are_tied(params[name], params[tie.to]):
            merged[name] = merged[tie.to]
    return merged


def _merged(name: str, rule: Rule, given: Tensor) -> Tensor:
    """The rewritten weight, divided among processes as the given one."""
    weight = whole(plain_weight(given))
    device, dtype = weight.device, weight.dtype
    # A copy, because the result of a Full rule must not alias the adapter's own leaf. What was gathered is one already.
    # In the base's order in memory: safetensors does not accept transposed views.
    copy = weight is given or rule.bind_dense
    order = torch.contiguous_format if weight.is_contiguous() else torch.preserve_format
    dense = dense_of(name, rule, weight)
    del weight
    result = dense.to(device=device, dtype=dtype, copy=copy, memory_format=order)
    if has_values(dense):  # otherwise it can only be checked outside the transform
        refuse_nonfinite(name, dense, result)
    return divided_as(result, given)


def _are_tied(first: Tensor, second: Tensor) -> bool:
    return place_of_weight(first) == place_of_weight(second) is not None


def refuse_nonfinite(name: str, dense: Tensor, result: Tensor) -> None:
    """Raise `NonFiniteError` if a rewritten weight, rounded to its dtype, holds NaN or infinity."""
    if not torch.isfinite(result).all():
        cause = "" if torch.isfinite(dense).all() else " before rounding"
        raise NonFiniteError(
            f"merging {name!r} gives NaN or infinity{cause} in {result.dtype}. Check the adapter's training, or merge "
            "into a wider dtype."
        )


def _report_ties(params: Params, adapters: Adapters) -> None:
    """Warn of adapted parameters that share their memory with another one, which is not rewritten with them."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in params.items():
        if (place := place_of_weight(tensor)) is not None:
            names.setdefault(place, []).append(name)
    rules = untied(adapters)
    for tied in names.values():
        adapted = [name for name in tied if name in rules]
        if adapted and len(tied) > 1 and any(rules.get(name) is not rules[adapted[0]] for name in tied):
            warnings.warn(
                f"{', '.join(map(repr, tied))} are one tied parameter; only {', '.join(map(repr, adapted))} is "
                "rewritten. The merged dict holds them as different tensors: a model that ties them again on load "
                "needs its tie removed (for transformers: config.tie_word_embeddings = False).",
                TiedWeightsWarning,
                stacklevel=3,
            )

"""Which tensors can have a rule: dense floating-point tensors in the same place as the rule's tensors."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from funclora._torch.functions import is_sharded
from funclora._torch.mesh import is_cut_once
from funclora.errors import ParamsError
from funclora.rules.base import Rule

# The kinds of most weights, for a fast check: `bind` checks every weight.
_USUAL = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def refuse_weight(name: str, weight: Tensor) -> None:
    """Raise `ParamsError` if no rule can rewrite a tensor of that kind; the error names it and what to do."""
    if weight.dtype in _USUAL and weight.layout == torch.strided and not weight.is_nested:
        return
    if weight.is_nested or weight.layout == torch.jagged:
        raise ParamsError(
            f"{name!r} is a nested tensor; a rule needs a weight of one shape. Pad it (to_padded_tensor), or leave it "
            "out of the targets."
        )
    if weight.layout != torch.strided:
        raise ParamsError(
            f"{name!r} has layout {weight.layout}; a rule needs a dense weight. Put its to_dense() into params, or "
            "leave it out of the targets."
        )
    if weight.is_floating_point() and torch.finfo(weight.dtype).bits < 16:
        raise ParamsError(
            f"{name!r} has dtype {weight.dtype}, in which torch does not compute. Put its value (with the scale that "
            "the model keeps beside it) into params as bfloat16 or wider, or leave it out of the targets."
        )


def refuse_elsewhere(name: str, rule: Rule, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight has no values, or only a part of them, but the rule's tensors have all.

    torch computes with meta tensors and real ones together, and returns uninitialised memory.
    """
    if weight.is_meta and not all(leaf.is_meta for leaf in _leaves(rule)):
        raise ParamsError(
            f"{name!r} is on the meta device: it has a shape, but no values. Load the model's weights first, or move "
            "the adapters and the inputs to the meta device too, if only shapes are wanted."
        )
    if type(weight) is not Tensor and is_sharded(weight) and any(map(is_sharded, _leaves(rule))):
        raise ParamsError(
            f"adapters[{name!r}] holds DTensors. An adapter is whole in every process, also where its weight is "
            "divided: pass the full_tensor() of each."
        )


def refuse_division(name: str, rule: Rule, weight: Tensor) -> None:
    """Raise `ParamsError` if a weight is divided over a mesh in a way for which the rule has no part."""
    if not is_cut_once(weight):
        divided: Any = weight
        raise ParamsError(
            f"{name!r} is a DTensor with the placements {divided.placements}; an adapter needs a mesh of one "
            "dimension, and Shard or Replicate. Put its full_tensor() into params, or leave it out of the targets."
        )
    if weight.dim() > 2 and not rule.bind_dense:
        raise ParamsError(
            f"{name!r} is a DTensor of shape {list(weight.shape)}: weights of experts that are divided over a mesh "
            "cannot have an adapter. Leave it out of the targets, or use fully_shard or funclora.distributed.shard."
        )


def _leaves(rule: Rule) -> list[Tensor]:
    tree: object = rule
    return optree.tree_leaves(tree)  # type: ignore[arg-type]

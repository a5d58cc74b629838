"""Adapters with scaling 1 and equal ranks, for programs that read only one rank and α for all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from funclora._config.config import LoraConfig
from funclora.rules.base import Adapters, Rule
from funclora.rules.dense import Delta
from funclora.rules.dora import DoRA
from funclora.rules.layouts import padded
from funclora.rules.low_rank import LoRA


def folded(adapters: Adapters, config: LoraConfig) -> tuple[dict[str, Rule], LoraConfig]:
    """The same adapters with s multiplied into B, and their configuration.

    vLLM reads r and lora_alpha alone and scales every tensor by α/r; llama.cpp takes α and the rank of each tensor.
    Both are right if α is r, and the rank of every tensor is r.

    Args:
        adapters: full name -> rule.
        config: the configuration of these adapters.

    Returns:
        Adapters that rewrite every weight as before, up to one rounding of B, and their configuration.
    """
    changed = alike(adapters)
    r = max(rule.r for rule in changed.values() if isinstance(rule, (LoRA, DoRA)))
    return changed, config.replace(r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False)


def alike(adapters: Adapters) -> dict[str, Rule]:
    """The same adapters with scaling 1 and the largest rank, up to which the others are padded with zeros."""
    r = max(rule.r for rule in adapters.values() if isinstance(rule, (LoRA, DoRA)))
    return {name: _padded(_unscaled(rule), r) for name, rule in adapters.items()}


def unscaled(adapters: Adapters) -> dict[str, Rule]:
    """The same adapters with s multiplied into B: scaling 1, with the ranks that they have."""
    return {name: _unscaled(rule) for name, rule in adapters.items()}


def _padded(rule: Rule, r: int) -> Rule:
    if isinstance(rule, (LoRA, DoRA)):
        of_a, of_b = rule.layout.rank_dims
        return replace(rule, a=padded(rule.a, of_a, r), b=padded(rule.b, of_b, r))
    return rule


def _unscaled(rule: Rule) -> Rule:
    if isinstance(rule, (LoRA, DoRA)):
        return replace(rule, b=_scaled(rule.b, rule.scaling), scaling=1.0)
    if isinstance(rule, Delta):
        return replace(rule, value=_scaled(rule.value, rule.scaling), scaling=1.0)
    return rule


def _scaled(value: Tensor, scaling: float | Tensor) -> Tensor:
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    scaled: Tensor = (wide * scaling).to(value.dtype)
    return scaled

"""Layers with a forward of their own, whose result may be something else than a product with the weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def adds_to_output(module: nn.Module) -> bool:
    """Whether an update of the weight adds to the output what it gives in the plain layer, as PEFT takes for granted.

    It is tried with random numbers. A layer that does not take the inputs of a plain one does not.
    """
    weight: Any = module.weight
    if not isinstance(module, nn.Linear) or weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    update = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
    changed = copy.copy(module)
    changed.__dict__["_parameters"] = module._parameters | {"weight": nn.Parameter(weight + update, False)}
    with torch.no_grad():
        try:
            base, output = module(x), changed(x)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        if not isinstance(base, Tensor) or not isinstance(output, Tensor):
            return False
        return torch.allclose(output - base, x @ update.mT, rtol=1e-2, atol=1e-2)

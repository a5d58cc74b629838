"""Factors by the names of modules, which is what every format comes down to, and the rules that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from funclora._config.config import LoraConfig
from funclora._config.infer import configured, targeting
from funclora._config.layers import weights_of
from funclora.errors import FormatError, NonFiniteError, ParamsError, UnsupportedError, near
from funclora.io.peft.keys import PeftTarget
from funclora.io.peft.limits import unsupported_by_peft
from funclora.rules.base import Rule
from funclora.rules.dense import Delta
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Layout
from funclora.rules.low_rank import LoRA


@dataclass(frozen=True)
class Factors:
    """The update of one module, as the formula has it: s·B·A.

    Attributes:
        a: `[r, in, *kernel]`.
        b: `[out, r, 1, ..]`.
        scaling: s.
        magnitude: DoRA's m, of `out` numbers.
        bias: added to the bias of the module, s times.
        dropout: of the inputs of `a`, in training.
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0


def rules_of(file: Path, factors: Mapping[str, Factors], model: nn.Module) -> tuple[dict[str, Rule], LoraConfig]:
    """The rules of a model, in its order, and a configuration with which `save_peft` writes them.

    They are on the devices of their base weights, in float32 or in the weight's dtype if it is wider.

    Args:
        file: where the factors come from, for messages.
        factors: full name of a module -> its update.
        model: the model.

    Raises:
        FormatError: a module or a shape is not the model's.
        UnsupportedError: a module is of a kind that has no such update.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    modules = dict(model.named_modules())
    for name in factors:
        if name not in modules:
            raise FormatError(
                f"{file}: {type(model).__name__} has no module {name!r}.{near(name, modules, n=3)} Load the model that "
                "the adapter was trained on."
            )
    adapters: dict[str, Rule] = {}
    for name in modules:
        if name in factors:
            adapters |= _rules(file, name, modules[name], factors[name])
    return configured(adapters, [targeting(model, adapters)])


def refuse_infinite(file: Path, name: str, given: Factors) -> None:
    """Raise `NonFiniteError` if a tensor of an update contains NaN or infinity."""
    for what, tensor in {"A": given.a, "B": given.b, "m": given.magnitude, "the bias of B": given.bias}.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{file}: {what} of {name!r} contains NaN or infinity.")


def _rules(file: Path, name: str, module: nn.Module, given: Factors) -> dict[str, Rule]:
    layout, weight = _weight(file, name, module)
    refuse_infinite(file, name, given)

    def put(tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if weight.is_meta else weight.device
        return tensor.to(device, torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()

    a, b = put(given.a), put(given.b)
    rule: LoRA | DoRA = LoRA(a, b, scaling=given.scaling, dropout=given.dropout, layout=layout)
    if given.magnitude is not None:
        magnitude = put(given.magnitude.flatten())
        rule = DoRA(a, b, magnitude, scaling=given.scaling, dropout=given.dropout, layout=layout)
    found: dict[str, Rule] = {f"{name}.weight": rule}
    if given.bias is not None:
        found[f"{name}.bias"] = Delta(put(given.bias), scaling=given.scaling)
    for full, each in found.items():
        parameter = getattr(module, full.rpartition(".")[2], None)
        if not isinstance(parameter, Tensor):
            raise UnsupportedError(f"{file}: {full!r} would be changed, but {name!r} has no bias.")
        try:
            each.check(full, parameter)
        except ParamsError as error:
            raise FormatError(f"{file}: {error} Load the model that the adapter was trained on.") from error
    return found


def _weight(file: Path, name: str, module: nn.Module) -> tuple[Layout, Tensor]:
    """The layout and the weight of a module that PEFT, whose forward pass the trainers use, treats by the formula."""
    layout = (weights_of(module) or {}).get("weight")
    if layout is None:
        raise UnsupportedError(f"{file}: {name!r} is a {type(module).__name__}, which has no low-rank update.")
    weight: Tensor = module.get_parameter("weight")
    target = PeftTarget(f"{name}.weight", name, layout, tuple(weight.shape), by_parameter=False)
    for _, why in unsupported_by_peft([target], [], LoraConfig(target_modules=[name])):
        raise UnsupportedError(f"{file}: the adapter of {name!r} cannot be read: {why}")
    return layout, weight

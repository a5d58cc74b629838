"""Factors by the names of modules, which is what every format comes down to, and the rules that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from funclora._bind.params import named_tensors
from funclora._config.config import LoraConfig
from funclora._config.infer import configured, layouts_of, targeting
from funclora.errors import FormatError, NonFiniteError, ParamsError, UnsupportedError, near
from funclora.io.peft.keys import PeftTarget
from funclora.io.peft.limits import unsupported_by_peft
from funclora.rules.base import Rule
from funclora.rules.dense import Delta
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Layout, Parameter
from funclora.rules.low_rank import LoRA


@dataclass(frozen=True)
class Factors:
    """The update of one module, as the formula has it: s·B·A.

    Attributes:
        a: `[r, in, *kernel]`, with a leading dimension for experts.
        b: `[out, r, 1, ..]`, likewise.
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
        factors: full name of a module, or of a parameter such as experts -> its update.
        model: the model.

    Raises:
        FormatError: a module or a shape is not the model's.
        UnsupportedError: a module is of a kind that has no such update.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    tensors = {name: tensor for name, tensor, _, _ in named_tensors(model)}
    given: dict[str, Factors] = {}
    for name, update in factors.items():
        weight = name if name in tensors else f"{name}.weight"
        if weight not in tensors:
            raise FormatError(
                f"{file}: {type(model).__name__} has no module {name!r} with a weight.{_near(name, model)} Load the "
                "model that the adapter was trained on."
            )
        given[weight] = update
    layouts = layouts_of(model, [name for name in tensors if name in given])
    _refuse_unlike_peft(file, layouts, tensors)
    adapters: dict[str, Rule] = {}
    for name, layout in layouts.items():
        refuse_infinite(file, name, given[name])
        adapters |= _rules(file, name, tensors, layout, given[name])
    return configured(adapters, [targeting(model, adapters)])


def _near(name: str, model: nn.Module) -> str:
    return near(name, [module for module, _ in model.named_modules()], n=3)


def refuse_infinite(file: Path, name: str, given: Factors) -> None:
    """Raise `NonFiniteError` if a tensor of an update contains NaN or infinity."""
    for what, tensor in {"A": given.a, "B": given.b, "m": given.magnitude, "the bias of B": given.bias}.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{file}: {what} of {name!r} contains NaN or infinity.")


def _rules(
    file: Path, name: str, tensors: Mapping[str, Tensor], layout: Layout | None, given: Factors
) -> dict[str, Rule]:
    assert layout is not None  # `_refuse_unlike_peft`
    weight = tensors[name]

    def put(tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if weight.is_meta else weight.device
        return tensor.to(device, torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()

    a, b = put(given.a), put(given.b)
    rule: LoRA | DoRA = LoRA(a, b, scaling=given.scaling, dropout=given.dropout, layout=layout)
    if given.magnitude is not None:
        magnitude = put(given.magnitude.flatten())
        rule = DoRA(a, b, magnitude, scaling=given.scaling, dropout=given.dropout, layout=layout)
    found: dict[str, Rule] = {name: rule}
    if given.bias is not None:
        found[f"{name.removesuffix('.weight')}.bias"] = Delta(put(given.bias), scaling=given.scaling)
    for full, each in found.items():
        if full not in tensors:
            raise UnsupportedError(f"{file}: {full!r} would be changed, but the model has no such bias.")
        try:
            each.check(full, tensors[full])
        except ParamsError as error:
            raise FormatError(f"{file}: {error} Load the model that the adapter was trained on.") from error
    return found


def _refuse_unlike_peft(file: Path, layouts: Mapping[str, Layout | None], tensors: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedError` for what PEFT, whose forward pass the trainers use, does not treat by the formula."""
    targets = []
    for name, layout in layouts.items():
        if layout is None:
            raise UnsupportedError(f"{file}: {name!r} has no low-rank update.")
        by_parameter = isinstance(layout, Parameter)
        module = name.rpartition(".")[0]
        targets.append(PeftTarget(name, module, layout, tuple(tensors[name].shape), by_parameter=by_parameter))
    for name, why in unsupported_by_peft(targets, [], LoraConfig(target_modules="all-linear")):
        raise UnsupportedError(f"{file}: the adapter of {name!r} cannot be read: {why}")

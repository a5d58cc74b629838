"""Names of target modules that PEFT takes for the experts of a model.

transformers 4 had a module for each matrix of an expert; since version 5 one parameter holds those of a whole layer.
PEFT reads the old names in `target_modules` as these parameters, in every model whose checkpoints are converted like
those of Mixtral or Qwen2-MoE, and a layer of the same name that is no expert then has no adapter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.layers import weights_of
from funclora._config.names import named
from funclora._config.outlined import asked
from funclora._config.targets import all_linear
from funclora.errors import TargetError

_QWEN2_MOE = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_KINDS = {"qwen2_moe": _QWEN2_MOE, "mixtral": _MIXTRAL}


def expert_names(model: nn.Module) -> Mapping[str, str]:
    """The last part of the name of a module -> the end of the name of the parameter that PEFT adapts in its place.

    It is empty for models without such names, and for every model of transformers 4.
    """
    return _KINDS.get(converted_like(model) or "", {})


def converted_like(model: nn.Module) -> str | None:
    """The type of model like whose checkpoints transformers converts this one's, "" if only its own; None if nowise."""
    return asked(model, "converted like", _converted_like)  # type: ignore[no-any-return]


def _converted_like(model: nn.Module) -> str | None:
    library: Any = sys.modules.get("transformers.conversion_mapping")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if library is None or library.get_checkpoint_conversion_mapping(model_type) is None:
        return None
    kinds: dict[Any, str] = {**getattr(library, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return kinds.get(model_type, "")


def as_in_peft(model: nn.Module, config: LoraConfig) -> LoraConfig:
    """The configuration with what PEFT makes of it before it looks for targets in the model.

    Names of experts in a list become `target_parameters`, and "all-linear" a list that includes them. Where one
    parameter holds two of the matrices, its rank and α are twice those of the configuration. A regular expression
    stays: PEFT would take the last parts of the names that it matches, in all layers.

    Raises:
        TargetError: only one of two matrices that are one parameter is named, or the model has no such parameter.
    """
    names, entries = expert_names(model), config.target_modules
    if not names or not entries or (isinstance(entries, str) and not config.all_linear):
        return config
    parameters = [name for name, _ in model.named_parameters()]
    if config.all_linear:
        entries = [*_ends(model, all_linear(model, config)), *names]
    experts = {entry: names[last] for entry in entries if (last := entry.rpartition(".")[2]) in names}
    if not config.all_linear:
        _check_experts(model, experts, names, parameters)
    found = {end: [name for name in parameters if named(name, end)] for end in experts.values()}
    found = {end: matched for end, matched in found.items() if matched}
    changes: dict[str, Any] = {
        "target_modules": tuple(entry for entry in entries if entry not in experts) or None,
        "target_parameters": tuple(dict.fromkeys([*(config.target_parameters or ()), *found])) or None,
    }
    for field, value in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        patterns = dict(getattr(config, field))
        for end, matched in found.items():
            together = sum(name == end for name in names.values())
            if together > 1 and not any(config.patterns_of(field, name) for name in matched):  # type: ignore[arg-type]
                patterns[rf".*\.{re.escape(end)}"] = value * together
        changes[field] = patterns
    return config.replace(**changes)


def _ends(model: nn.Module, modules: Collection[str]) -> list[str]:
    """The last parts of names, as PEFT takes them; full names where the end also names a module without adapters."""
    other = {name.rpartition(".")[2] for name, module in model.named_modules() if weights_of(module) is None}
    ends = (name if (last := name.rpartition(".")[2]) in other else last for name in modules)
    return list(dict.fromkeys(ends))


def _check_experts(
    model: nn.Module, experts: Mapping[str, str], names: Mapping[str, str], parameters: Collection[str]
) -> None:
    kind = f"in a {type(model).__name__} PEFT takes the name for experts"
    advice = "A layer that is no expert can be named in target_parameters, by its weight: 'mlp.{}.weight'."
    for entry, end in experts.items():
        last = entry.rpartition(".")[2]
        partners = [name for name, other in names.items() if other == end]
        lacking = [name for name in partners if not any(named(given, name) for given in experts)]
        if lacking:
            raise TargetError(
                f"target_modules: {entry!r}: {kind}, whose parameter {end!r} holds {' and '.join(map(repr, partners))} "
                f"together. Name {', '.join(map(repr, lacking))} too. {advice.format(last)}"
            )
        if not any(named(name, end) for name in parameters):
            raise TargetError(
                f"target_modules: {entry!r}: {kind}, and this model has no parameter {end!r}. {advice.format(last)}"
            )

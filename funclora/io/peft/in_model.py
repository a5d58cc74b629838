"""What PEFT would do with a folder in the model that the adapter is for, and how it must be written."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.embeddings import setting_of
from funclora._config.experts import as_in_peft, expert_names
from funclora._config.infer import exactly
from funclora._config.target import Target
from funclora._config.targets import select
from funclora.errors import ConfigError, PeftFormatWarning, UnsupportedError
from funclora.io.peft.keys import PeftTarget
from funclora.io.peft.limits import own_forward, unsupported_in_model
from funclora.io.peft.own_forward import adds_to_output
from funclora.io.peft.raw_weights import RawUse, raw_uses
from funclora.io.peft.renamed import renamed_by_peft
from funclora.rules.base import Adapters, Rule
from funclora.rules.low_rank import LowRank

# PEFT refuses these layers in these models.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_OF_MAMBA = ("out_proj", "conv1d")

_RAW = "reads the weight in place of calling the layer, where PEFT's adapter would have no effect."
_OWN_FORWARD = (
    "has a forward of its own, and PEFT adds its update to what the layer returns, which is not what an update of its "
    "weight gives."
)
_INSTEAD = "Name the weight in target_parameters, or exclude the layer."


def in_model(model: nn.Module, adapters: Adapters, config: LoraConfig) -> tuple[dict[str, Rule], LoraConfig]:
    """The adapters that have tensors in the folder, and the configuration with which PEFT puts them there.

    Raises:
        ConfigError: the configuration means other parameters of the model than the adapters are for.
        UnsupportedError: PEFT cannot have these adapters in this model.
    """
    meant = as_in_peft(model, config)
    targets = select(model, meant, unmatched=[])
    if expert_names(model):
        if targets.keys() != adapters.keys() and (literal := select(model, config)).keys() == adapters.keys():
            meant = _spelled_out(model, adapters, literal, config)
        elif isinstance(meant.target_modules, str):
            meant = _spelled_out(model, adapters, targets, meant)
        targets = select(model, meant)
    kind, first = type(model).__name__, dict(model.named_modules())
    if missing := [name for name in targets if name not in adapters]:
        raise ConfigError(
            f"in a {kind} the configuration also means {missing[0]!r}, which has no adapter. PEFT would make a new "
            "one. Make target_modules or target_parameters narrower, or add exclude_modules."
        )
    if rest := [name for name in adapters if name not in targets]:
        raise ConfigError(f"{rest[0]!r} has an adapter, but in a {kind} the configuration does not mean it.")
    return {name: rule for name, rule in adapters.items() if targets[name].module in first}, meant


def refuse_in_model(model: nn.Module, wrapped: Mapping[str, PeftTarget], keys: Iterable[str]) -> None:
    """Raise `UnsupportedError` if PEFT would compute something else in this model from the tensors of these keys."""
    uses = raw_uses(model, [w.module for w in wrapped.values() if not w.by_parameter])
    for name, why in (*unsupported_in_model(model, wrapped.values()), *_without_effect(model, wrapped.values(), uses)):
        raise UnsupportedError(f"{name!r} cannot be saved for PEFT: {why}")
    for w in wrapped.values():
        use = None if w.by_parameter else uses.get(w.module)
        if use:
            warnings.warn(
                f"{w.name!r}: {use.by} calls the layer in some cases only and else reads its weight, where PEFT's "
                f"adapter has no effect: compare the outputs. {_INSTEAD}",
                PeftFormatWarning,
                stacklevel=3,
            )
    for key, other in renamed_by_peft(model, keys):
        raise UnsupportedError(
            f"{key!r} cannot be saved for PEFT: in a {type(model).__name__} PEFT takes it for {other!r}, as a name of "
            "an older transformers, and would start with a new adapter."
        )


def _without_effect(
    model: nn.Module, wrapped: Iterable[PeftTarget], uses: Mapping[str, RawUse]
) -> Iterator[tuple[str, str]]:
    model_type = setting_of(model, "model_type")
    for w in wrapped:
        module = model.get_submodule(w.module)
        if model_type in _MAMBA and w.module.rpartition(".")[2] in _OF_MAMBA:
            yield w.name, f"PEFT refuses {' and '.join(_OF_MAMBA)} in a model of the type {model_type!r}."
        if w.by_parameter:
            continue
        use = uses.get(w.module)
        if use and use.always:
            yield w.name, f"{use.by} {_RAW} {_INSTEAD}"
        elif own_forward(module) and not adds_to_output(module):
            yield w.name, f"{type(module).__name__} {_OWN_FORWARD} {_INSTEAD}"


def _spelled_out(model: nn.Module, adapters: Adapters, targets: Mapping[str, Target], config: LoraConfig) -> LoraConfig:
    """The configuration with full names, and with weights in place of modules whose names PEFT takes for experts."""
    names = expert_names(model)
    modules: dict[str, str] = {}
    parameters: list[str] = []
    for name, rule in adapters.items():
        if not isinstance(rule, LowRank):
            continue
        module = targets[name].module
        if config.names("target_parameters", name):
            parameters.append(name)
        elif module.rpartition(".")[2] in names:
            _check_plain(model, module, config)
            parameters.append(name)
        else:
            modules[module] = name
    changes: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    keys = {name: name for name in parameters} | modules
    for key, name in keys.items():
        old = key if config.names("target_parameters", name) else targets[name].module
        for field, value, default in (
            ("rank_pattern", config.rank_of(old), config.r),
            ("alpha_pattern", config.alpha_of(old), config.lora_alpha),
        ):
            if value != default:
                changes[field][exactly(key)] = value
    return config.replace(
        target_modules=tuple(modules) or None, target_parameters=tuple(parameters) or None, exclude_modules=None,
        layers_to_transform=None, layers_pattern=None, **changes,
    )  # fmt: skip


def _check_plain(model: nn.Module, module: str, config: LoraConfig) -> None:
    for given, what in ((config.use_dora, "DoRA"), (config.lora_dropout, "dropout"), (config.lora_bias, "bias of B")):
        if given:
            raise UnsupportedError(
                f"{module!r} cannot be saved for PEFT: in a {type(model).__name__} PEFT takes this name in "
                "target_modules for experts, and would adapt those. As an entry of target_parameters it can have an "
                f"adapter, but no {what}."
            )

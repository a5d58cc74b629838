"""Checks that adapters agree with their configuration, because a PEFT folder stores scaling and targets only there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from funclora._config.config import LoraConfig
from funclora._config.covers import covers, saved_above
from funclora._config.names import named, unnamed
from funclora._config.peft_fields import HEADS
from funclora.errors import ConfigError, NonFiniteError, ParamsError, UnsupportedError, near
from funclora.io.peft.decomposed import refuse_decomposed
from funclora.io.peft.keys import PeftTarget
from funclora.io.peft.limits import unsupported_by_peft, unsupported_ties
from funclora.io.peft.tensors import SAVED_DTYPES
from funclora.io.peft.ties import output_layer
from funclora.rules.base import Adapters, Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Attention, Conv, Conv1D, Embedding, Linear, Matrices, Parameter
from funclora.rules.low_rank import LoRA, lora_of
from funclora.rules.tokens import Tied, TrainableTokens

_INSTEAD = "Merge the adapter (funclora.merge) and save the weights instead."


_OF_EXPERTS = "If the configuration names experts as PEFT does, save_peft needs the model: save_peft(..., model=model)."


def check_against_config(adapters: Adapters, config: LoraConfig) -> dict[str, PeftTarget]:
    """The low-rank rules as PEFT sees them, after checking that PEFT would compute the same from them.

    Raises:
        ConfigError: adapters and configuration do not agree.
        ParamsError: the leaves of a rule do not match each other.
        UnsupportedError: PEFT cannot represent an adapter, or would compute another result from it.
        NonFiniteError: an adapter contains NaN or infinity.
    """
    refuse_decomposed(config)
    wrapped = {}
    for name, rule in adapters.items():
        if type(rule) not in (LoRA, DoRA, Full, Delta, TrainableTokens, Tied):
            equal = (
                "Save the LoRA that it equals, rule.as_lora()" if isinstance(rule, Rule) and lora_of(rule) else _INSTEAD
            )
            raise UnsupportedError(f"{name!r}: a PEFT folder has no place for the rule {type(rule).__name__}. {equal}")
        _check_leaves(name, rule)
        if isinstance(rule, (LoRA, DoRA)):
            by_parameter = config.names("target_parameters", name)
            module = name.rpartition(".")[0]
            wrapped[name] = PeftTarget(name, module, rule.layout, _weight_shape(name, rule), by_parameter)
    full = [name for name, rule in adapters.items() if isinstance(rule, Full)]
    saved = list(dict.fromkeys(module for name in full for module in saved_above(name, config)))
    for name, why in unsupported_by_peft([*wrapped.values()], saved, config):
        w = wrapped.get(name)
        advice = _OF_EXPERTS if w is not None and isinstance(w.layout, Parameter) and not w.by_parameter else _INSTEAD
        raise UnsupportedError(f"{name!r} cannot be saved for PEFT: {why} {advice}")
    for w in wrapped.values():
        if isinstance(w.layout, Attention):  # readable, but PEFT never computes our outputs from it
            raise UnsupportedError(
                f"{w.name!r} cannot be saved for PEFT: PEFT always adapts both projections of nn.MultiheadAttention, "
                f"and out_proj with twice the scaling. {_INSTEAD}"
            )
        _check_covered(w, config)
        _check_numbers(w, adapters[w.name], config)
    for name in full:
        _check_full(name, [*wrapped.values()], config)
    tied = _tied(adapters, wrapped, config)
    _check_entries([*wrapped.values(), *tied.values()], full, saved, config)
    _check_lora_biases(adapters, wrapped, config)
    _check_tokens(adapters, config)
    return wrapped | tied


def _check_leaves(name: str, rule: Rule) -> None:
    for leaf in rule.leaf_names:
        tensor: Tensor = getattr(rule, leaf)
        if tensor.dtype not in SAVED_DTYPES:
            raise ParamsError(f"{name!r}: {leaf} has dtype {tensor.dtype}, expected a floating-point one.")
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{name!r}: {leaf} holds NaN or infinity. Such an adapter is not saved.")


def _weight_shape(name: str, rule: LoRA | DoRA) -> tuple[int, ...]:
    """The shape of the weight, computed from the leaves; empty for layouts that PEFT does not support."""
    a, b, layout = rule.a, rule.b, rule.layout
    wanted = 2 if isinstance(layout, Matrices) and not isinstance(layout, Parameter) else a.dim()
    if a.dim() != wanted or b.dim() != wanted or a.dim() < 2:
        raise ParamsError(
            f"{name!r}: a has shape {list(a.shape)} and b {list(b.shape)}, which are not those of one adapter of "
            f"layout {type(layout).__name__}. Save the adapters of a stack one by one (funclora.unstack)."
        )
    if isinstance(layout, Matrices):
        shape = (*a.shape[:-2], b.shape[-2], a.shape[-1])
        shape = (*shape[:-2], shape[-1], shape[-2]) if layout.transposed else shape
    elif isinstance(layout, Conv):
        shape = (b.shape[0], *a.shape[1:])
    else:
        return ()
    rule.check(name, torch.empty(shape, device="meta"))
    return shape


def _check_covered(w: PeftTarget, config: LoraConfig) -> None:
    """Whether the configuration names the target of a low-rank rule."""
    covered = covers(config, w.module, linear=isinstance(w.layout, (Linear, Conv1D)))
    if not w.by_parameter and not covered:
        raise ConfigError(
            f"{w.name!r} has an adapter, but the configuration does not target {w.module!r} "
            f"(target_modules={config.target_modules!r}, exclude_modules={config.exclude_modules!r})."
        )
    if w.by_parameter and covered and not config.all_linear:
        raise ConfigError(
            f"{w.name!r} is named in target_parameters, and its module in target_modules. Name it in one of them."
        )


def _check_numbers(w: PeftTarget, rule: Rule, config: LoraConfig) -> None:
    """One low-rank rule against the numbers of the configuration."""
    assert isinstance(rule, (LoRA, DoRA))
    if isinstance(rule, DoRA) != config.use_dora:
        raise ConfigError(f"{w.name!r} has the rule {type(rule).__name__}, but use_dora={config.use_dora}.")
    r, alpha = config.rank_of(w.key), config.alpha_of(w.key)
    if rule.r != r:
        raise ConfigError(
            f"{w.name!r} has rank {rule.r}, but the configuration says {r}. Give r and rank_pattern as the adapter is."
        )
    scaling = config.scaling(r, alpha)
    if not math.isclose(rule.scaling, scaling, rel_tol=1e-9):
        raise ConfigError(
            f"{w.name!r} has scaling {rule.scaling:g}, but the configuration gives {scaling:g} (lora_alpha={alpha:g}, "
            f"r={r}, use_rslora={config.use_rslora}). Give lora_alpha and alpha_pattern as the adapter is."
        )
    if rule.dropout != config.lora_dropout:
        raise ConfigError(f"{w.name!r} has dropout {rule.dropout:g}, but lora_dropout={config.lora_dropout:g}.")
    for head in HEADS.get(config.task_type or "", ()):
        if w.module.endswith(head):
            raise UnsupportedError(
                f"{w.name!r}: with task_type={config.task_type!r} PEFT trains {w.module!r} in full and cannot hold a "
                f"low-rank update of it. Use config.replace(task_type=None)."
            )


def _check_full(name: str, wrapped: Sequence[PeftTarget], config: LoraConfig) -> None:
    owner, _, leaf = name.rpartition(".")
    is_bias = leaf == "bias" and (
        config.bias == "all" or (config.bias == "lora_only" and owner in {w.owner for w in wrapped})
    )
    if not is_bias and not saved_above(name, config):
        raise UnsupportedError(
            f"{name!r} is trained in full, but a PEFT folder holds only biases (bias={config.bias!r}) and the modules "
            f"of modules_to_save ({config.modules_to_save!r}). Name its module there, or merge it. {_INSTEAD}"
        )


def _check_entries(
    wrapped: Sequence[PeftTarget], full: Sequence[str], saved: Sequence[str], config: LoraConfig
) -> None:
    """The entries of the configuration against the adapters."""
    if not wrapped:
        raise ConfigError("there is no low-rank adapter to save; PEFT needs at least one.")
    modules = [w.module for w in wrapped if not w.by_parameter]
    parameters = [w.name for w in wrapped if w.by_parameter]
    listed: list[tuple[str, Collection[str], Sequence[str]]] = [
        ("target_parameters", config.target_parameters or (), parameters),
        ("modules_to_save", config.modules_to_save or (), saved),
    ]
    # An entry may be excluded as a whole, or have no module in the layers.
    if not isinstance(config.target_modules, str) and not config.exclude_modules and not config.layers_to_transform:
        listed.append(("target_modules", config.target_modules or (), modules))
    for where, entries, have in listed:
        for entry in unnamed(entries, have):
            raise ConfigError(f"{where}: {entry!r} names none of the adapters.{near(entry, have)}")
    for field in ("rank_pattern", "alpha_pattern"):
        used = {pattern for w in wrapped for pattern in config.patterns_of(field, w.key)}
        for pattern in getattr(config, field):
            if pattern not in used:
                raise ConfigError(f"{field}: {pattern!r} matches none of the adapters.")
    if config.bias != "none" and not any(name.rpartition(".")[2] == "bias" for name in full):
        raise ConfigError(f"bias={config.bias!r}, but the adapters train no bias.")
    heads = HEADS.get(config.task_type or "", ())
    if heads and not any(module.endswith(heads) for module in saved):
        raise UnsupportedError(
            f"with task_type={config.task_type!r} PEFT trains {' and '.join(map(repr, heads))} in full and cannot load "
            "an adapter without. Name the head in modules_to_save, or use config.replace(task_type=None)."
        )


def _check_lora_biases(adapters: Adapters, wrapped: Mapping[str, PeftTarget], config: LoraConfig) -> None:
    deltas = {name: rule for name, rule in adapters.items() if isinstance(rule, Delta)}
    if deltas and not config.lora_bias:
        raise ConfigError(f"{next(iter(deltas))!r} has the rule Delta, but lora_bias=False. Set it to True.")
    owners = {f"{w.owner}.bias": w for w in wrapped.values() if not w.by_parameter}
    for name, w in owners.items() if config.lora_bias else ():
        delta, rule = deltas.pop(name, None), adapters[w.name]
        if delta is None:
            raise ConfigError(f"lora_bias=True, but the adapters have no Delta for {name!r}, the bias of {w.name!r}.")
        assert isinstance(rule, (LoRA, DoRA))
        if not math.isclose(delta.scaling, rule.scaling, rel_tol=1e-9):
            raise ConfigError(
                f"{name!r} has scaling {delta.scaling:g}, but {w.name!r} {rule.scaling:g}. PEFT has one for both."
            )
    if deltas:
        raise UnsupportedError(
            f"{next(iter(deltas))!r} is no bias of an adapted module: lora_bias has no place for it."
        )


def _check_tokens(adapters: Adapters, config: LoraConfig) -> None:
    rows = {name.rpartition(".")[0]: rule for name, rule in adapters.items() if isinstance(rule, TrainableTokens)}
    tied = {name.rpartition(".")[0]: rule.to for name, rule in adapters.items() if isinstance(rule, Tied)}
    for module, to in tied.items():
        followed = adapters[to]
        if isinstance(followed, TrainableTokens):
            rows[module] = followed
    for module, rule in rows.items():
        if type(rule.layout) is not Embedding:
            raise UnsupportedError(f"{module!r}: PEFT trains tokens of tables stored as [tokens, dim] only.")
        entries = [entry for entry in config.tokens if entry is not None and named(module, entry)]
        wanted = config.tokens.get(entries[0] if entries else None)
        if wanted is None and module in tied:
            continue
        if wanted != rule.token_indices:
            raise ConfigError(
                f"{module!r} trains the tokens {list(rule.token_indices)}, but the configuration says "
                f"{'none' if wanted is None else list(wanted)} (trainable_token_indices). Give those of the adapter."
            )
    loose = [module for module in rows if module not in tied and not any(e and named(module, e) for e in config.tokens)]
    if len(loose) > 1:
        raise ConfigError(
            f"{', '.join(map(repr, loose))} train tokens; a list of trainable_token_indices is meant for the input "
            "embeddings alone. Give a dict from the name of each table."
        )
    for entry in config.tokens:
        if not (loose if entry is None else [module for module in rows if named(module, entry)]):
            raise ConfigError(f"trainable_token_indices: {entry or 'the list'!r} names none of the adapters.")


def _tied(adapters: Adapters, wrapped: Mapping[str, PeftTarget], config: LoraConfig) -> dict[str, PeftTarget]:
    """The output layers that follow the low-rank rule of an embedding."""
    ties = {name: rule.to for name, rule in adapters.items() if isinstance(rule, Tied)}
    for name, why in unsupported_ties({name: type(adapters[to]) for name, to in ties.items()}, ties, config):
        raise UnsupportedError(f"{name!r} cannot be saved for PEFT: {why} {_INSTEAD}")
    layers = {name: output_layer(name, wrapped[to]) for name, to in ties.items() if to in wrapped}
    for w in layers.values():
        _check_numbers(w, adapters[ties[w.name]], config)
    return layers

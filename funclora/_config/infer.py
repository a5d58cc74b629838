"""The configuration of adapters that were computed from other adapters."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.covers import covers
from funclora._config.layers import weights_of
from funclora._config.names import named_among, unnamed
from funclora._config.targets import select
from funclora.errors import ConfigError, PeftFormatWarning, TargetError
from funclora.rules.base import Adapters, Rule
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Conv1D, Layout, Linear, Parameter
from funclora.rules.low_rank import LowRank

# The fields that select modules.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def configured(adapters: Adapters, sources: Sequence[LoraConfig]) -> tuple[dict[str, Rule], LoraConfig]:
    """The configuration with which PEFT computes the same result from the adapters.

    Args:
        adapters: full parameter name -> rule.
        sources: the configurations of the adapters that these were computed from; together they have the same targets.

    Returns:
        The adapters and the configuration. A configuration has only one dropout, so adapters with different dropouts
        are returned without it. Ranks and alphas are the most common ones, with exact patterns for the rest.

    Raises:
        ConfigError: no single configuration can express the sources together.
    """
    parameters = _union(config.target_parameters for config in sources)
    low_rank = {name: rule for name, rule in adapters.items() if isinstance(rule, LowRank)}
    if not low_rank:
        raise ConfigError("there is no low-rank adapter to save; PEFT needs at least one.")
    dropouts = {rule.dropout for rule in low_rank.values()}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    entries, idle = frozenset(parameters), frozenset(unnamed(parameters, low_rank))
    modules = {name: name.rpartition(".")[0] for name in low_rank if not named_among(name, entries)}
    keys = {name: modules.get(name, name) for name in low_rank}
    ranks = {keys[name]: rule.r for name, rule in low_rank.items()}
    alphas = {keys[name]: _number(float(rule.scaling) * rule.r) for name, rule in low_rank.items()}
    r, rank_pattern = _most_common(ranks)
    alpha, alpha_pattern = _most_common(alphas)
    linear = {module: isinstance(low_rank[name].layout, (Linear, Conv1D)) for name, module in modules.items()}
    config = replace(
        sources[0],
        **_targets(linear, sources),
        r=int(r),
        lora_alpha=alpha,
        rank_pattern={pattern: int(rank) for pattern, rank in rank_pattern.items()},
        alpha_pattern=alpha_pattern,
        lora_dropout=dropout,
        use_rslora=False,
        use_dora=all(isinstance(rule, DoRA) for rule in low_rank.values()),
        bias=_only("bias", [config.bias for config in sources]),
        modules_to_save=_union(config.modules_to_save for config in sources) or None,
        init_lora_weights=True,
        target_parameters=tuple(entry for entry in parameters if entry not in idle) or None,
        task_type=_only("task_type", [config.task_type for config in sources if config.task_type]),
        base_model_name_or_path=_base(sources),
    )
    found = {
        name: replace(rule, dropout=dropout) if isinstance(rule, LowRank) else rule for name, rule in adapters.items()
    }
    return found, config


def layouts_of(model: nn.Module, names: Sequence[str]) -> dict[str, Layout | None]:
    """The layouts of weights, in that order: of modules, or of parameters of other modules, such as experts."""
    found = {name: (weights_of(model.get_submodule(name.rpartition(".")[0])) or {}).get("weight") for name in names}
    parameters = [name for name, layout in found.items() if not name.endswith(".weight") or layout is None]
    targets = select(model, LoraConfig(target_parameters=parameters)) if parameters else {}
    return {name: targets[name].layout if name in targets else layout for name, layout in found.items()}


def targeting(model: nn.Module, adapters: Adapters) -> LoraConfig:
    """A configuration that targets exactly these weights of a model, by the shortest sufficient ends of names."""
    low_rank = {name: rule for name, rule in adapters.items() if isinstance(rule, LowRank)}
    biased = len(low_rank) < len(adapters)
    parameters = [name.split(".") for name, rule in low_rank.items() if isinstance(rule.layout, Parameter)]
    modules = [name.split(".")[:-1] for name, rule in low_rank.items() if not isinstance(rule.layout, Parameter)]

    def config(length: int) -> LoraConfig:
        parameter_length = length and length + 1  # with the name of the module
        return LoraConfig(
            target_modules=_ends(modules, length),
            target_parameters=_ends(parameters, parameter_length),
            lora_bias=biased,
        )

    for length in (1, 2, 0):
        with contextlib.suppress(TargetError):
            if select(model, config(length)).keys() == adapters.keys():
                return config(length)
    # A full name may also be the end of another one; an expression is matched as a whole.
    return config(0).replace(target_modules="|".join(re.escape(".".join(parts)) for parts in modules) or None)


def _ends(names: Sequence[Sequence[str]], length: int) -> list[str]:
    """The last components of names, each text once; all components if the length is 0."""
    return sorted({".".join(parts[-length:]) for parts in names})


def _targets(modules: Mapping[str, bool], sources: Sequence[LoraConfig]) -> dict[str, Any]:
    """The shortest fields that target exactly these modules, which are given as name -> is it a linear layer."""
    nothing = dict.fromkeys(_SELECTION)
    if not modules:
        return nothing
    covered = [{module for module, linear in modules.items() if covers(c, module, linear=linear)} for c in sources]
    fields = [{name: getattr(config, name) for name in _SELECTION} for config in sources]
    if all(each == modules.keys() for each in covered) and all(_same(each, fields[0]) for each in fields):
        return fields[0]
    lists = all(not isinstance(config.target_modules, str) for config in sources)
    plain = all(not config.exclude_modules and config.layers_to_transform is None for config in sources)
    if lists and plain and set().union(*covered) == modules.keys():
        # Each entry of a list selects modules on its own, so the union of lists targets the union of modules.
        return nothing | {"target_modules": _union(config.target_modules for config in sources)}
    return nothing | {"target_modules": "|".join(map(re.escape, modules))}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the fields select the same modules, in any order of names."""
    return all(_unordered(one[name]) == _unordered(other[name]) for name in _SELECTION)


def _unordered(value: Any) -> Any:
    return frozenset(value) if isinstance(value, tuple) else value


def _most_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and exact patterns for the others."""
    common, _ = Counter(values.values()).most_common(1)[0]
    return common, {exactly(key): value for key, value in values.items() if value != common}


def exactly(name: str) -> str:
    """The key of `rank_pattern` and `alpha_pattern` that matches only this name."""
    # PEFT puts "anything and a dot" before a pattern; "^" keeps it from matching the end of a longer name.
    return f"^{re.escape(name)}"


def _number(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha


def _union(several: Iterable[Collection[str] | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for entries in several for entry in entries or ()))


def _only(field: str, values: Iterable[Any]) -> Any:
    """The one value that a field has in all adapters; None if there is none."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise ConfigError(
            f"{field}: the adapters have {' and '.join(map(repr, found))}, but a configuration has one value. "
            "Combine them in Python (funclora.algebra), and merge the result into the base."
        )
    return found[0] if found else None


def _base(sources: Sequence[LoraConfig]) -> str | None:
    paths = list(dict.fromkeys(c.base_model_name_or_path for c in sources if c.base_model_name_or_path))
    if len(paths) > 1:
        warnings.warn(
            f"base_model_name_or_path: the adapters name {' and '.join(map(repr, paths))}; a combination is valid only "
            f"if these are the same model. {paths[0]!r} is written.",
            PeftFormatWarning,
            stacklevel=4,
        )
    return paths[0] if paths else None

"""Convert an adapter of decomposed weights to one of the original weights."""

from __future__ import annotations

import math
from dataclasses import replace

from funclora._bind.checks import check_rules
from funclora._config.checks import check_config
from funclora._config.config import LoraConfig
from funclora.algebra._sums import concatenated
from funclora.algebra._terms import Term, gather
from funclora.errors import ConfigError, ParamsError, UnsupportedError
from funclora.rules.base import Adapters, Rule
from funclora.rules.low_rank import LoRA, LowRank


def relative_to_original(
    adapters: Adapters, initial: Adapters, config: LoraConfig
) -> tuple[dict[str, Rule], LoraConfig]:
    """An adapter of rank 2r for the original weights, which gives the same rewritten weights.

    `decompose` replaced a weight W by W − s·B₀·A₀, and training changed B₀·A₀ to B·A. So the rewritten weight is
    W + s·(B·A − B₀·A₀) = W + s·B'·A' with A' = [A; A₀] and B' = [B, −B₀]. This is exact up to the rounding with which
    `decompose` stored the new base weight in its dtype. DoRA normalises the same sum, so its magnitudes do not change.

    In PEFT this is `path_initial_model_for_weight_conversion`, which cannot convert DoRA or rsLoRA with patterns.

    Args:
        adapters: the adapters to convert, full parameter name -> rule.
        initial: the adapters as `decompose` returned them.
        config: their configuration.

    Returns:
        The adapters for the original weights, and their configuration: ranks and alphas are doubled (alphas are
        multiplied by √2 with rsLoRA), `init_lora_weights` is True. `save_peft` and PEFT accept them like any others.

    Raises:
        ConfigError: the configuration's initialisation does not change base weights.
        UnsupportedError: it is "loftq", whose base differs from the original by more than a low-rank update.
        ParamsError: `adapters` and `initial` are not of one decomposition.

    Examples:
        >>> from torch import nn
        >>> from funclora import decompose
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        >>> config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights="pissa")
        >>> params, initial = decompose(model, config)
        >>> plain, plain_config = relative_to_original(initial, initial, config)
        >>> plain["0.weight"].r, plain["0.weight"].scaling, plain_config.lora_alpha
        (4, 2.0, 8)
    """
    check_rules(adapters)
    check_rules(initial, "initial")
    check_config(config)
    if config.decomposition is None:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} does not change the base weights: the adapter is "
            "already relative to them."
        )
    if config.decomposition == "loftq":
        raise UnsupportedError(
            "init_lora_weights='loftq': the quantised weights differ from the original ones by an error of full rank, "
            "which a low-rank adapter cannot correct. Keep the adapter with the quantised weights, and save it with "
            "config.replace(init_lora_weights=True)."
        )
    if adapters.keys() != initial.keys():
        name = min(adapters.keys() ^ initial.keys())
        raise ParamsError(f"{name!r} has a rule in one of adapters and initial, but not in the other.")
    converted: dict[str, Rule] = dict(adapters)
    low_rank = [{n: rule for n, rule in each.items() if isinstance(rule, LowRank)} for each in (adapters, initial)]
    gather(low_rank, None)  # raises if they do not match
    for name, rule in adapters.items():
        if not isinstance(rule, LowRank):
            continue
        first = initial[name]
        if not isinstance(first, LowRank) or first.scaling != rule.scaling or first.r != rule.r:
            raise ParamsError(
                f"{name!r}: initial has another rule, rank or scaling than adapters. Give the adapters that decompose "
                "returned for this training."
            )
        terms = [
            LoRA(rule.a, rule.b, scaling=rule.scaling, layout=rule.layout),
            LoRA(first.a, -first.b, scaling=rule.scaling, layout=first.layout),
        ]
        both = concatenated(name, [Term.of(1.0, term) for term in terms])
        converted[name] = replace(rule, a=both.a, b=both.b)
    factor = math.sqrt(2) if config.use_rslora else 2
    return converted, config.replace(
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * r for pattern, r in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )

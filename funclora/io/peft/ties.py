"""Weights that a model ties, as in PEFT's `ensure_weight_tying`.

PEFT adapts the input embeddings, and the output layer, a linear layer with the same weight, shares the factors: A of
the one is Bᵀ of the other. Both are in the file, but not in the lists of the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from funclora._config.config import LoraConfig
from funclora._config.names import named
from funclora._config.regex import matches
from funclora.errors import ConfigError, ParamsError
from funclora.io.peft.keys import PeftTarget
from funclora.rules.base import Adapters
from funclora.rules.dense import Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Linear
from funclora.rules.low_rank import LoRA
from funclora.rules.tokens import Tied


def output_layer(name: str, table: PeftTarget) -> PeftTarget:
    """The weight of an output layer that follows the low-rank rule of an embedding."""
    return PeftTarget(name, name.rpartition(".")[0], Linear(), table.shape, by_parameter=False)


def tied_as_in_peft(config: LoraConfig, adapters: Adapters) -> LoraConfig:
    """The configuration with the input embeddings in its lists, and without the modules tied to them.

    Raises:
        ConfigError: adapters are tied and the configuration does not say so, or the other way round.
        ParamsError: a parameter is tied to one that has no rule.
    """
    ties: dict[str, str] = {}
    for name, rule in adapters.items():
        if isinstance(rule, Tied):
            if isinstance(adapters.get(rule.to, rule), Tied):
                raise ParamsError(f"{name!r} is tied to {rule.to!r}, which has no rule of its own.")
            ties[name.rpartition(".")[0]] = rule.to
    if config.ensure_weight_tying and not ties:
        raise ConfigError("ensure_weight_tying=True, but the adapters tie nothing. Set it to False.")
    for module, to in ties.items():
        if isinstance(adapters[to], (LoRA, DoRA, Full)) and not config.ensure_weight_tying:
            raise ConfigError(
                f"{module!r} is tied to {to!r}, but ensure_weight_tying=False. Set it to True. If the model holds one "
                "module under both names, give save_peft the model: save_peft(..., model=model)."
            )
    changes: dict[str, object] = {}
    for field, kinds in (("target_modules", (LoRA, DoRA)), ("modules_to_save", (Full,))):
        tied = [module for module, to in ties.items() if isinstance(adapters[to], kinds)]
        entries = getattr(config, field) or ()
        for table in {ties[module].rpartition(".")[0] for module in tied}:
            if isinstance(entries, str):
                if not matches(entries, table):
                    changes[field] = entries = f"(?:{entries})|{re.escape(table)}"
            else:
                kept = [entry for entry in entries if not _names_only(entry, tied, adapters)]
                changes[field] = entries = kept if any(named(table, e) for e in kept) else [*kept, table]
    return config.replace(**changes) if changes else config


def _names_only(entry: str, tied: Collection[str], adapters: Adapters) -> bool:
    """Whether an entry names tied modules and nothing else that is adapted."""
    others = {name.rpartition(".")[0] for name in adapters} - {*tied}
    return any(named(module, entry) for module in tied) and not any(named(other, entry) for other in others)

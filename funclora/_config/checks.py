"""The check of a configuration argument, shared by all public functions."""

from __future__ import annotations

from collections.abc import Mapping

from funclora._api.arguments import refuse
from funclora._config.config import LoraConfig


def check_config(config: object, where: str = "config") -> None:
    """Raise `ArgumentError` unless the argument is a configuration."""
    if isinstance(config, LoraConfig):
        return
    remedy = "Make one: LoraConfig(r=..., target_modules=...)."
    if isinstance(config, Mapping):
        remedy = "Convert a dict of fields: LoraConfig(**fields)."
    elif isinstance(config, str):
        remedy = f"Targets are one of its fields: LoraConfig(target_modules={config!r:.80})."
    elif hasattr(config, "peft_type"):
        remedy = "Convert PEFT's: LoraConfig.from_peft(config)."
    refuse(where, "a LoraConfig", config, remedy)

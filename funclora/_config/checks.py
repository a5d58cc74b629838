"""The check of a configuration that all public functions share."""

from __future__ import annotations

from collections.abc import Mapping

from funclora._api.arguments import refuse
from funclora._config.config import LoraConfig


def check_config(config: object, where: str = "config") -> None:
    """Raise `ArgumentError` unless that is a configuration."""
    if isinstance(config, LoraConfig):
        return
    remedy = "LoraConfig(r=..., target_modules=...) makes one."
    if isinstance(config, Mapping):
        remedy = "A dict of fields becomes one: LoraConfig(**fields)."
    elif isinstance(config, str):
        remedy = f"Targets are a field of it: LoraConfig(target_modules={config!r:.80})."
    elif hasattr(config, "peft_type"):
        remedy = "PEFT's becomes one: LoraConfig.from_peft(config)."
    refuse(where, "a LoraConfig", config, remedy)

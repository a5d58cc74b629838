"""Whether a configuration names a module, decided by names alone, without a model."""

from __future__ import annotations

import re

from funclora._config.config import LAYER, LoraConfig


def covers(config: LoraConfig, module: str, *, linear: bool) -> bool:
    """True if `target_modules` targets the module with this full name; "all-linear" means those with `linear`."""
    if config.names("exclude_modules", module):
        return False
    if not config.target_modules or saved_above(f"{module}.weight", config):
        return False
    if config.all_linear:
        return linear
    if not config.names("target_modules", module):
        return False
    layers = config.layers
    return layers is None or config.names_fully("target_modules", module) or layer_of(config, module) in layers


def layer_of(config: LoraConfig, name: str) -> int | None:
    """The index of the layer that contains a module, as `layers_to_transform` counts layers."""
    patterns = [LAYER.format(p) for p in config.layers_pattern or ()]
    patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((m for m in (re.match(p, name) for p in patterns) if m), None)
    return int(found["idx"]) if found else None


def saved_above(name: str, config: LoraConfig) -> list[str]:
    """The full names of the modules of `modules_to_save` that contain a parameter."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [path for path in paths if config.names("modules_to_save", path)]

"""Whether a configuration names a module, asked of names alone."""

from __future__ import annotations

from collections.abc import Collection

from funclora._config.config import LoraConfig
from funclora._config.names import layer_of, named
from funclora._config.regex import matches


def covers(config: LoraConfig, module: str, *, linear: bool) -> bool:
    """True if `target_modules` targets the module of that full name; `linear` is what "all-linear" is about."""
    if config.exclude_modules and _matches(module, config.exclude_modules):
        return False
    if not config.target_modules or saved_above(f"{module}.weight", config):
        return False
    if config.all_linear:
        return linear
    if not _matches(module, config.target_modules):
        return False
    layers = config.layers
    return layers is None or module in config.target_modules or layer_of(config, module) in layers


def _matches(name: str, wanted: Collection[str]) -> bool:
    if isinstance(wanted, str):
        return matches(wanted, name)
    return any(named(name, entry) for entry in wanted)


def saved_above(name: str, config: LoraConfig) -> list[str]:
    """The full names of the modules of `modules_to_save` that a parameter lies in."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return [path for path in paths if any(named(path, entry) for entry in config.modules_to_save or ())]

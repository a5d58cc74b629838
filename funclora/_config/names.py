"""How entries of lists match the full names of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable

from funclora._config.config import LAYER, LoraConfig


def layer_of(config: LoraConfig, name: str) -> int | None:
    """The index of the layer that a module lies in, as `layers_to_transform` counts them."""
    patterns = [LAYER.format(p) for p in config.layers_pattern or ()]
    patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((m for m in (re.match(p, name) for p in patterns) if m), None)
    return int(found["idx"]) if found else None


def named(name: str, entry: str) -> bool:
    """PEFT's rule for entries of lists: the full name, or its last components."""
    return name == entry or name.endswith(f".{entry}")


def inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def suffixes(names: Iterable[str]) -> list[str]:
    """Last components first, then full names: what a user is likely to have meant."""
    listed = [n for n in names if n]
    return [*dict.fromkeys(n.rpartition(".")[2] for n in listed), *listed]

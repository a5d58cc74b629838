"""The reference of preferences: what the adapters at the start, the base or a folder say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optree

from funclora._apps.train.adapters import Start, check_head
from funclora._apps.train.base import Base
from funclora._apps.train.preference_loss import FREE, PreferenceBase
from funclora._apps.train.settings import PREFERENCE, Settings
from funclora.errors import ConfigError
from funclora.io.hf.origin import check_origin
from funclora.io.peft.folder import load_peft
from funclora.rules.base import Adapters, Rule
from funclora.rules.low_rank import LowRank

START, BASE = WORDS = ("start", "base")  # of settings.reference; all else is a folder


def with_preferences(start: Start, settings: Settings) -> Start:
    """A start whose base has the losses of preferences.

    Raises:
        ConfigError: the reference is neither a word nor a folder, or not what the adapters start from.
        FuncloraError: its folder cannot be read, or does not fit the model.
    """
    return replace(start, base=preferring(start.base, _reference(start, settings), settings))


def preferring(base: Base, reference: Adapters, settings: Settings) -> PreferenceBase:
    """A base with the losses of preferences."""
    own = {field.name: getattr(base, field.name) for field in fields(Base)} | {"task": PREFERENCE}
    return PreferenceBase(**own, settings=settings, reference=dict(reference))


def _reference(start: Start, settings: Settings) -> Mapping[str, Rule]:
    if settings.loss in FREE:
        return {}
    if settings.reference == START:
        return {} if settings.adapter is None and _changes_nothing(start) else start.adapters
    if settings.reference == BASE:
        return base_reference(start)
    return load_reference(start.base, settings)


def base_reference(start: Start) -> Mapping[str, Rule]:
    """The adapters with which the base is as it was loaded.

    Raises:
        ConfigError: there are none, since the adapters make up for what quantisation took away.
    """
    if start.config.decomposition is None:
        return {}
    if start.config.decomposition == "loftq":
        raise ConfigError("reference: with init loftq the base is never run without an adapter. Set it to start.")
    return start.adapters  # which give back the part of the weights that they took


def load_reference(base: Base, settings: Settings) -> dict[str, Rule]:
    """The adapters of a folder, on the device of a base.

    Raises:
        ConfigError: there is no such folder.
        FuncloraError: it cannot be read, or does not fit the model.
    """
    folder = Path(settings.reference)
    if not folder.is_dir():
        raise ConfigError(
            f"reference: expected {START}, {BASE} or a PEFT folder, and there is no folder {settings.reference!r}."
        )
    tree: Any
    tree, _ = load_peft(folder, base.model)
    check_origin([folder], settings.model)
    check_head(base, tree, str(folder))
    moved: Any = optree.tree_map(lambda leaf: leaf.to(base.device), tree)
    return dict(moved)


def _changes_nothing(start: Start) -> bool:
    """Whether fresh adapters leave the base as it is, so that it need not be run with them."""
    low_rank = [rule for rule in start.adapters.values() if isinstance(rule, LowRank)]
    return start.config.decomposition is None and not any(bool(rule.b.any()) for rule in low_rank)

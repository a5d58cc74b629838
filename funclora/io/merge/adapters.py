"""Several adapter folders with weights, as one source of rules that are read on demand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from funclora.errors import ConfigError, FormatError, PeftFormatWarning, UnsupportedError
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.folder import PeftFolder
from funclora.rules.base import Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.low_rank import lora_of
from funclora.rules.tokens import Tied, TrainableTokens, untied

V = TypeVar("V")

_KINDS: dict[type[Rule], str] = {
    Delta: "adds to it",
    DoRA: "is a DoRA adapter",
    Full: "fully fine-tunes it",
    TrainableTokens: "fully fine-tunes rows of it",
}


class LazyMapping(Mapping[str, V]):
    """A mapping whose values are made at every access, so that none is kept in memory."""

    def __init__(self, names: Sequence[str], make: Callable[[str], V]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> V:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WeightedAdapters:
    """The adapters of a merge.

    Args:
        folders: their folders.
        weights: the factor of each adapter's update; 1 by default.
        model: the model, on the meta device.
        base: full name -> base weight, for every name of the model.

    Attributes:
        folders: their folders.
        weights: the factor of each adapter's update.
        names: the parameters that they rewrite, in the order of the model.
        words: full name -> description of the change.
        full: the names that are replaced, not updated.
    """

    def __init__(
        self, folders: Sequence[Path], weights: Sequence[float] | None, model: nn.Module, base: Mapping[str, Tensor]
    ) -> None:
        if not folders:
            raise ConfigError("adapter_dirs: give at least one adapter folder.")
        self.folders, self._base = tuple(folders), base
        self.weights = tuple(1.0 for _ in folders) if weights is None else tuple(weights)
        if len(self.weights) != len(folders):
            raise ConfigError(f"weights: expected one for each of {len(folders)} adapters, got {len(self.weights)}.")
        for weight in self.weights:
            if not math.isfinite(weight) or weight == 0:
                raise ConfigError(f"weights: expected finite numbers other than 0, got {weight!r}.")
        self._opened = [PeftFolder(AdapterFiles(folder), model, base) for folder in self.folders]
        for opened in self._opened:
            if opened.config.decomposition:
                raise UnsupportedError(
                    f"{opened.folder}: init_lora_weights={opened.config.init_lora_weights!r}: the adapter "
                    "belongs to decomposed weights. Convert it to the original weights: save_peft(new_folder, "
                    "*load_peft(folder, model))."
                )
        have = {name for opened in self._opened for name in opened.targets}
        self.names = [name for name in self._opened[0].weights if name in have]
        self.words: dict[str, str] = {}
        self.full: set[str] = set()

    def check(self) -> None:
        """Read every rule once, before anything is written.

        Raises:
            FormatError: a file is broken, contains a key that fits no weight, or an adapter changes nothing.
            UnsupportedError: adapters change the same parameter in a way that depends on their order.
            NonFiniteError: a tensor of an adapter contains NaN or infinity.
        """
        acting: set[int] = set()
        for name in self.names:
            rules = self._given(name)
            for index, rule in rules:
                lora = lora_of(rule)
                if lora is None or (lora.a.any() and lora.b.any()):
                    acting.add(index)
            self._refuse(name, rules)
            self.words[name] = " + ".join(self._words(index, rule) for index, rule in rules)
            if isinstance(rules[0][1], Full):
                self.full.add(name)
        for index, opened in enumerate(self._opened):
            if index not in acting:
                raise FormatError(f"{opened.folder}: all its updates are zero, so merging it would change nothing.")
            opened.refuse_rest(self._base, LazyMapping([*opened.targets], opened.rule))
            for message in opened.differences():
                warnings.warn(f"{opened.folder}: {message}", PeftFormatWarning, stacklevel=4)

    def rules(self, name: str) -> list[Rule]:
        """The changes of a parameter, in order."""
        rules = []
        for index, rule in self._given(name):
            weight = self.weights[index]
            lora = lora_of(rule)
            rules.append(rule if lora is None else lora.scaled(weight))
        return rules

    def follows(self, name: str) -> str | None:
        """The parameter with which this one shares its new value, because the only adapter of both ties them."""
        (target, *others) = [opened.targets[name] for opened in self._opened if name in opened.targets]
        return target.tied_to if target.rule is Tied and not others else None

    def _given(self, name: str) -> list[tuple[int, Rule]]:
        return [(i, _followed(opened, name)) for i, opened in enumerate(self._opened) if name in opened.targets]

    def _refuse(self, name: str, rules: Sequence[tuple[int, Rule]]) -> None:
        others_than_lora = [(i, rule) for i, rule in rules if lora_of(rule) is None]
        if not others_than_lora:
            return
        index, rule = others_than_lora[0]
        kind = _KINDS.get(type(rule), f"has a {type(rule).__name__} rule")
        if len(rules) > 1:
            others = ", ".join(str(self.folders[i]) for i, _ in rules if i != index)
            raise UnsupportedError(
                f"{name!r} is rewritten by several adapters, and {self.folders[index]} {kind}: so the result would "
                f"depend on the order of it and {others}. Only LoRA updates can be added."
            )
        if self.weights[index] != 1:
            raise UnsupportedError(
                f"weights: {self.folders[index]} has the weight {self.weights[index]:g}, but {kind} at {name!r}, and "
                "only LoRA updates can be scaled. Give it the weight 1."
            )

    def _words(self, index: int, rule: Rule) -> str:
        if isinstance(rule, TrainableTokens):
            return f"{len(rule.token_indices)} new rows"
        if rule.r is None:
            return "added values" if isinstance(rule, Delta) else "new value"
        weight = self.weights[index]
        factor = "" if weight == 1 else f"{weight:g} × "
        return f"{factor}{type(rule).__name__} r={rule.r}"


def _followed(opened: PeftFolder, name: str) -> Rule:
    """The rule of a parameter; for a tied parameter, the rule of the one that it follows."""
    rule = opened.rule(name)
    return untied({name: rule, rule.to: opened.rule(rule.to)})[name] if isinstance(rule, Tied) else rule

"""What an adapter does to one parameter, as determined by the selection of targets."""

from __future__ import annotations

from dataclasses import dataclass

from funclora.rules.base import Rule
from funclora.rules.dense import Full
from funclora.rules.layouts import Layout


@dataclass(frozen=True)
class Target:
    """One parameter that an adapter rewrites.

    Attributes:
        module: full name of the module that was matched (for `target_parameters`, of the owner).
        layout: how the low-rank update is placed in the weight, or None for the other rules.
        r: the rank.
        scaling: s.
        rule: the class of its rule.
        tokens: the rows of a `TrainableTokens`.
        tied_to: the parameter that a `Tied` rule follows.
    """

    module: str
    layout: Layout | None
    r: int = 0
    scaling: float = 1.0
    rule: type[Rule] = Full
    tokens: tuple[int, ...] = ()
    tied_to: str = ""

"""The search space: options as they are typed, and the members that they define.

Does not need torch, so that errors in options are found before slow imports.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from funclora._config.config import LoraConfig
from funclora.errors import ConfigError, near

METHODS = ("lora", "dora")
INITS: dict[str, Any] = {"true": True, "false": False, "gaussian": "gaussian", "orthogonal": "orthogonal"}

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """One candidate.

    Attributes:
        id: its number in the search.
        lr: peak learning rate.
        rank: r.
        alpha: α.
        targets: "all-linear", or names of modules joined by "+".
        method: "lora" or "dora".
        init: PEFT's `init_lora_weights`, in lower case.
        seed: determines the adapter's initial values, its dropout and the order of its data.
        dropout: probability on the inputs of the adapter.
        beta: of the loss of preferences; None for its default.
    """

    id: int
    lr: float
    rank: int
    alpha: float
    targets: str
    method: str
    init: str
    seed: int
    dropout: float = 0.0
    beta: float | None = None

    def config(self, **more: Any) -> LoraConfig:
        """The adapter's configuration, with further fields."""
        targets = self.targets if self.targets == "all-linear" else self.targets.split("+")
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            use_dora=self.method == "dora",
            init_lora_weights=INITS[self.init],
            lora_dropout=self.dropout,
            **more,
        )

    @property
    def values(self) -> dict[str, Any]:
        """The options that are searched, by name."""
        values = asdict(self)
        del values["id"]
        return values


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, sampled log-uniformly."""

    low: float
    high: float

    def draw(self, u: float) -> float:
        """The number at the place `u` in [0, 1); four digits, so that it can be typed again."""
        return float(f"{self.low * (self.high / self.low) ** u:.4g}")


@dataclass(frozen=True)
class Dimension(Generic[T]):
    """One option: the values listed, or a range."""

    name: str
    values: Sequence[T] | Range


@dataclass(frozen=True)
class Space:
    """The options of a search as they were typed.

    Attributes:
        lr: numbers, or a range `1e-4:1e-2`.
        rank: integers, or a range.
        alpha: numbers, multiples of the rank such as `2r`, or a range.
        targets: `all-linear` or names joined by "+".
        method: of `METHODS`.
        init: of `INITS`.
        seeds: integers.
        dropout: numbers from 0, below 1.
        beta: `auto`, or numbers, or a range.
    """

    lr: str = "1e-3,3e-3,1e-2,3e-2"
    rank: str = "4,16"
    alpha: str = "2r"
    targets: str = "all-linear,q_proj+v_proj"
    method: str = "lora,dora"
    init: str = "true"
    seeds: str = "0"
    dropout: str = "0"
    beta: str = "auto"

    def dimensions(self) -> tuple[Dimension[Any], ...]:
        """The options, parsed.

        Raises:
            ConfigError: an option cannot be read.
        """
        return (
            _numbers("lr", self.lr, float),
            _numbers("rank", self.rank, int),
            _numbers("alpha", self.alpha, _alpha),
            Dimension("targets", _listed("targets", self.targets)),
            _names("method", self.method, METHODS),
            _names("init", self.init, INITS),
            Dimension("seeds", [_number("seeds", text, int) for text in _listed("seeds", self.seeds)]),
            Dimension("dropout", [_number("dropout", text, float) for text in _listed("dropout", self.dropout)]),
            Dimension("beta", [None]) if self.beta == "auto" else _numbers("beta", self.beta, float),
        )

    def grid(self) -> list[Member]:
        """Every combination.

        Raises:
            ConfigError: an option cannot be read, or is a range.

        Examples:
            >>> [(m.lr, m.rank, m.alpha) for m in Space(lr="1e-3", rank="2,4", targets="a", method="lora").grid()]
            [(0.001, 2, 4.0), (0.001, 4, 8.0)]
        """
        listed = []
        for dimension in self.dimensions():
            if isinstance(dimension.values, Range):
                raise ConfigError(f"--{dimension.name}: a range needs a number of samples; add --random 32.")
            listed.append(dimension.values)
        return [_member(i, chosen) for i, chosen in enumerate(itertools.product(*listed))]

    def draws(self, n: int, seed: int) -> list[Member]:
        """n random combinations. The first ones are the same for every n.

        Raises:
            ConfigError: an option cannot be read.
        """
        dimensions = self.dimensions()
        return [_member(i, [_draw(d, random.Random(f"{seed}:{i}:{d.name}")) for d in dimensions]) for i in range(n)]


def _draw(dimension: Dimension[Any], rng: random.Random) -> Any:
    values, u = dimension.values, rng.random()
    if not isinstance(values, Range):
        return values[int(u * len(values))]
    number = values.draw(u)
    return round(number) if dimension.name == "rank" else number


def _member(i: int, chosen: Sequence[Any]) -> Member:
    lr, rank, alpha, targets, method, init, seed, dropout, beta = chosen
    alpha = alpha(rank) if callable(alpha) else alpha
    member = Member(i, lr, rank, float(alpha), targets, method, init, seed, dropout, beta)
    member.config()  # for its errors, before anything was trained
    return member


def _listed(name: str, text: str) -> list[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ConfigError(f"--{name}: expected values with commas between them, got {text!r}.")
    return list(dict.fromkeys(entries))


def _names(name: str, text: str, known: Any) -> Dimension[str]:
    entries = [entry.lower() for entry in _listed(name, text)]
    for entry in entries:
        if entry not in known:
            raise ConfigError(f"--{name}: expected some of {', '.join(known)}, got {entry!r}.{near(entry, known, 1)}")
    return Dimension(name, entries)


def _numbers(name: str, text: str, kind: Callable[[str], T]) -> Dimension[T]:
    if ":" not in text:
        return Dimension(name, list(dict.fromkeys(_number(name, entry, kind) for entry in _listed(name, text))))
    ends = text.split(":")
    if len(ends) != 2:
        raise ConfigError(f"--{name}: expected a range low:high, got {text!r}.")
    low, high = (_number(name, end.strip(), float) for end in ends)
    if low >= high:
        raise ConfigError(f"--{name}: expected a range whose first number is the lower one, got {text!r}.")
    return Dimension(name, Range(low, high))


def _number(name: str, text: str, kind: Callable[[str], T]) -> T:
    try:
        value = kind(text)
    except ValueError:
        value = None
    within = (
        not isinstance(value, int | float)
        or {
            "seeds": lambda: 0 <= value < 2**63,
            "dropout": lambda: 0 <= value < 1,
        }.get(name, lambda: 0 < value < math.inf)()
    )
    if value is None or not within:
        what = {
            "rank": "a positive integer", "seeds": "an integer from 0", "alpha": "a positive number or 2r",
            "dropout": "a number from 0, below 1",
        }  # fmt: skip
        raise ConfigError(f"--{name}: expected {what.get(name, 'a positive number')}, got {text!r}.") from None
    return value


class _Multiple(float):
    """A multiple of the rank."""

    def __call__(self, rank: int) -> float:
        return float(self) * rank


def _alpha(text: str) -> float:
    return _Multiple(text[:-1] or "1") if text.endswith("r") else float(text)

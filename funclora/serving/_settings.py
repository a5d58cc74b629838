"""What a request may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from funclora._api.arguments import kind_of
from funclora.errors import ConfigError

COLDEST = 1e-5  # temperature; logits divided by less may be infinite


@dataclass(frozen=True)
class Settings:
    """How the tokens of one answer are chosen, and when it ends.

    Attributes:
        max_tokens: maximum number of generated tokens.
        temperature: divides the logits, at least 0.00001; 0 takes the most likely token.
        top_p: sample from the most likely tokens of this total probability.
        seed: of the samples, which then depend on nothing but the request; None for a different one each time.
        stop_ids: tokens that end the answer, besides the end tokens of the engine.
        logprobs: also give the log-probability of each token, and of this many of the most likely ones; None for
            neither.

    Raises:
        ConfigError: a value is out of its range. The message names the field.

    Examples:
        >>> Settings(max_tokens=64, temperature=0.0).top_p
        1.0
        >>> Settings(top_p=2.0)
        Traceback (most recent call last):
        funclora.errors.ConfigError: top_p: expected a number greater than 0 and at most 1, got 2.0.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, right: bool, expected: str) -> None:
            if not right:
                raise ConfigError(f"{name}: expected {expected}, got {kind_of(getattr(self, name))}.")

        check("max_tokens", _is_int(self.max_tokens) and self.max_tokens > 0, "a positive int")
        warm = _is_number(self.temperature) and (not self.temperature or self.temperature >= COLDEST)
        check("temperature", warm, f"0, or a finite number of at least {COLDEST:g}")
        check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number greater than 0 and at most 1")
        seeds = "None or an int from 0 to 2**63 - 1"
        check("seed", self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63), seeds)
        ids = isinstance(self.stop_ids, (tuple, list)) and all(_is_int(i) and i >= 0 for i in self.stop_ids)
        check("stop_ids", ids, "a tuple of token ids")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        logprobs = self.logprobs is None or (_is_int(self.logprobs) and self.logprobs >= 0)
        check("logprobs", logprobs, "None or an int of at least 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

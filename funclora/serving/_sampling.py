"""The choice of the next token of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funclora.errors import NonFiniteError
from funclora.serving._settings import Settings
from funclora.serving._stream import Token


class Chooser:
    """Chooses the tokens of one answer: its samples depend on its own generator only.

    Args:
        settings: those of the request.
        device: of the logits.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self._generator: torch.Generator | None = None
        if settings.temperature:
            self._generator = torch.Generator(device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)

    def drawn(self, logits: Tensor) -> Tensor:
        """`[1, vocabulary]` -> `[1]`, in the order of transformers: temperature, then top-p."""
        logits = logits / self.settings.temperature
        if self.settings.top_p < 1:
            ordered, places = logits.sort(descending=False)
            dropped = ordered.softmax(-1).cumsum(-1) <= 1 - self.settings.top_p
            dropped[..., -1] = False
            logits = logits.masked_fill(dropped.scatter(-1, places, dropped), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[:, 0]


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | NonFiniteError]:
    """The next token of each row.

    Args:
        logits: `[rows, vocabulary]`.
        choosers: of the rows.

    Returns:
        For each row its token, or the error that its logits are not numbers.
    """
    logits = logits.float()
    best, ids = logits.max(-1)
    finite = best.isfinite().tolist()
    chosen: list[int] = ids.tolist()
    tokens: list[Token | NonFiniteError] = []
    for i, (chooser, right) in enumerate(zip(choosers, finite, strict=True)):
        if not right:
            tokens.append(NonFiniteError("the model's logits are NaN or infinite. Does the adapter hold such values?"))
            continue
        row = logits[i : i + 1]
        if chooser.settings.temperature:
            chosen[i] = int(chooser.drawn(row))
        tokens.append(_with_logprobs(chosen[i], row[0], chooser.settings.logprobs))
    return tokens


def _with_logprobs(token: int, logits: Tensor, top: int | None) -> Token:
    if top is None:
        return Token(token)
    logprobs = logits.log_softmax(-1)
    most = logprobs.topk(min(top, len(logprobs)))
    return Token(token, float(logprobs[token]), tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True)))

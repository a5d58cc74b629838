"""Answers in the form of OpenAI's interface."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from funclora._apps.serve.answers import Piece
from funclora._apps.serve.text import HALF
from funclora.serving import Token

LEAST = -9999.0  # stands for a probability of zero, which JSON has no logarithm of

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Reply:
    """The answer to one request.

    Args:
        model: as it was asked for.
        tokenizer: of transformers.
        chat: whether it is a chat.
        logprobs: how many likely tokens to list; None for no log-probabilities.
    """

    def __init__(self, model: str, tokenizer: Any, *, chat: bool, logprobs: int | None) -> None:
        self._tokenizer, self._chat, self._logprobs = tokenizer, chat, logprobs
        self._object = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def opening(self, index: int) -> Any:
        """The first part of a chat's stream, which says who speaks."""
        return self._part([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def part(self, piece: Piece) -> Any:
        """A part of a stream."""
        said = {"delta": {"content": piece.text} if piece.text else {}} if self._chat else {"text": piece.text}
        return self._part(
            [
                {
                    "index": piece.index,
                    **said,
                    "logprobs": self._probabilities(piece.tokens),
                    "finish_reason": piece.reason,
                }
            ]
        )

    def usage(self, counts: dict[str, int]) -> Any:
        """The last part of a stream whose usage was asked for."""
        return {**self._part([]), "usage": counts}

    def whole(self, pieces: Iterable[Piece], counts: dict[str, int]) -> Any:
        """All answers at once."""
        texts: dict[int, list[Piece]] = {}
        for piece in pieces:
            texts.setdefault(piece.index, []).append(piece)
        choices = []
        for index in sorted(texts):
            text = "".join(piece.text for piece in texts[index])
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            tokens = [token for piece in texts[index] for token in piece.tokens]
            choices.append(
                {
                    "index": index,
                    **said,
                    "logprobs": self._probabilities(tokens, always=True),
                    "finish_reason": texts[index][-1].reason,
                }
            )
        return {**self._head, "object": self._object, "choices": choices, "usage": counts}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = f"{self._object}.chunk" if self._chat else self._object
        return {**self._head, "object": name, "choices": choices}

    def _probabilities(self, tokens: Sequence[tuple[int, Token]], *, always: bool = False) -> Any:
        """The field `logprobs`."""
        if self._logprobs is None or not (tokens or always):
            return None
        if self._chat:
            content = [
                self._entry(token.id, token.logprob)
                | {"top_logprobs": [self._entry(*likely) for likely in token.top[: self._logprobs]]}
                for _, token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(token.id) for _, token in tokens],
            "token_logprobs": [_finite(token.logprob) for _, token in tokens],
            "top_logprobs": [self._likely(token) for _, token in tokens],
            "text_offset": [at for at, _ in tokens],
        }

    def _likely(self, token: Token) -> dict[str, float]:
        """The likely tokens and the one that was taken, by their texts; by their ids where a text is taken already."""
        assert self._logprobs is not None
        likely = dict(token.top[: self._logprobs]) | {token.id: token.logprob}
        found: dict[str, float] = {}
        for each, logprob in likely.items():
            text = self._text(each)
            found[f"token_id:{each}" if text in found else text] = _finite(logprob)
        return found

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        known = None if HALF in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": known}

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])  # type: ignore[no-any-return]


def _finite(logprob: float | None) -> float:
    assert logprob is not None  # it was asked for
    return max(logprob, LEAST)


def counts(prompt: int, generated: int) -> dict[str, int]:
    """The field `usage`."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

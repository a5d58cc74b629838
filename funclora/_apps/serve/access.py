"""One line for each request on stderr, for those who want it. No text of a request is in it, and no key."""

from __future__ import annotations

import contextlib
import datetime
import sys
from dataclasses import dataclass
from urllib.parse import quote

from starlette.requests import Request

from funclora._apps.serve.answers import Answers

ACCOUNT = "funclora.account"  # where a request's scope has it


@dataclass
class Account:
    """What there is to say of a request.

    Attributes:
        model: the base or an adapter, which exists.
        prompt_tokens: of all its prompts.
        answers: to it.
    """

    model: str | None = None
    prompt_tokens: int | None = None
    answers: Answers | None = None

    def line(self, method: str, path: str, status: int | None, seconds: float) -> str:
        """How it is told.

        Args:
            method: of HTTP.
            path: as it was asked for.
            status: of the response; None if there was none.
            seconds: that it took in all.

        Examples:
            >>> Account("ad-0", 12).line("POST", "/v1/embeddings", 200, 0.25)[25:]
            'POST /v1/embeddings status=200 model=ad-0 prompt=12 completion=- queue=- first=- total=0.250'
        """
        answers = self.answers
        said = {
            "status": status,
            "model": None if self.model is None else quote(self.model),
            "prompt": self.prompt_tokens,
            "completion": None if answers is None else answers.generated,
            "queue": None if answers is None else answers.queue_seconds,
            "first": None if answers is None else answers.first_token_seconds,
            "total": seconds,
        }
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")[:-6]
        # Quoted, so that nobody can write a second line.
        head = f"{now}Z {quote(method[:20])} {quote(path[:200])}"
        return " ".join([head, *(f"{name}={_text(value)}" for name, value in said.items())])


def account_of(request: Request) -> Account:
    """That of a request which came through the gate."""
    account: Account = request.scope[ACCOUNT]
    return account


def tell(line: str) -> None:
    """Write a line on stderr, at once and in one piece."""
    with contextlib.suppress(OSError, ValueError):  # that nobody reads it any more must not end an answer
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)

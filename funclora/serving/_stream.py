"""The answer to one request, while it comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: in the vocabulary.
        logprob: the logarithm of its probability under the model, before temperature and top_p; None if
            `Settings.logprobs` is None.
        top: the ids and log-probabilities of the most likely tokens, as many as `Settings.logprobs` says; the most
            likely one first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Stream:
    """The tokens of one answer, as they come. Made by `Engine.submit`; safe to use from many threads.

    Iterating waits for each token, and starts at the first one every time. If the answer fails, iterating and `result`
    raise its error.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._changed = threading.Condition(threading.RLock())
        self._tokens: list[Token] = []
        self._callbacks: list[Callable[[Token | None], None]] = []
        self._reason: FinishReason | None = None
        self._error: BaseException | None = None
        self._cancelled = self._done = False
        self._since = time.monotonic()
        self._queue_seconds: float | None = None
        self._first_token_seconds: float | None = None

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited for a free row, and for its adapter; None before it has one."""
        return self._queue_seconds

    @property
    def first_token_seconds(self) -> float | None:
        """The time from the request to the first token; None before it comes."""
        return self._first_token_seconds

    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled"] | None:
        """How it ended: by an end token ("stop"), `max_tokens` ("length"), "cancelled"; None before, or if it fails."""
        return self._reason

    @property
    def error(self) -> BaseException | None:
        """Why the answer failed; None if it did not."""
        return self._error

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self._done

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the answer. At most one more token comes; nothing happens if it has ended already."""
        self._cancelled = True
        self._wake()

    def add_callback(self, callback: Callable[[Token | None], None]) -> None:
        """Call a function with every token, those included that are here already, and with None at the end.

        It is called in the engine's thread, so it must be quick: `loop.call_soon_threadsafe(queue.put_nowait, token)`.
        An error that it raises ends the answer with this error.
        """
        with self._changed:
            for token in [*self._tokens, *([None] if self._done else [])]:
                callback(token)
            if not self._done:
                self._callbacks.append(callback)

    def __iter__(self) -> Iterator[Token]:
        i = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda i=i: self._done or i < len(self._tokens))  # type: ignore[misc]
                if i == len(self._tokens):
                    break
                token = self._tokens[i]
            yield token
            i += 1
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> list[int]:
        """The ids of all tokens, the one that ended the answer included, when it has ended.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it has not ended yet. It goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"the answer has not ended within {timeout} seconds. It goes on.")
        if self._error is not None:
            raise self._error
        return [token.id for token in self._tokens]

    def _begin(self) -> None:
        self._queue_seconds = time.monotonic() - self._since

    def _put(self, token: Token) -> None:
        with self._changed:
            if self._first_token_seconds is None:
                self._first_token_seconds = time.monotonic() - self._since
            self._tokens.append(token)
            self._changed.notify_all()
            self._tell(token)

    def _finish(self, reason: FinishReason | None, error: BaseException | None = None) -> None:
        with self._changed:
            self._reason, self._error, self._done = reason, error, True
            self._changed.notify_all()
            try:
                self._tell(None)
            except Exception as raised:  # noqa: BLE001  what a callback raises must reach its owner, not the engine
                self._reason, self._error = None, raised
            self._callbacks.clear()

    def _tell(self, token: Token | None) -> None:
        for callback in self._callbacks:
            callback(token)

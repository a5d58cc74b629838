"""The answers to one request: tokens of several streams, as texts that can be sent."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funclora._apps.serve.options import Options
from funclora._apps.serve.problems import Problem
from funclora._apps.serve.text import Cutter, Decoder
from funclora.errors import ClosedError, FuncloraError, QueueFullError, TooLongError, UnknownAdapterError
from funclora.serving import Stream, Token


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        index: of the answer.
        text: what it adds.
        tokens: if log-probabilities were asked for: the tokens that begin in the text, each with its place in the
            answer, in characters.
        reason: why the answer ends with this piece: "stop" or "length"; None if it goes on.
    """

    index: int
    text: str
    tokens: tuple[tuple[int, Token], ...] = ()
    reason: str | None = None


@dataclass
class _Choice:
    """What is known of one answer."""

    decoder: Decoder
    cutter: Cutter
    seen: int = 0  # characters that were decoded
    sent: int = 0  # characters that were given out
    waiting: list[tuple[int, Token]] = field(default_factory=list)
    over: bool = False


class Answers:
    """The streams of a request.

    Args:
        streams: one for each answer.
        options: of the request.
        tokenizer: of transformers.
        ends: ids that end an answer.
        root: contains the adapters' folders.
    """

    def __init__(
        self, streams: Sequence[Stream], options: Options, tokenizer: Any, ends: frozenset[int], root: Path | None
    ) -> None:
        self._streams, self._options, self._ends, self._root = streams, options, ends, root
        self._choices = [_Choice(Decoder(tokenizer), Cutter(options.stop)) for _ in streams]
        self._queue: asyncio.Queue[tuple[int, Token | None] | Problem] = asyncio.Queue()
        self.generated = 0
        loop = asyncio.get_running_loop()

        def put(index: int, token: Token | None) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, (index, token))

        for i, stream in enumerate(streams):
            stream.add_callback(functools.partial(put, i))

    @property
    def queue_seconds(self) -> float | None:
        """How long it took until all answers had a row; None before."""
        found = [stream.queue_seconds for stream in self._streams]
        return None if None in found else max(seconds for seconds in found if seconds is not None)

    @property
    def first_token_seconds(self) -> float | None:
        """The time to the first token of any answer; None before."""
        found = [seconds for stream in self._streams if (seconds := stream.first_token_seconds) is not None]
        return min(found, default=None)

    def interrupt(self, problem: Problem) -> None:
        """End the answers with an error."""
        self._queue.put_nowait(problem)

    def cancel(self) -> None:
        """Free the rows of answers that are not over; as often as you like."""
        for stream in self._streams:
            stream.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """All answers, in the order in which they come.

        Raises:
            Problem: an answer failed.
        """
        left = len(self._choices)
        while left:
            event = await self._queue.get()
            if isinstance(event, Problem):
                raise event
            index, token = event
            piece = self._ended(index) if token is None else self._read(index, token)
            if piece is not None:
                left -= piece.reason is not None
                yield piece

    def _read(self, index: int, token: Token) -> Piece | None:
        """What a token adds; None for nothing yet."""
        choice = self._choices[index]
        if choice.over:
            return None
        self.generated += 1
        text = choice.decoder.add(token.id)
        if self._options.logprobs is not None and token.id not in self._ends:
            choice.waiting.append((choice.seen, token))
        choice.seen += len(text)
        ready = choice.cutter.add(text)
        if choice.cutter.stopped:
            self._streams[index].cancel()
            return self._piece(index, ready, "stop")
        return self._piece(index, ready) if ready else None

    def _ended(self, index: int) -> Piece | None:
        """The last piece of a stream that is over."""
        choice, stream = self._choices[index], self._streams[index]
        if choice.over:
            return None
        if stream.error is not None:
            raise problem_of(stream.error, self._root)
        if stream.finish_reason not in ("stop", "length"):
            raise Problem(503, SHUTTING_DOWN, code="shutting_down")
        ready = choice.cutter.add(choice.decoder.end())
        if choice.cutter.stopped:
            return self._piece(index, ready, "stop")
        return self._piece(index, ready + choice.cutter.end(), stream.finish_reason)

    def _piece(self, index: int, text: str, reason: str | None = None) -> Piece:
        choice = self._choices[index]
        choice.sent += len(text)
        choice.over = reason is not None
        whole = choice.over and not choice.cutter.stopped
        ready = [each for each in choice.waiting if whole or each[0] < choice.sent]
        choice.waiting = choice.waiting[len(ready) :]
        return Piece(index, text, tuple(ready), reason)


SHUTTING_DOWN = "The server is shutting down. Ask another one, or try again later."


def problem_of(error: BaseException, root: Path | None) -> Problem:
    """What an error of the engine means to the one who asked. One that is nobody's fault is logged.

    Args:
        error: as from the engine or the cache of adapters.
        root: contains the adapters' folders; where it is concerns nobody who asks.
    """
    if isinstance(error, QueueFullError):
        return Problem(429, "As many requests wait as may wait. Try again later.", code="queue_full")
    if isinstance(error, ClosedError):
        return Problem(503, SHUTTING_DOWN, code="shutting_down")
    if isinstance(error, UnknownAdapterError):
        return Problem(404, str(error), param="model", code="model_not_found")
    if isinstance(error, TooLongError):
        return Problem(400, str(error), code="context_length_exceeded")
    if isinstance(error, FuncloraError | OSError):
        message = str(error) if root is None else str(error).replace(f"{root}{os.sep}", "")
        return Problem(422, f"This adapter cannot be used: {message}", param="model", code="adapter_unusable")
    logging.getLogger("funclora").error("An answer failed.", exc_info=error)
    return Problem(500, "The server failed. Its log says why.", code="internal_error")

"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from funclora._apps.serve.access import account_of
from funclora._apps.serve.adapters import Names
from funclora._apps.serve.answers import Answers, Piece, problem_of
from funclora._apps.serve.body import read_json
from funclora._apps.serve.options import CHOICES, Options, chat_fields, completion_fields, options
from funclora._apps.serve.problems import Problem
from funclora._apps.serve.prompts import Prompts
from funclora._apps.serve.replies import DONE, Reply, counts, event
from funclora._apps.serve.settings import Limits
from funclora.errors import FuncloraError
from funclora.serving import Engine, Settings

SHORT = 16  # tokens of a completion that does not say how many, as OpenAI has it
GONE = Problem(499, "The client went away.")


@dataclass(frozen=True)
class _Asked:
    """A request, read.

    Attributes:
        options: how it wants to be answered.
        folder: id of the adapter; None for the base.
        prompts: token ids of each prompt.
        rooms: how many tokens each answer may have.
    """

    options: Options
    folder: str | None
    prompts: list[list[int]]
    rooms: list[int]


class Completions:
    """Answers requests with an engine.

    Args:
        engine: has been started.
        prompts: reads texts and chats.
        names: of the models.
        limits: what one request may take.
        look: called with the folder of an adapter that is asked for, before it is used.
    """

    def __init__(
        self, engine: Engine, prompts: Prompts, names: Names, limits: Limits, look: Callable[[str], None]
    ) -> None:
        self._engine, self._prompts, self._names, self._limits, self._look = engine, prompts, names, limits, look
        # One thread: what is read at a time, and the memory and processor that this takes, are bounded.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="funclora-prompts")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        loop = asyncio.get_running_loop()
        body = await read_json(request, self._limits.body)
        asked = await loop.run_in_executor(self._reader, self._read, body, chat)
        account = account_of(request)
        account.model, account.prompt_tokens = asked.options.model, sum(map(len, asked.prompts))
        answers = account.answers = self._submit(asked)
        reply = Reply(asked.options.model, self._prompts.tokenizer, chat=chat, logprobs=asked.options.logprobs)
        late = loop.call_later(self._limits.seconds, answers.interrupt, too_slow(self._limits.seconds))
        gone = asyncio.create_task(_tell_when_gone(request, answers))
        pieces = answers.pieces()
        handed_over = False
        try:
            if not asked.options.stream:
                found = [piece async for piece in pieces]
                return JSONResponse(reply.whole(found, counts(account.prompt_tokens, answers.generated)))
            # Whatever fails before the first token is an error of HTTP.
            first = await anext(pieces)
            handed_over = True
            events = self._events(first, pieces, answers, reply, asked, chat=chat)

            def close() -> None:
                late.cancel()
                answers.cancel()

            return EventStream(events, close)
        finally:
            gone.cancel()
            if not handed_over:
                late.cancel()
                answers.cancel()

    def _read(self, body: Any, chat: bool) -> _Asked:
        longest = self._limits.max_tokens
        fields = chat_fields(body) if chat else completion_fields(body)
        wanted = options(fields, chat=chat, longest=longest)
        folder = self._names.folder(wanted.model)
        reader = self._prompts
        prompts = [reader.chat(fields.get("messages"))] if chat else reader.texts(fields.get("prompt"))
        if len(prompts) * wanted.n > CHOICES:
            raise Problem(
                400, f"n: {len(prompts)} prompts and n {wanted.n} are more than {CHOICES} answers.", param="n"
            )
        rooms = [self._prompts.room(ids, wanted.max_tokens, longest, None if chat else SHORT) for ids in prompts]
        if folder is not None:
            self._look(folder)
        return _Asked(wanted, folder, prompts, rooms)

    def _submit(self, asked: _Asked) -> Answers:
        """Ask the engine for all answers, or for none."""
        wanted = asked.options
        streams = []
        try:
            for ids, room in zip(asked.prompts, asked.rooms, strict=True):
                for i in range(wanted.n):
                    settings = Settings(
                        max_tokens=room,
                        temperature=wanted.temperature,
                        top_p=wanted.top_p,
                        seed=None if wanted.seed is None else wanted.seed + i,
                        logprobs=wanted.logprobs,
                    )
                    streams.append(self._engine.submit(ids, asked.folder, settings))
        except FuncloraError as error:
            for stream in streams:
                stream.cancel()
            raise problem_of(error, self._names.root) from error
        return Answers(streams, wanted, self._prompts.tokenizer, self._engine.eos_ids, self._names.root)

    async def _events(
        self, first: Piece, rest: AsyncIterator[Piece], answers: Answers, reply: Reply, asked: _Asked, *, chat: bool
    ) -> AsyncIterator[bytes]:
        """The parts of a stream. What fails now can only be told in it."""
        try:
            if chat:
                for index in range(asked.options.n):
                    yield event(reply.opening(index))
            yield event(reply.part(first))
            async for piece in rest:
                yield event(reply.part(piece))
            if asked.options.usage:
                yield event(reply.usage(counts(sum(map(len, asked.prompts)), answers.generated)))
        except Problem as problem:
            yield event(problem.body)
        yield DONE


class EventStream(StreamingResponse):
    """Server-sent events, after which something is closed however they end."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        # Nginx would keep the parts back.
        super().__init__(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As the base class does."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def too_slow(seconds: float) -> Problem:
    """An answer that takes longer than it may."""
    return Problem(504, f"The answer took more than {seconds:g} seconds. Ask for fewer tokens.", code="timeout")


async def _tell_when_gone(request: Request, answers: Answers) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass
    answers.interrupt(GONE)

"""Connections: bounded in number, and their errors have OpenAI's form too."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from funclora._apps.serve.problems import Problem


class Connection(H11Protocol):
    """uvicorn's. If there are too many, the one that has done nothing for the longest time is closed.

    Clients that connect and say nothing, or do not read what they asked for, so cannot keep others away.

    Args:
        config: of the server; `limit_concurrency` is the maximum number of connections.
        arguments: as uvicorn gives them.
    """

    def __init__(self, config: Config, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        self._most = config.limit_concurrency
        self.limit_concurrency = None  # the base class would refuse the new ones, and keep those that do nothing
        self.used = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """There is a new connection."""
        super().connection_made(transport)
        idle = [each for each in self.connections if isinstance(each, Connection) and each.is_idle]
        if self._most is not None and len(self.connections) > self._most and idle:
            min(idle, key=lambda each: each.used).transport.abort()

    def on_response_complete(self) -> None:
        """A request was answered."""
        self.used = self.loop.time()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being answered: there is none, or it is closed and its client does not read."""
        return self.cycle is None or self.cycle.response_complete or self.transport.is_closing()

    def send_400_response(self, msg: str) -> None:
        """Tell that what came is no HTTP."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            self.transport.abort()
            return
        problem = Problem(400, f"{msg} Expected a request of HTTP/1.1.", code="invalid_http")
        content = json.dumps(problem.body).encode()
        head = [("Content-Type", "application/json"), ("Content-Length", str(len(content))), ("Connection", "close")]
        start = h11.Response(status_code=400, headers=head, reason=b"Bad Request")
        for event in (start, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

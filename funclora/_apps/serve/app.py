"""The application: paths, keys, and how errors are told."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from funclora._apps.serve.access import ACCOUNT, Account
from funclora._apps.serve.metrics import CONTENT_TYPE, metrics_text
from funclora._apps.serve.models import Models
from funclora._apps.serve.problems import Problem
from funclora.serving import Engine

Endpoint = Callable[[Request], Awaitable[Response]]

OPEN = ("/", "/page.js", "/page.css", "/health")  # they hold no secrets
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
}


def application(
    models: Models,
    posts: Mapping[str, Endpoint],
    *,
    engine: Engine | None,
    key: str | None,
    hosts: frozenset[str] | None,
    seconds: float,
    most: int,
    log: Callable[[str], None] | None = None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        models: lists the models.
        posts: what answers the requests to each path.
        engine: whose numbers are in /metrics; None without one.
        key: that requests must have; None if they need none.
        hosts: names under which the server may be reached; None for any.
        seconds: after which a connection is cut off, whatever its request waits for.
        most: requests at a time, without those that only look.
        log: gets a line about each request; None for no lines.
    """
    requests: Counter[tuple[str, int]] = Counter()

    async def health(request: Request) -> Response:
        alive = engine is None or engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, status_code=200 if alive else 503)

    async def metrics(request: Request) -> Response:
        found = None if engine is None else engine.statistics()
        return Response(metrics_text(requests, found), headers={"Content-Type": CONTENT_TYPE})

    async def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        text = resources.files("funclora._apps.serve").joinpath(name).read_text(encoding="utf-8")
        return Response(text, media_type=kind)

    routes = [
        *(Route(path, page, methods=["GET"]) for path in PAGE),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/v1/models", models.list, methods=["GET"]),
        Route("/v1/models/{name}", models.get, methods=["GET"]),
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
    ]
    inner = Starlette(
        routes=routes,
        exception_handlers={Problem: _told, HTTPException: _told, ClientDisconnect: _left, Exception: _failed},
    )
    inner.router.redirect_slashes = False  # to an address that a proxy may not know
    known = frozenset(route.path for route in routes)
    return _Gate(inner, requests, known, key=key, hosts=hosts, seconds=seconds, most=most, log=log)


def respond(problem: Problem) -> Response:
    """An error, as it is sent."""
    return JSONResponse(problem.body, status_code=problem.status, headers=problem.headers)


async def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, Problem):
        return respond(error)
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return respond(Problem(404, f"There is nothing at {request.url.path[:200]!r}.", code="unknown_path"))
    return respond(Problem(error.status_code, f"{request.method}: {error.detail}.", code="unknown_method"))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    return respond(Problem(500, "The server failed. Its log says why.", code="internal_error"))


class _Gate:
    """What every request passes: it is counted, bounded in time, and may be turned away."""

    def __init__(
        self,
        inner: ASGIApp,
        requests: Counter[tuple[str, int]],
        known: frozenset[str],
        *,
        key: str | None,
        hosts: frozenset[str] | None,
        seconds: float,
        most: int,
        log: Callable[[str], None] | None,
    ) -> None:
        self._inner, self._requests, self._known = inner, requests, known
        self._key = None if key is None else key.encode()
        self._hosts, self._seconds, self._most, self._log = hosts, seconds, most, log
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._known else "other"
        since, account = time.monotonic(), Account()
        status: int | None = None
        scope = {**scope, ACCOUNT: account}

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._requests[path, message["status"]] += 1
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        problem = self._refused(Request(scope))
        app = self._inner if problem is None else respond(problem)
        # A client that does not read would hold its connection for ever; uvicorn closes what is not complete.
        self._running += 1
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(app(scope, receive, counted), self._seconds)
        finally:
            self._running -= 1
            if self._log is not None:
                self._log(account.line(scope["method"], scope["path"], status, time.monotonic() - since))

    def _refused(self, request: Request) -> Problem | None:
        """Why a request is not answered at all; None if it is."""
        if self._running >= self._most and request.method == "POST":  # whoever watches it must see it
            return Problem(503, "As many requests run as may run. Try again later.", code="overloaded")
        if self._hosts is not None and _host(request.headers.get("host", "")) not in self._hosts:
            # Another site's name for this machine: its pages would read what is meant for this machine only.
            return Problem(403, "Host: without --api-key, this server answers only to the name localhost.", code="host")
        if self._key is None or request.url.path in OPEN:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time, so that the time does not tell how much of a key is right.
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key):
            return None
        return Problem(401, "Authorization: expected the server's key, as in: Bearer KEY.", code="invalid_api_key")


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    return name.strip("[]").lower()

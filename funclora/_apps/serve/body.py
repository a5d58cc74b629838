"""The body of a request, within bounds."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from funclora._apps.serve.problems import Problem
from funclora._apps.train.strict_json import parse
from funclora.errors import FormatError

SECONDS = 30.0  # for a client to send what it has to say


async def read_json(request: Request, most: int) -> Any:
    """The JSON value of a request's body.

    Args:
        request: the request.
        most: bytes that it may have.

    Raises:
        Problem: it is too large, comes too slowly, or is no JSON.
    """
    # A page of another site can send other types without being asked whether it may.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, f"Content-Type: expected application/json, got {kind[:100]!r}.")
    try:
        raw = await asyncio.wait_for(_read(request, most), SECONDS)
    except asyncio.TimeoutError as error:
        raise Problem(408, f"The body did not come within {SECONDS:g} seconds.") from error
    try:
        return parse(raw.decode(), "The body")
    except UnicodeDecodeError as error:
        raise Problem(400, f"The body: byte {error.start} is not UTF-8.") from error
    except FormatError as error:
        raise Problem(400, str(error)) from error


async def _read(request: Request, most: int) -> bytes:
    too_large = Problem(413, f"The body has more than {most:,} bytes.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)

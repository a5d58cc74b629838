"""What comes over a connection, below requests: no HTTP, too many connections, clients that do not read."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import WAIT, Running, running, save_all, until

from funclora._apps.serve import server
from funclora._apps.serve.settings import Limits

LONG: dict[str, Any] = {"model": "ad-0", "prompt": "one", "max_tokens": 110, "temperature": 1, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("served"), 1)


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[Running]:
    with running(folder, limits=Limits(max_tokens=120, body=4096)) as found:
        yield found


def connected(run: Running, receive: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(WAIT)
    if receive is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    client.connect(("127.0.0.1", int(run.server.url.rpartition(":")[2])))
    return client


def all_of(client: socket.socket) -> bytes:
    """What comes until the server closes; it may close before it has read all."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            found += part
    return found


def post(body: Any, head: bytes = b"Host: localhost\r\nConnection: close\r\n", version: bytes = b"1.1") -> bytes:
    content = json.dumps(body).encode()
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(content)
    return b"POST /v1/completions HTTP/" + version + b"\r\n" + head + kind + b"\r\n" + content


ASKED = {"model": "ad-0", "prompt": "a", "max_tokens": 3, "temperature": 0}
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
# What comes -> the status, and the code of the error.
RAW: dict[str, tuple[bytes, int, str | None]] = {
    "words": (b"hello\r\n\r\n", 400, "invalid_http"),
    "bytes": (bytes(range(256)) + b"\r\n\r\n", 400, "invalid_http"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "invalid_http"),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid_http"),
    "two lengths": (post(ASKED, b"Host: localhost\r\nContent-Length: 3\r\n"), 400, "invalid_http"),
    "a length below zero": (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
    "long headers": (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000, 400, "invalid_http"),
    "HTTP/1.0": (post(ASKED, b"Host: localhost\r\n", b"1.0"), 200, None),
    "HTTP/1.0 without a host": (post(ASKED, b"", b"1.0"), 403, "host"),
    "a stream by HTTP/1.0": (post({**ASKED, "stream": True}, b"Host: localhost\r\n", b"1.0"), 200, None),
    "a broken chunk": (CHUNKED + b"zz\r\n", 400, "invalid_http"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_request(run: Running, name: str) -> None:
    sent, status, code = RAW[name]
    with connected(run) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        head, _, body = all_of(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    if code is not None:
        assert b"application/json" in head
        assert json.loads(body)["error"]["code"] == code
    elif b"event-stream" in head:
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["usage"]["completion_tokens"] <= 3
    assert run.http.post("/v1/completions", json=ASKED).status_code == 200


def test_connections_that_say_nothing_keep_nobody_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "OTHERS", 2)
    monkeypatch.setattr(server, "CONNECTIONS", 4)
    with running(folder, max_rows=1, max_queue=1) as run, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(connected(run)) for _ in range(3)]
        silent[1].sendall(b"POST /v1/compl")
        ask_for_health(silent[2])
        with run.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            for _ in range(30):
                ask_for_health(opened.enter_context(connected(run)))
            assert [*filter(None, lines)][-1] == "data: [DONE]"  # one that is used is not closed
        for client in silent:
            with contextlib.suppress(ConnectionError):
                assert client.recv(1 << 16) == b""


def ask_for_health(client: socket.socket) -> None:
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    found = b""
    while not found.endswith(b'{"status":"ok"}'):
        part = client.recv(1 << 16)
        assert part, found
        found += part


def test_more_requests_than_may_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "OTHERS", 0)
    with running(folder, max_rows=1, max_queue=1) as run, contextlib.ExitStack() as opened:
        for _ in range(2):  # they have said what they want, but not all of it
            client = opened.enter_context(connected(run))
            client.sendall(post(ASKED)[:-5])
        until(lambda: run.http.post("/v1/completions", json=ASKED).status_code == 503)
        refused = run.http.post("/v1/completions", json=ASKED)
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["Retry-After"] == "1"
        assert run.http.get("/health").status_code == 200
    with running(folder, max_rows=1, max_queue=1) as run:
        assert run.http.post("/v1/completions", json=ASKED).status_code == 200


def test_who_does_not_read_holds_neither_the_others_nor_the_end(folder: Path) -> None:
    with running(folder, grace=0.1, limits=Limits(seconds=30.0)) as run:
        run.server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connected(run, receive=4096) as client:
            client.sendall(post({**LONG, "n": 8, "logprobs": 20, "stream": True}))
            until(lambda: run.engine.statistics().finished["length"] + run.engine.statistics().finished["stop"] == 8)
            assert run.http.post("/v1/completions", json=ASKED).status_code == 200
            run.server.stop()
            assert ended(run)


def ended(run: Running) -> bool:
    """Whether the server ends, long before its answers would have to."""
    serving = [thread for thread in threading.enumerate() if getattr(thread, "_target", None) == run.server.run]
    for thread in serving:
        thread.join(20.0)
    return not any(thread.is_alive() for thread in serving)

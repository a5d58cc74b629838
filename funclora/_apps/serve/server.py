"""A server in this process: what it needs is loaded, then it answers until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

import uvicorn

from funclora._apps.serve.access import tell
from funclora._apps.serve.adapters import Names
from funclora._apps.serve.app import application
from funclora._apps.serve.body import SECONDS
from funclora._apps.serve.loaded import Loaded, load
from funclora._apps.serve.models import Models
from funclora._apps.serve.protocol import Connection
from funclora._apps.serve.settings import ServeSettings
from funclora.errors import ConfigError, FuncloraWarning
from funclora.serving import Engine

LOOPBACK = frozenset(["localhost", "127.0.0.1", "::1"])
NOT_CUT = (
    "Prompts that begin alike are each read whole: what this model remembers of a prompt cannot be cut (a sliding "
    "window, states, or no cache)."
)
OTHERS = 64  # requests at a time besides those whose answers run or wait
CONNECTIONS = 64  # besides those with requests


class Server:
    """Everything loaded, and a socket that accepts connections.

    Args:
        settings: what is served, and how.

    Attributes:
        names: of the models.
        engine: of a generator; None for an encoder.
        url: where it listens.
        notes: what whoever starts it should know of this model, in sentences.

    Raises:
        FuncloraError: the model, the adapters or an option cannot be used.
        OSError: the address cannot be used.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        if settings.host not in LOOPBACK and settings.key is None:
            warnings.warn(
                f"--host: everybody who reaches {settings.host} can use the server. Give an --api-key.",
                FuncloraWarning,
                stacklevel=2,
            )
        name = settings.name or ("demo" if settings.base is None else settings.base.resolve().name)
        self.names = Names(name, settings.adapters)
        with contextlib.ExitStack() as opened:
            listening = opened.enter_context(_socket(settings.host, settings.port))  # before minutes of loading
            loaded = load(settings, self.names)
            opened.pop_all()
        self.engine = loaded.engine
        anew = self.engine is not None and settings.prefix_memory > 0 and not self.engine.shares_prefixes
        self.notes = [NOT_CUT] if anew else []
        self._uvicorn = _Uvicorn(self._config(loaded), self.engine, settings.grace)
        self._socket = listening
        self.url = _url(settings.host, self._socket.getsockname()[1])

    def _config(self, loaded: Loaded) -> uvicorn.Config:
        settings = self._settings
        requests = settings.max_rows + settings.max_queue + OTHERS
        models = Models(self.names, loaded.cache, loaded.context, chats=loaded.chats)
        posts = loaded.posts
        if settings.loading:
            posts = posts | {"/v1/load_lora_adapter": models.load, "/v1/unload_lora_adapter": models.unload}
        return uvicorn.Config(
            application(
                models,
                posts,
                engine=self.engine,
                key=settings.key,
                hosts=LOOPBACK if settings.key is None and settings.host in LOOPBACK else None,
                seconds=settings.limits.seconds + 2 * SECONDS,
                most=requests,
                log=tell if settings.access_log else None,
            ),
            loop="asyncio",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # these go to stderr; what clients do wrong concerns them alone
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=requests + CONNECTIONS,
        )

    def run(self) -> None:
        """Answer until `stop`, SIGTERM or Ctrl-C. Answers that run get some seconds to end.

        Raises:
            KeyboardInterrupt: Ctrl-C has ended it.
        """
        with _signals() as received, self.engine or contextlib.nullcontext():
            asyncio.run(self._uvicorn.serve(sockets=[self._socket]))
        if signal.SIGINT in received:
            raise KeyboardInterrupt("All answers have ended.")

    def stop(self) -> None:
        """Let `run` return, from any thread."""
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Ends the engine together with the connections."""

    def __init__(self, config: uvicorn.Config, engine: Engine | None, grace: float) -> None:
        super().__init__(config)
        self._engine, self._grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, and wait for what runs."""
        # Who does not read what was asked for must not hold the server.
        self.config.timeout_graceful_shutdown = max(1, round(self._grace + 1))
        if self._engine is None:
            await self._close(sockets)
            return
        ending = asyncio.create_task(asyncio.to_thread(self._engine.close, drain=True, timeout=self._grace))
        await self._close(sockets)
        if self.force_exit:  # Ctrl-C again
            await asyncio.to_thread(self._engine.close, drain=False)
        await ending

    async def _close(self, sockets: list[socket.socket] | None) -> None:
        await super().shutdown(sockets)
        for connection in [*self.server_state.connections]:
            connection.transport.abort()
        await asyncio.sleep(0)  # they close now


def _socket(host: str, port: int) -> socket.socket:
    """A socket that accepts connections at an address."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host: {host!r} is no address of this machine: {error.strerror}.") from error
    opened = socket.socket(kind, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise ConfigError(f"--port: {host}:{port} cannot be used: {error.strerror}. Give another.") from error
    return opened


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that end the server. uvicorn passes them on at its end; here they do nothing but that."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What is served, and within which limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        max_tokens: of one answer.
        body: bytes of a request.
        seconds: from a request to the end of its answer.
    """

    max_tokens: int = 1024
    body: int = 1 << 20
    seconds: float = 600.0


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and how.

    Attributes:
        base: folder of a transformers model; None for the demo's base.
        adapters: folder that contains PEFT folders; None to serve the base alone.
        name: of the base in requests; the folder's if None.
        host: address to listen at.
        port: to listen at; 0 for a free one.
        key: that requests must have; None if they need none.
        limits: what one request may take.
        max_rows: answers that are generated at a time.
        max_queue: further answers that wait.
        memory: bytes of adapters that are kept.
        prefix_memory: bytes of what is known of the beginnings of prompts; 0 to keep nothing.
        dtype: of the base, as for `load_base`.
        quantize: of the base, as for `load_base`.
        device: to compute on.
        chat_template: file of a chat template.
        pooling: of an encoder; None for what its folder says.
        loading: whether requests may load and unload adapters.
        access_log: whether a line about each request is written on stderr.
        grace: seconds for running answers when the server stops.
    """

    base: Path | None = None
    adapters: Path | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    limits: Limits = Limits()
    max_rows: int = 16
    max_queue: int = 256
    memory: int = 1 << 30
    prefix_memory: int = 1 << 28
    dtype: str = "auto"
    quantize: str = "none"
    device: str = "auto"
    chat_template: Path | None = None
    pooling: str | None = None
    loading: bool = False
    access_log: bool = False
    grace: float = 10.0

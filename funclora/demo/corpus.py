"""The demo's texts: the source code of Python's own standard library, which every reader already has.

A domain is one package of the library; an adapter is trained for each. The base model is trained on all the
rest, so it has met the language but none of the domains.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

# Each has at least 60 kB of sources in every CPython from 3.10 to 3.14, Debian's python3 package included.
DOMAINS: dict[str, str] = {
    "asyncio": "asyncio",
    "concurrent": "concurrent",
    "email": "email",
    "encodings": "encodings",
    "html": "html",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "multiprocessing": "multiprocessing",
    "pydoc_data": "pydoc_data",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
    "xmlrpc": "xmlrpc",
}

CHUNK = 2048
EVERY = 8

_TESTS = {"test", "tests", "idle_test"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
# What the build, or this machine's administrator, wrote is no part of the library.
_LOCAL = ("_sysconfigdata", "sitecustomize", "usercustomize")


def domain_text(name: str) -> bytes:
    """The Python sources of one domain, joined in the order of their paths.

    Args:
        name: a key of `DOMAINS`.

    Returns:
        The text.

    Raises:
        ValueError: no such domain.
        FileNotFoundError: this Python comes without that package's sources.
    """
    return _read(domain_files(name))


def base_text() -> bytes:
    """The sources of everything in the standard library that belongs to no domain and is no test."""
    return _read(base_files())


def domain_files(name: str) -> list[Path]:
    """The files that `domain_text` reads."""
    if name not in DOMAINS:
        raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {name!r}")
    folder = _stdlib() / DOMAINS[name]
    files = _sources(folder.rglob("*.py"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: expected the sources of {DOMAINS[name]!r}, found no .py file. The demo's texts are "
            "the standard library's sources, so it needs a Python that comes with them (Debian: python3)"
        )
    return files


def base_files() -> list[Path]:
    """The files that `base_text` reads."""
    outside = _NOT_LIBRARY | set(DOMAINS.values())
    files: list[Path] = []
    for entry in _stdlib().iterdir():
        if entry.is_dir() and entry.name not in outside:
            files += entry.rglob("*.py")
        elif entry.suffix == ".py" and not entry.name.startswith(_LOCAL):
            files.append(entry)
    return _sources(files)


def split(name: str) -> tuple[bytes, bytes]:
    """A domain's text as (train, held-out); see `split_text`."""
    return split_text(domain_text(name))


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """Holds out every eighth chunk of 2 KiB, so that both parts sample all of the text's files.

    Args:
        text: any text.

    Returns:
        (train, held-out); together they are all of `text`, and no byte is in both.
    """
    chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    heldout = chunks[EVERY - 1 :: EVERY]
    train = [chunk for index, chunk in enumerate(chunks) if index % EVERY != EVERY - 1]
    return b"".join(train), b"".join(heldout)


def batches(text: bytes, *, batch: int, context: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random windows of a text, without end.

    Args:
        text: at least `context + 1` bytes.
        batch: rows in each batch.
        context: bytes that a model sees; a window has one more, the last target.
        generator: decides the windows, and nothing else does.

    Yields:
        [batch, context + 1] int64
    """
    ids = encode(text)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(ids) - context, (batch, 1), generator=generator)
        yield ids[starts + offsets].long()


def windows(text: bytes, *, count: int, context: int) -> Tensor:
    """Evenly spaced windows of a text: the same ones every time, for evaluation.

    Args:
        text: at least `context + 1` bytes.
        count: rows.
        context: as in `batches`.

    Returns:
        [count, context + 1] int64
    """
    ids = encode(text)
    starts = torch.linspace(0, len(ids) - context - 1, count).long()
    return ids[starts[:, None] + torch.arange(context + 1)].long()


def encode(text: bytes) -> Tensor:
    """The bytes as a tensor, [len(text)] uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(files: Iterable[Path]) -> list[Path]:
    """Those of the files that are not tests, in an order that no file system decides."""
    root = _stdlib()
    kept = [file for file in files if not _TESTS.intersection(file.relative_to(root).parts[:-1])]
    return sorted(kept, key=lambda file: file.relative_to(root).as_posix())


def _read(files: Iterable[Path]) -> bytes:
    return b"".join(file.read_bytes() for file in files)

"""Data larger than memory: tokenised once into Arrow files beside the run, and read from there row by row."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from funclora._apps.train.labels import Labels
from funclora._apps.train.notes import Notes
from funclora._apps.train.records import files_of
from funclora._apps.train.rows import Example
from funclora._apps.train.settings import Settings
from funclora._apps.train.stored import Stored, Writer, contents
from funclora._files.staging import staged_folder

LARGE = 1 << 24  # bytes of data files; the examples of smaller data are kept in memory
FOLDER, META = "cache", "cache.json"
PARTS = ("train", "validation")
_VERSION = 2
_PATHS = ("data", "validation", "chat_template")  # of which the contents matter

Part = list[Example] | Writer


@dataclass(frozen=True)
class Tokenised:
    """The examples of a run before packing.

    Attributes:
        parts: the training and the validation examples.
        ends: after each file, the number of training examples.
        labels: what labels mean.
        notes: what was said of the data.
    """

    parts: tuple[Sequence[Example], Sequence[Example]]
    ends: list[int]
    labels: Labels
    notes: Notes


def is_large(settings: Settings) -> bool:
    """Whether the examples of a run belong on the disk."""
    return sum(file.stat().st_size for file in _read(settings) if file.exists()) >= LARGE


def key_of(settings: Settings, tokenizer: Any, limit: int | None, known: Sequence[str]) -> str:
    """A digest of everything that determines the examples: contents of files, settings, tokenizer, versions."""
    import funclora

    keys = [f.name for f in fields(settings) if f.metadata["group"] == "Data" and f.name not in _PATHS]
    values = asdict(settings)
    facts = {
        "version": [_VERSION, funclora.__version__],
        "settings": {key: values[key] for key in [*keys, "task", "loss", "seed"]},
        "limit": limit,
        "known": [*known],
        "tokenizer": _tokenizer(tokenizer),
        "files": [[file.name, contents(file)] for file in _read(settings)],
        "validation": settings.validation is not None,
    }
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def load(folder: Path, key: str) -> Tokenised | None:
    """The cache of a folder; None if there is none, or it is another's, or damaged."""
    import numpy as np

    at = folder / FOLDER
    try:
        meta = json.loads((at / META).read_text(encoding="utf-8"))
        if meta["key"] != key or any(contents(at / name) != sha for name, sha in meta["files"].items()):
            return None
        parts = [
            Stored(at / f"{name}.arrow", np.fromfile(at / f"{name}.sizes", np.int32).reshape(-1, 2), *meta[name])
            for name in PARTS
        ]
        labels = Labels(meta["problem"], tuple(meta["classes"]), meta["placed"])
        return Tokenised((parts[0], parts[1]), meta["ends"], labels, Notes.of(meta["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Cache:
    """A cache that is being written: `with written(folder, key) as cache`."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.parts: tuple[Writer, Writer] = (Writer(folder / "train.arrow"), Writer(folder / "validation.arrow"))

    def finish(self, ends: list[int], labels: Labels, notes: Notes) -> None:
        """Write the rest."""
        meta: dict[str, Any] = {
            "key": self.key, "ends": ends, "problem": labels.problem, "classes": [*labels.names],
            "placed": labels.placed, "notes": notes.state(),
        }  # fmt: skip
        for name, part in zip(PARTS, self.parts, strict=True):
            part.close()
            part.sizes().tofile(self.folder / f"{name}.sizes")
            meta[name] = [part.largest, part.digest]
        names = [f"{name}.{suffix}" for name in PARTS for suffix in ("arrow", "sizes")]
        meta["files"] = {name: contents(self.folder / name) for name in names}
        (self.folder / META).write_text(json.dumps(meta), encoding="utf-8")


@contextlib.contextmanager
def written(folder: Path, key: str) -> Iterator[Cache]:
    """A new cache in place of the folder's, completely or not at all."""
    with staged_folder(folder / FOLDER, replace=True) as draft:
        yield Cache(draft, key)


def _read(settings: Settings) -> list[Path]:
    """All files that are read, in order."""
    paths = [*settings.data, *([] if settings.validation is None else [settings.validation])]
    return [file for path in paths for file in files_of(path).values()]


def _tokenizer(tokenizer: Any) -> list[Any]:
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None:
        inner = inner.to_str()
    elif hasattr(tokenizer, "get_vocab"):
        inner = sorted(tokenizer.get_vocab().items())
    more = [str(getattr(tokenizer, name, None)) for name in ("special_tokens_map", "chat_template", "init_kwargs")]
    return [type(tokenizer).__name__, inner, *more]

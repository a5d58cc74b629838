"""Values that a later process can use again, in the user's cache folder.

Nothing depends on them: what is not there, or is damaged, is made again; and a folder that cannot be written is no
error. They are JSON, so that reading one runs no code. Several processes may use the folder together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from funclora._files.locks import entries, hidden

VARIABLE = "FUNCLORA_CACHE_DIR"
_LARGEST, _MOST = 16 << 20, 128 << 20  # bytes of an entry, and of all
# A name that `put` gives to an entry, or to its draft.
_OURS = re.compile(r"\.?[0-9a-f]{64}\.json(\.[0-9a-f]{32}\.tmp)?")


def cache_folder() -> Path | None:
    """Where the values are kept: FUNCLORA_CACHE_DIR, or else `funclora` in the user's cache; None to keep none."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    parent = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (parent if parent.is_absolute() else Path.home() / ".cache") / "funclora"
    except RuntimeError:  # nobody's home is known
        return None


def digest_of(value: Any) -> str:
    """64 hexadecimal digits that tell a value of JSON from all others, also by the order of its keys."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def get(kind: str, key: str) -> Any:
    """The value that was put under a key; None if there is none, or it is damaged.

    Args:
        kind: the folder of such values.
        key: from `digest_of`.
    """
    folder = cache_folder()
    if folder is None:
        return None
    file = folder / kind / f"{key}.json"
    try:
        entry = json.loads(file.read_bytes())
        if entry["key"] != key or entry["digest"] != digest_of(entry["value"]):
            return None
    except (OSError, ValueError, RecursionError, TypeError, LookupError):
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # what is used stays longest
    return entry["value"]


def put(kind: str, key: str, value: Any) -> None:
    """Keep a value, and remove those that were not used for longest where there are too many.

    Args:
        kind: as for `get`.
        key: as for `get`.
        value: of JSON, and not None. A very large one is not kept.
    """
    folder = cache_folder()
    if folder is None:
        return
    text = json.dumps({"key": key, "digest": digest_of(value), "value": value})
    if len(text) > _LARGEST:
        return

    file = folder / kind / f"{key}.json"
    draft = hidden(file, "tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not flushed to the disk, which may be slow: what a power failure damages is made again.
            draft.write_text(text, encoding="ascii")
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
        _trim(file.parent)


def _trim(folder: Path) -> None:
    """Remove entries, and drafts of killed processes, until the rest is not too large."""
    found = []
    for file in entries(folder):
        if _OURS.fullmatch(file.name):
            with contextlib.suppress(OSError):
                state = file.stat()
                found.append((state.st_mtime_ns, state.st_size, file))
    size = sum(size for _, size, _ in found)
    for _, each, file in sorted(found):
        if size <= _MOST:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        size -= each

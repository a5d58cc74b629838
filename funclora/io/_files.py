"""Files: replaced whole or not at all, locked, read as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from funclora.errors import FormatError


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], None]]) -> None:
    """Write files into a folder, each of which holds either its old or its whole new content at any time.

    Every file is first written under another name in the folder and flushed to disk; only then are they renamed, in
    the order given. If anything fails before, the folder is as it was.

    Args:
        folder: where to write; created if it does not exist.
        writers: file name -> function that writes the file to the path it is given.

    Raises:
        OSError: the folder or a file cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_files(Path(folder), {"a.txt": lambda file: file.write_text("new") and None})
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'new')]
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and would stay so.
    drafts = {name: folder / f".{name}.{uuid.uuid4().hex}.tmp" for name in writers}
    try:
        for name, write in writers.items():
            write(drafts[name])
            with drafts[name].open("r+b") as file:
                os.fsync(file.fileno())
        for name, draft in drafts.items():
            draft.replace(folder / name)
        flush_folder(folder)
    except BaseException:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: what lies there now is not ours
                folder.rmdir()
        raise


def flush_folder(folder: Path) -> None:
    """Make the renames durable, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone(path: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes out, which ask in the same way, where the system has such locks.

    The lock is the system's: a process that is killed leaves none.

    Args:
        path: a file or folder that is there.
        busy: what to raise if another process is in.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        yield
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        FormatError: it holds something else.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: this is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a JSON object, got {reprlib.repr(raw)}.")
    return raw

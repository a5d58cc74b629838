"""Files: replaced whole or not at all, locked, read as JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import reprlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from funclora.errors import FormatError


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], None]], *, together: bool = False) -> None:
    """Write files into a folder, each of which holds either its old or its whole new content at any time.

    Every file is first written under another name in the folder and flushed to disk; only then are they renamed, in
    the order given. If anything fails before, the folder is as it was. What a process that was killed has left is
    removed by the next one that writes the same file.

    Args:
        folder: where to write; created if it does not exist.
        writers: file name -> function that writes the file to the path it is given.
        together: the files mean nothing without each other, nor the folder without the last. It is taken away before
            the first is renamed: a process that is killed in between leaves a folder without it, not a mixture of old
            and new. Two processes that write the same folder would leave one too: one of them at least is refused.

    Raises:
        OSError: the folder or a file cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_files(Path(folder), {"a.txt": lambda file: file.write_text("new") and None})
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'new')]
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    drafts: dict[str, Path] = {}
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in writers.items():
                if (folder / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
                drafts[name] = held.enter_context(_draft(folder, name))
                if _others_write(folder, name, drafts[name]) and together:
                    raise OSError(errno.EBUSY, "another process is writing it at this moment", str(folder / name))
                write(drafts[name])
                with drafts[name].open("r+b") as file:
                    os.fsync(file.fileno())
            _rename(folder, drafts, together=together)
            flush_folder(folder)
        except BaseException:
            for draft in drafts.values():
                with contextlib.suppress(OSError):  # the folder is gone, or out of reach
                    draft.unlink(missing_ok=True)
            for path in made:
                with contextlib.suppress(OSError):  # not empty: what lies there now is not ours
                    path.rmdir()
            raise


def _rename(folder: Path, drafts: Mapping[str, Path], *, together: bool) -> None:
    done, aside = False, None
    last = folder / [*drafts][-1] if drafts else folder
    if together and last.exists():
        aside = _new_name(folder, last.name)
        last.replace(aside)
    try:
        for name, draft in drafts.items():
            draft.replace(folder / name)
            done = True
    except BaseException:
        if aside is not None and not done:
            aside.replace(last)
        raise
    if aside is not None:
        aside.unlink(missing_ok=True)


def _new_name(folder: Path, name: str) -> Path:
    # Not tempfile: its files are readable by their owner only, and would stay so.
    return folder / f".{name}.{uuid.uuid4().hex}.tmp"


@contextlib.contextmanager
def _draft(folder: Path, name: str) -> Iterator[Path]:
    """A new empty file under another name, locked as long as the block lasts: so it is seen not to be abandoned."""
    with contextlib.ExitStack() as held:
        while True:
            draft = _new_name(folder, name)
            draft.touch(exist_ok=False)
            with contextlib.suppress(OSError):  # some file systems have no locks, and nothing is removed there
                held.enter_context(lock_folder(draft, BlockingIOError()))
            if draft.exists():  # else another process has come before the lock
                break
        yield draft


def _others_write(folder: Path, name: str, own: Path) -> bool:
    """Whether another process writes the same file now. Drafts whose processes have ended are removed."""
    others = False
    for file in folder.iterdir() if sys.platform != "win32" else ():
        if file != own and re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}\.tmp", file.name):
            try:
                with lock_folder(file, BlockingIOError()):
                    file.unlink()
            except BlockingIOError:
                others = True
            except OSError:  # it is gone, or nobody can lock it
                continue
    return others


def flush_folder(folder: Path) -> None:
    """Make the renames durable, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def lock_folder(path: Path, busy: Exception) -> Iterator[None]:
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

"""Locks that keep other processes out of a folder, or from making the same file.

They are locks of the operating system: a process that is killed leaves none.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def lock_folder(path: Path, busy: Exception) -> Iterator[None]:
    """Keep out other processes that use the same lock, if the system has such locks.

    Args:
        path: a file or folder that exists.
        busy: the error to raise if another process holds the lock.
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


@contextlib.contextmanager
def claimed_folder(folder: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes out of an output folder, before anything in it is read or written.

    The folder is made, and removed again if it is empty at the end.

    Args:
        folder: the folder, which need not exist.
        busy: the error to raise if another process holds the lock.

    Raises:
        OSError: the folder cannot be made.
    """
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder, busy):
            yield
    finally:
        remove_empty(made)


@contextlib.contextmanager
def claimed_file(file: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes from making the same file, with a locked file of a random name beside it.

    Args:
        file: the file, which need not exist.
        busy: the error to raise if another process makes the file; not an `OSError`.

    Raises:
        OSError: the file cannot be made.
    """
    made = missing(file.parent)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)

        def make(path: Path) -> None:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

        with locked_beside(file, "claim", make, os.unlink, busy) as claim:
            try:
                yield
            finally:
                claim.unlink(missing_ok=True)
    finally:
        remove_empty(made)


@contextlib.contextmanager
def locked_beside(
    path: Path, kind: str, make: Callable[[Path], None], remove: Callable[[Path], None], busy: Exception
) -> Iterator[Path]:
    """A new locked hidden file or folder beside a path. Those that killed processes left there are removed.

    Args:
        path: the file or folder that the new one represents.
        kind: the last part of its name.
        make: makes it, and raises `FileExistsError` if it exists already.
        remove: removes one that a killed process left.
        busy: the error to raise if a process holds another one; not an `OSError`. The new one is then removed.
    """
    with contextlib.ExitStack() as held:
        while True:
            own = hidden(path, kind)
            make(own)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                held.enter_context(lock_folder(own, BlockingIOError()))
                if own.exists():  # otherwise another process considered it abandoned
                    break
        try:
            for other in path.parent.iterdir():
                if other != own and is_hidden(other, path.name, kind):
                    with contextlib.suppress(OSError), lock_folder(other, busy):
                        remove(other)
        except BaseException:
            remove(own)
            raise
        yield own


def hidden(path: Path, kind: str, tag: str | None = None) -> Path:
    """An unpredictable name beside a path: `.NAME.TAG.KIND`."""
    return path.parent / f".{path.name}.{tag or secrets.token_hex(16)}.{kind}"


def is_hidden(path: Path, name: str, kind: str) -> bool:
    """Whether a path has a name that `hidden` gives."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}\.{kind}", path.name) is not None


def entries(folder: Path) -> list[Path]:
    """The entries of a folder; none if it does not exist."""
    try:
        return [*folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def missing(folder: Path) -> list[Path]:
    """Those of the folder and its parents that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, until one is not empty: its content belongs to others."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()

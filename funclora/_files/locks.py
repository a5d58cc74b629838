"""Locks that keep other processes out of a folder, or away from a file that is to be made.

They are the system's: a process that is killed leaves none.
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
    """Keep other processes out, which ask in the same way, where the system has such locks.

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


@contextlib.contextmanager
def claimed_folder(folder: Path, busy: Exception) -> Iterator[None]:
    """Keep other processes out of a folder that results go to, before anything in it is read or written.

    The folder is made, and removed again if it is empty at the end.

    Args:
        folder: the folder, which need not be there.
        busy: what to raise if another process is in.

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
    """Keep other processes from making the same file, by a locked one with a random name beside it.

    Args:
        file: the file, which need not be there.
        busy: what to raise, no `OSError`, if another process makes it.

    Raises:
        OSError: there cannot be a file.
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
    """A new hidden file or folder beside a path, locked, after all that killed processes have left there is removed.

    Args:
        path: what the new one stands for.
        kind: the last part of its name.
        make: makes it, and raises `FileExistsError` if there is something already.
        remove: removes one that was left.
        busy: what to raise, no `OSError`, if there is one that a process holds. The new one is then removed.
    """
    with contextlib.ExitStack() as held:
        while True:
            own = hidden(path, kind)
            make(own)
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                held.enter_context(lock_folder(own, BlockingIOError()))
                if own.exists():  # else another process took it for one that was left
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
    """A name beside a path that nobody can predict: `.NAME.TAG.KIND`."""
    return path.parent / f".{path.name}.{tag or secrets.token_hex(16)}.{kind}"


def is_hidden(path: Path, name: str, kind: str) -> bool:
    """Whether a path has a name that `hidden` gives."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{32}}\.{kind}", path.name) is not None


def entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing, if there is none."""
    try:
        return [*folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def missing(folder: Path) -> list[Path]:
    """The folder and its parents as far as they are not there, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, until one is not empty: what is in there is not ours."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()

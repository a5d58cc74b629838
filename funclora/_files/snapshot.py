"""Files of a folder as they were at one moment, even if another process replaces them meanwhile."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from funclora._files.atomic import has_drafts, stand_in
from funclora._files.staging import has_draft
from funclora.errors import FormatError

_PATIENCE = 2.0  # seconds that a reader waits for a writer
_TICK = 0.02  # seconds, longer than a step of a file system's clock

State = tuple[int, int, int, int]  # device, number, size, time of the last change: no two versions of a file share it


class ChangedError(FormatError):
    """Another process replaces or changes the files that are read."""


class OpenFile:
    """A file that is open for reading. If another file gets its name meanwhile, this one does not change.

    It is closed when it is no longer used, or by `close`.

    Attributes:
        path: its path when it was opened.
        descriptor: the system's file descriptor.
        state: its state when it was opened.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no file. A folder or a device is not a file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Do not wait for the other end of a pipe; for a file this changes nothing.
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        self._close = weakref.finalize(self, os.close, self.descriptor)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            self.close()
            raise FileNotFoundError(f"{path} is not a file")
        self.state = _state(os.fstat(self.descriptor))

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.state[2]

    def read(self, start: int = 0, nbytes: int | None = None) -> bytes:
        """Its bytes from a position on; fewer than requested if the file ends before.

        Raises:
            OSError: they cannot be read.
        """
        left = self.size - start if nbytes is None else nbytes
        parts: list[bytes] = []
        while left > 0 and (part := os.pread(self.descriptor, left, start)):
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return b"".join(parts)

    def check(self) -> None:
        """Raise `ChangedError` if the file was written to since it was opened: the read bytes may be mixed."""
        if _state(os.fstat(self.descriptor)) != self.state:
            raise ChangedError(f"{self.path}: another process has changed it while it was read. {_LATER}")

    def close(self) -> None:
        """Close it."""
        self._close()


_LATER = "Try again when that is done."


def open_files(folder: Path, names: Sequence[str]) -> dict[str, OpenFile]:
    """Open files that belong together, all of one version.

    While a writer replaces them, this waits a short time. Between the renames of `replace_files(..., together=True)`
    the last file is read from its draft.

    Args:
        folder: the folder.
        names: the files, in the order in which they are written.

    Returns:
        Name -> file, without the files that do not exist.

    Raises:
        ChangedError: they are replaced repeatedly.
        OSError: one cannot be read.
    """
    stands_still = Stillness(folder)
    for last in attempts():
        places = {name: folder / name for name in names}
        if not places[names[-1]].exists() and (found_last := stand_in(folder, names)) is not None:
            places[names[-1]] = found_last
        found = {name: file for name, path in places.items() if (file := _opened(path)) is not None}
        same = all(state_of(path) == (found[name].state if name in found else None) for name, path in places.items())
        if same and places[names[-1]].name != names[-1]:  # it is still the draft of the last file
            same = stand_in(folder, names) == places[names[-1]]
        if same and (len(found) == len(names) or last or (not has_drafts(folder, names) and stands_still())):
            return found
    raise being_replaced(folder)


class Stillness:
    """Whether a folder does not change: a missing file is then really missing, and not between two renames.

    To read the folder twice is not sufficient: the file may be missing during two successive writes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stamp, self._since = (0, 0), 0.0

    def __call__(self) -> bool:
        """Whether nothing has been renamed in the folder, or beside it if there is none, for a moment."""
        if has_draft(self._folder):
            return False
        now = time.monotonic()
        stamp = next((_changed(path) for path in (self._folder, *self._folder.parents) if path.is_dir()), (0, 0))
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        return now - self._since >= _TICK


def _changed(folder: Path) -> tuple[int, int]:
    try:
        found = folder.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def being_replaced(folder: Path) -> ChangedError:
    """The error for a folder that was never found complete."""
    return ChangedError(f"{folder}: it is being replaced by another process. {_LATER}")


def attempts() -> Iterator[bool]:
    """Attempts that a writer may disturb, for a bounded time, with short waits. Yields whether it is the last one."""
    end, wait = time.monotonic() + _PATIENCE, 0.001
    while time.monotonic() < end:
        yield False
        time.sleep(wait)
        wait = min(2 * wait, 0.05)
    yield True


def state_of(path: Path) -> State | None:
    """The current state of a file; None if it does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return _state(found) if stat.S_ISREG(found.st_mode) else None


def _opened(path: Path) -> OpenFile | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return OpenFile(path)
    return None


def _state(found: os.stat_result) -> State:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

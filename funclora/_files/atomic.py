"""Files: replaced completely or not at all, read as JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import reprlib
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from funclora._files.locks import entries, hidden, lock_folder, missing, remove_empty
from funclora.errors import FormatError

# Drafts of one call share a tag: `.NAME.TAG.tmp`, or `.NAME.TAG.new.tmp` if the files are written together. Between
# the renames of such files the old version of the last file is `.NAME.TAG.old.tmp`.
_ALONE, _NEW, _OLD = "tmp", "new.tmp", "old.tmp"


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], None]], *, together: bool = False) -> None:
    """Write files into a folder. At any time each file has either its old or its complete new content.

    Every file is first written under another name in the folder and flushed to disk; only then are they renamed, in
    the order given. If anything fails before, the folder is unchanged. The next process that writes the same file
    removes the drafts of killed processes. A file that is replaced keeps its permissions, and a draft is never
    readable for more users than the result.

    Args:
        folder: where to write; created if it does not exist.
        writers: file name -> function that writes the file to the path it is given.
        together: the files are valid only together, and the folder only with the last file. The last file is moved
            away before the first one is renamed: a process that is killed in between leaves a folder without it, not a
            mixture of old and new files; `stand_in` finds the version that belongs to the other files. Two processes
            that write the same folder would also leave a mixture: at least one of them is refused.

    Raises:
        OSError: the folder or a file cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_files(Path(folder), {"a.txt": lambda file: file.write_text("new") and None})
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'new')]
    """
    made, tag = missing(folder), secrets.token_hex(16)
    drafts: dict[str, Path] = {}
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in writers:
                if (folder / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
                kind = _NEW if together else _ALONE
                drafts[name] = held.enter_context(_draft(hidden(folder / name, kind, tag), _mode(folder / name)))
            if _others_write(folder, [*writers], tag, together=together) and together:
                first = folder / next(iter(writers))
                raise OSError(errno.EBUSY, "another process is writing it at this moment", str(first))
            for name, write in writers.items():
                write(drafts[name])
                mode = _mode(folder / name)
                with drafts[name].open("r+b") as file:
                    os.fsync(file.fileno())
                if mode is not None and _mode(drafts[name]) != mode:
                    drafts[name].chmod(mode)
            _rename(folder, drafts, tag, together=together)
            flush_folder(folder)
        except BaseException:
            for draft in reversed(drafts.values()):  # the last file first: its draft alone would seem to be valid
                with contextlib.suppress(OSError):  # the folder is removed, or inaccessible
                    draft.unlink(missing_ok=True)
            remove_empty(made)
            raise


def _rename(folder: Path, drafts: Mapping[str, Path], tag: str, *, together: bool) -> None:
    done, aside = False, None
    last = folder / [*drafts][-1] if drafts else folder
    if together and last.exists():
        aside = hidden(last, _OLD, tag)
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


def stand_in(folder: Path, names: Sequence[str]) -> Path | None:
    """The draft of the last of some files that are written together, while it is missing between two renames.

    It is the version that belongs to the other files: the old one as long as none of them is replaced, the new one
    when all are replaced. This is also correct if the writer was killed in between.

    Args:
        folder: the folder.
        names: the files, in the order in which they are written.
    """
    return next(filter(None, (_last_of(folder, names, tag) for tag in _by_tag(folder, names[-1:]))), None)


def _last_of(folder: Path, names: Sequence[str], tag: str) -> Path | None:
    *others, last = names
    waiting = [hidden(folder / name, _NEW, tag).exists() for name in others]
    old, new = hidden(folder / last, _OLD, tag), hidden(folder / last, _NEW, tag)
    if all(waiting) and old.exists():
        return old
    return new if not any(waiting) and new.exists() else None


def has_drafts(folder: Path, names: Sequence[str]) -> bool:
    """Whether a process writes one of these files of a folder at this moment, or was killed while it did."""
    return bool(_by_tag(folder, names))


def _by_tag(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The drafts of some files by their tag, in the order of the names."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.([0-9a-f]{{32}})\.(?:(?:new|old)\.)?tmp")
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in entries(folder):
        if match := pattern.fullmatch(file.name):
            found.setdefault(match[2], []).append((names.index(match[1]), file))
    return {tag: [file for _, file in sorted(files)] for tag, files in found.items()}


def _mode(file: Path) -> int | None:
    """The permissions of a file; None if there is none."""
    try:
        return stat.S_IMODE(file.stat().st_mode) & 0o777
    except OSError:
        return None


@contextlib.contextmanager
def _draft(draft: Path, mode: int | None) -> Iterator[Path]:
    """A new empty file, locked during the block, so that other processes see that it is in use."""
    with contextlib.ExitStack() as held:
        while True:
            # Its owner must be able to write to it, even if the file that it replaces is read-only.
            flags, wanted = os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode | 0o600
            os.close(os.open(draft, flags, wanted))
            try:
                held.enter_context(lock_folder(draft, BlockingIOError()))
            except (BlockingIOError, FileNotFoundError):  # another process considered it abandoned
                draft.unlink(missing_ok=True)
                continue
            except OSError:  # some file systems have no locks, and nothing is removed there
                break
            if draft.exists():
                break
        yield draft


def _others_write(folder: Path, names: Sequence[str], own: str, *, together: bool) -> bool:
    """Whether another process writes the same files now. Drafts of processes that have ended are removed.

    If a process was killed between its renames, the last file that belongs to the others is first put into place.
    """
    found = _by_tag(folder, names) if sys.platform != "win32" else {}
    held = [_is_held(folder, names, tag, files, together) for tag, files in found.items() if tag != own]
    return any(held)  # only after all of them were checked


def _is_held(folder: Path, names: Sequence[str], tag: str, files: Sequence[Path], together: bool) -> bool:
    """Whether a process holds one of these drafts. If not, they are removed."""
    try:
        with contextlib.ExitStack() as locks:
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    locks.enter_context(lock_folder(file, BlockingIOError()))
            last = folder / names[-1]
            if together and not last.exists() and (found := _last_of(folder, names, tag)) is not None:
                found.replace(last)
            for file in reversed(files):
                file.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except OSError:  # it cannot be locked or removed
        return False
    return False


def flush_folder(folder: Path) -> None:
    """Make the renames durable, if the system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: the file holds something else.
    """
    return parse_json(file, file.read_bytes())


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """The object in the content of a JSON file.

    Args:
        file: its name, for messages.
        content: its bytes.

    Raises:
        FormatError: the content is something else.
    """
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: this is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a JSON object, got {reprlib.repr(raw)}.")
    return raw

"""Files: replaced whole or not at all, read as JSON."""

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

# Drafts of one call share a tag: `.NAME.TAG.tmp`, or `.NAME.TAG.new.tmp` where the files are written together. Between
# the renames of such files the last of the old ones is `.NAME.TAG.old.tmp`.
_ALONE, _NEW, _OLD = "tmp", "new.tmp", "old.tmp"


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], None]], *, together: bool = False) -> None:
    """Write files into a folder, each of which holds either its old or its whole new content at any time.

    Every file is first written under another name in the folder and flushed to disk; only then are they renamed, in
    the order given. If anything fails before, the folder is as it was. What a process that was killed has left is
    removed by the next one that writes the same file. A file that is replaced keeps its permissions, and a draft is
    never readable for more users than the result.

    Args:
        folder: where to write; created if it does not exist.
        writers: file name -> function that writes the file to the path it is given.
        together: the files mean nothing without each other, nor the folder without the last. It is taken away before
            the first is renamed: a process that is killed in between leaves a folder without it, not a mixture of old
            and new; `stand_in` finds the one that belongs to what is there. Two processes that write the same folder
            would leave a mixture too: one of them at least is refused.

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
            for draft in reversed(drafts.values()):  # the last first: without the others it would seem to be valid
                with contextlib.suppress(OSError):  # the folder is gone, or out of reach
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
    """Where the last of some files is that are written together, while it is missing between two renames.

    It is what belongs to the other files as they are: the old one as long as none of them is replaced, the new one
    when all are. That also holds where the writer was killed in between.

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
    """A new empty file, locked as long as the block lasts: so it is seen not to be abandoned."""
    with contextlib.ExitStack() as held:
        while True:
            # Its owner writes into it, whatever the permissions of the file that it replaces.
            flags, wanted = os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode | 0o600
            os.close(os.open(draft, flags, wanted))
            try:
                held.enter_context(lock_folder(draft, BlockingIOError()))
            except (BlockingIOError, FileNotFoundError):  # another process took it for an abandoned one
                draft.unlink(missing_ok=True)
                continue
            except OSError:  # some file systems have no locks, and nothing is removed there
                break
            if draft.exists():
                break
        yield draft


def _others_write(folder: Path, names: Sequence[str], own: str, *, together: bool) -> bool:
    """Whether another process writes the same files now. What processes that have ended left is removed.

    If one was killed between its renames, the file that belongs to the others is put into its place first.
    """
    found = _by_tag(folder, names) if sys.platform != "win32" else {}
    held = [_is_held(folder, names, tag, files, together) for tag, files in found.items() if tag != own]
    return any(held)  # after all of them were looked at


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
    except OSError:  # nobody can lock or remove it
        return False
    return False


def flush_folder(folder: Path) -> None:
    """Make the renames durable, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        FormatError: it holds something else.
    """
    return parse_json(file, file.read_bytes())


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """The object in the content of a file of JSON.

    Args:
        file: its name, for messages.
        content: what it holds.

    Raises:
        FormatError: it holds something else.
    """
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: this is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{file}: expected a JSON object, got {reprlib.repr(raw)}.")
    return raw

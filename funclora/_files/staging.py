"""A folder that appears completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from funclora._files.atomic import flush_folder
from funclora._files.locks import entries, hidden, is_hidden, locked_beside, missing, remove_empty
from funclora.errors import ConfigError

_DRAFT = "partial"


def check_out(out: Path, sources: Sequence[Path]) -> None:
    """Raise `ConfigError` if a folder cannot be made: the path is in use, or it overlaps with a folder that is read.

    Args:
        out: the folder that is to be made.
        sources: the folders that are read.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"out_dir: {out} exists and is not a folder. Give the name of a new one.")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"out_dir: the folder {out} is not empty. Give the name of a new one, or remove it.")
    for source in sources:
        a, b = out.resolve(), source.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ConfigError(f"out_dir: {out} overlaps with {source}, which is read. Give another name.")


@contextlib.contextmanager
def staged_folder(out: Path, sources: Sequence[Path] = (), *, replace: bool = False) -> Iterator[Path]:
    """A new folder next to `out`, renamed to `out` if the block ends without an exception, otherwise removed.

    Enter it before anything is read: it also keeps other processes from the same `out`. A process that is killed leaves
    it behind; the next one for the same `out` removes it. It has the permissions of `out`, if `out` exists.

    Args:
        out: the folder that is to be made.
        sources: the folders that are read for it.
        replace: `out` may exist, and is removed when the new folder has replaced it; otherwise it must be empty.

    Raises:
        ConfigError: `out` is in use, or another process writes it.
        OSError: the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with staged_folder(Path(parent, "out")) as draft:
        ...         _ = (draft / "a.txt").write_text("new")
        ...         before = Path(parent, "out").exists()
        ...     before, [file.name for file in Path(parent, "out").iterdir()]
        (False, ['a.txt'])
    """
    if not replace:
        check_out(out, sources)
    made = missing(out.parent)
    busy = ConfigError(f"out_dir: another process is writing {out} at this moment. Wait for it to end.")
    mode = out.stat().st_mode & 0o777 if out.is_dir() else None

    def make(draft: Path) -> None:
        draft.mkdir(mode=0o777 if mode is None else mode)
        if mode is not None:
            draft.chmod(mode)  # the umask may have removed permissions

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked_beside(out, _DRAFT, make, shutil.rmtree, busy) as draft:
            try:
                if not replace:
                    check_out(out, ())  # another process may have ended meanwhile
                yield draft
                flush_folder(draft)
                _put(draft, out, replace=replace)
                flush_folder(out.parent)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
    except BaseException:
        remove_empty(made)
        raise


def _put(draft: Path, out: Path, *, replace: bool) -> None:
    if replace and out.is_dir() and any(out.iterdir()):
        aside = hidden(out, _DRAFT)
        out.rename(aside)
        try:
            draft.rename(out)
        except BaseException:
            aside.rename(out)
            raise
        shutil.rmtree(aside)
        return
    if out.is_dir():
        out.rmdir()  # raises if it is not empty
    draft.rename(out)


def has_draft(out: Path) -> bool:
    """Whether a process makes the folder at this moment, or was killed while it did."""
    return any(is_hidden(path, out.name, _DRAFT) for path in entries(out.parent))


def flush_files(folder: Path) -> None:
    """Make every file in a folder durable.

    Raises:
        OSError: one cannot be flushed.
    """
    for path, _, names in os.walk(folder):
        for name in names:
            with Path(path, name).open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(Path(path))

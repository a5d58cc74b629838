"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from funclora._files.atomic import flush_folder, lock_folder
from funclora.errors import ConfigError


def check_out(out: Path, sources: Sequence[Path]) -> None:
    """Raise `ConfigError` if a folder cannot be made there: something lies there, or it is one that is read.

    Args:
        out: the folder that is to be made.
        sources: the folders that are read.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"out_dir: {out} is there and is not a folder. Give the name of a new one.")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"out_dir: the folder {out} is not empty. Give the name of a new one, or remove it.")
    for source in sources:
        a, b = out.resolve(), source.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ConfigError(f"out_dir: {out} and {source}, which is read, lie in each other. Give another name.")


@contextlib.contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A new folder next to `out`, which gets its name when the block ends without an exception, and is removed else.

    A process that is killed leaves it behind; the next one for the same `out` removes it.

    Args:
        out: the folder that is to be made; it does not exist or is empty.

    Raises:
        ConfigError: another process is at work on the same folder.
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
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.funclora-partial"
    busy = _BusyError(f"out_dir: another process is writing {out} at this moment ({draft}).")
    with contextlib.ExitStack() as held:
        try:
            if draft.exists():
                held.enter_context(lock_folder(draft, busy))
                shutil.rmtree(draft)
            draft.mkdir()
            held.enter_context(lock_folder(draft, busy))
            yield draft
            flush_folder(draft)
            if out.is_dir():
                out.rmdir()  # empty, or this raises
            draft.rename(out)
            flush_folder(out.parent)
        except BaseException as error:
            if not isinstance(error, _BusyError):
                shutil.rmtree(draft, ignore_errors=True)
                for parent in made:
                    with contextlib.suppress(OSError):  # not empty: what lies there now is not ours
                        parent.rmdir()
            raise


class _BusyError(ConfigError):
    """Another process holds the folder."""

"""File names that come from outside: from another file, or with a request."""

from __future__ import annotations

import reprlib
from pathlib import Path

from funclora.errors import FormatError

_LONGEST = 255  # bytes that file systems allow for a name


def is_file_name(name: object) -> bool:
    """Whether a value is the name of a file in some folder, and cannot lead out of that folder.

    Examples:
        >>> [is_file_name(name) for name in ("a.txt", "../a.txt", "..", "/a", "", "a" * 5000, 7)]
        [True, False, False, False, False, False, False]
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and len(name.encode()) <= _LONGEST
        and name not in ("", ".", "..")
        and "\\" not in name
        and Path(name).name == name
    )


def file_inside(folder: Path, name: object, where: str, *, links: bool = False) -> Path:
    """The file of a folder that another file names.

    Args:
        folder: the folder.
        name: the value that was read.
        where: the file and the place in it, for messages.
        links: the file may be a link to another folder, like all files in the cache of the Hugging Face Hub.

    Raises:
        FormatError: it is not a file name, or leads out of the folder.
    """
    if not is_file_name(name):
        raise FormatError(f"{where}: expected names of files in this folder, got {reprlib.repr(name)}.")
    path = folder / str(name)
    if not links and path.resolve() != folder.resolve() / path.name:
        raise FormatError(f"{where}: {name!r} is a link that leads out of the folder.")
    return path

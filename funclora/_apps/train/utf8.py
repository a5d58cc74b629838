"""Text files, strictly: UTF-8, with lines of bounded length; errors name the file, the line and the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from funclora.errors import FormatError

# Maximum bytes of a line, so that another kind of file, such as one without line ends, cannot fill the memory.
LONGEST_LINE = 1 << 26
# Maximum bytes of a file that is read at once.
LARGEST_FILE = 1 << 32
NEWLINE = b"\n"
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1, including line ends."""
    for number, start, line in raw_lines(file):
        yield number, decode(line, file, number, start)


def raw_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """The lines, not decoded, with their numbers and the byte at which each begins."""
    start = 0
    with file.open("rb") as stream:
        # Bytes, not text: only \n ends a line. U+2028 and similar characters may be part of a string.
        for number in range(1, 1 << 62):
            line = stream.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise FormatError(
                    f"{file}:{number}: this line is longer than {LONGEST_LINE >> 20} MiB. Are the records separated by "
                    "line ends?"
                )
            yield number, start, line
            start += len(line)


def decode(content: bytes, file: Path, line: int = 1, start: int = 0) -> str:
    """UTF-8, without a byte order mark at the beginning of the file.

    Args:
        content: a part of the file.
        file: for messages.
        line: the line at which the part begins.
        start: the byte at which it begins.

    Raises:
        FormatError: it is something else.
    """
    skip = 0
    if start == 0:
        if content.startswith(UTF16):
            raise FormatError(f"{file}:1: this is UTF-16, expected UTF-8. Convert the file.")
        skip = len(BOM) if content.startswith(BOM) else 0
    try:
        return content[skip:].decode()
    except UnicodeDecodeError as error:
        at = skip + error.start
        raise FormatError(
            f"{file}:{line + content.count(NEWLINE, 0, at)}: byte {start + at} of the file, {content[at]:#04x}, "
            "is not UTF-8. Convert the file to UTF-8."
        ) from error


def whole(file: Path) -> str:
    """All of a file.

    Raises:
        FormatError: it is too large for that, or not UTF-8.
    """
    if file.stat().st_size > LARGEST_FILE:
        raise FormatError(f"{file}: this file is read at once, but is larger than {LARGEST_FILE >> 30} GiB. Split it.")
    return decode(file.read_bytes(), file)


def text(file: Path) -> str:
    """The whole contents of a file written by people.

    Raises:
        FormatError: as for `whole`, or it has a zero byte.
    """
    content = whole(file)
    if "\0" in content:
        at = content.count("\n", 0, content.index("\0")) + 1
        raise FormatError(f"{file}:{at}: contains a zero byte, so this is not a text.")
    return content

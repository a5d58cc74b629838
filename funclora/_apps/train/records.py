"""Data files: JSONL, JSON, CSV, Parquet and texts as records, each with its source.

The contents of a file are used as they are, or refused with file and line. Nothing is guessed or repaired; skipped are
only blank lines, in folders hidden files, and the broken records that a caller takes note of.
"""

from __future__ import annotations

import csv
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funclora._apps.train import utf8
from funclora._apps.train.strict_json import parse
from funclora.errors import FormatError

TEXT = "text"  # the kind of every file whose suffix is not in READERS
SEPARATORS = {".csv": ",", ".tsv": "\t"}

Item = tuple[dict[str, Any] | FormatError, str]  # a record or what is wrong with it, and its place in the file


@dataclass(frozen=True)
class Record:
    """An object of a file.

    Attributes:
        fields: its values by name.
        source: the file's name and the place in it, such as "train.jsonl:17" (a line) or "train.parquet[16]" (a row,
            from 0); of a file in a folder, its path in the folder.
        where: the same with the whole path, for messages.
    """

    fields: dict[str, Any]
    source: str
    where: str


OnBad = Callable[[FormatError], None]


def refuse(error: FormatError) -> None:
    """Stop at a broken record."""
    raise error


def read(path: Path, text_field: str = "text", on_bad: OnBad = refuse) -> Iterator[Record]:
    r"""The records of a file, or of all files of a folder.

    The suffix says what a file is: `.jsonl` (or `.ndjson`) has an object in each line, `.json` is an array of
    objects, `.csv` and `.tsv` begin with a row of names, `.parquet` is a table. Any other file is one text. A folder is
    read in the order of its paths and must contain files of one kind; names that begin with a dot are left out.

    Args:
        path: the file or folder.
        text_field: the field name for a text.
        on_bad: called with the error for a record that is broken; if it returns, the record is skipped.

    Raises:
        FormatError: there is nothing at `path`, it cannot be read, or it is empty, broken or of another format.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "train.jsonl")
        ...     _ = file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
        ...     [(record.fields, record.source) for record in read(file)]
        [({'text': 'a'}, 'train.jsonl:1'), ({'text': 'b'}, 'train.jsonl:3')]
    """
    files = files_of(path)
    kinds = {_kind(file): file for file in files.values()}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise FormatError(
            f"{path}: contains files of several kinds, such as {one.name} and {other.name}. Give one file."
        )
    for name, file in files.items():
        found = False
        for fields, place in _open(file, text_field):
            found = True
            if isinstance(fields, FormatError):
                on_bad(fields)
            else:
                yield Record(fields, name + place, f"{file}{place}")
        if not found:
            raise FormatError(f"{file}: contains no records.")


def texts(path: Path, field: str, remedy: str = "") -> list[str]:
    """The text under `field` of every record.

    Args:
        path: as for `read`.
        field: of the texts.
        remedy: what to do if a record has none, as the end of the message.

    Raises:
        FormatError: as for `read`, or a record has no text there.
    """
    found = []
    for record in read(path, field):
        text = record.fields.get(field)
        if not isinstance(text, str):
            there = f"it has {', '.join(map(_short, record.fields))}." if record.fields else "it has no fields."
            raise FormatError(f"{record.where}: expected a text under {field!r}; {there}{remedy}")
        found.append(text)
    return found


def is_text(file: Path) -> bool:
    """Whether a file is one text, by its suffix, and not a file of records."""
    return _kind(file) == TEXT


def files_of(path: Path) -> dict[str, Path]:
    """The files that are read, by their names in sources.

    Raises:
        FormatError: there is no file in the folder.
    """
    return _files(path) if path.is_dir() else {path.name: path}


def _files(folder: Path) -> dict[str, Path]:
    """All files in a folder by their path in it, sorted."""
    found: dict[str, Path] = {}
    seen = set()
    for at, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        here = os.path.realpath(at)
        if here in seen:
            raise FormatError(f"{at}: this link leads back to a folder that is already being read. Remove it.")
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(at, name)
                found[file.relative_to(folder).as_posix()] = file
    if not found:
        raise FormatError(f"{folder}: there is no file in this folder.")
    return dict(sorted(found.items()))


def _refuse(error: OSError) -> None:
    raise FormatError(f"{error.filename}: cannot be read: {error.strerror}.") from error


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix == ".ndjson":
        return ".jsonl"
    return suffix if suffix in READERS else TEXT


def _open(file: Path, text_field: str) -> Iterator[Item]:
    if not file.exists():
        raise FormatError(f"{file}: there is no such file.")
    if not file.is_file():
        raise FormatError(f"{file}: this is not a regular file.")
    try:
        if not file.stat().st_size:
            raise FormatError(f"{file}: this file is empty.")
        reader = READERS.get(_kind(file))
        yield from reader(file) if reader else [({text_field: utf8.text(file)}, "")]
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror or error}.") from error


def _jsonl(file: Path) -> Iterator[Item]:
    for number, start, content in utf8.raw_lines(file):
        where = f"{file}:{number}"
        try:
            line = utf8.decode(content, file, number, start)
            if line.strip(" \t\r\n"):
                yield _line(line, where), f":{number}"
        except FormatError as error:
            yield error, f":{number}"


def _line(line: str, where: str) -> dict[str, Any]:
    try:
        value = parse(line, where, "JSON in each line")
    except FormatError as error:
        if not line.endswith("\n") and isinstance(error.__cause__, ValueError) and _cut_off(error.__cause__):
            raise FormatError(f"{error} The file ends in this line: is it cut off?") from error.__cause__
        if line.strip() == "[":
            raise FormatError(f"{error} A file that is one array of objects is named .json.") from error.__cause__
        raise
    if isinstance(value, list):
        raise FormatError(
            f"{where}: expected an object in each line, got {_short(value)}. A file that is one array of objects is "
            "named .json."
        )
    return _object(value, where)


def _cut_off(error: ValueError) -> bool:
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()
    )


def _json(file: Path) -> Iterator[Item]:
    value = parse(utf8.whole(file), str(file))
    if not isinstance(value, list):
        raise FormatError(
            f"{file}: expected an array of objects, got {_short(value)}. A file with one object in each line is named "
            ".jsonl."
        )
    for i, item in enumerate(value):
        try:
            yield _object(item, f"{file}[{i}]"), f"[{i}]"
        except FormatError as error:  # noqa: PERF203 -- each is a record
            yield error, f"[{i}]"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f'{where}: expected an object such as {{"text": "..."}}, got {_short(value)}.')
    return value


def _csv(file: Path) -> Iterator[Item]:
    # Every value is its text: something that looks like a number or a missing value may be meant as text.
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        for at, line in utf8.lines(file):
            if "\0" in line:
                raise FormatError(f"{file}:{at}: contains a zero byte, so this is not a text.")
            yield line

    rows = _rows(lines(), SEPARATORS[file.suffix.lower()], lambda: f"{file}:{at}")
    names: list[str] = []
    begin = 1
    for row in rows:
        if row and not names:
            names = row
            if len(names) == 1 and (other := next((sign for sign in ";\t|" if sign in names[0]), None)):
                raise FormatError(
                    f"{file}:{begin}: expected names with {SEPARATORS[file.suffix.lower()]!r} between them, got "
                    f"{_short(names[0])}. Are the values separated by {other!r}? Write them with commas as .csv, or "
                    "with tabs as .tsv."
                )
            first = {name: i for i, name in reversed([*enumerate(names)])}
            for i, name in enumerate(names):
                if not name.strip() or first[name] < i:
                    problem = "appears twice" if name.strip() else "is blank"
                    raise FormatError(f"{file}:{begin}: column {i + 1}: the name {_short(name)} {problem}.")
        elif row:
            yield _values(names, row, f"{file}:{begin}"), f":{begin}"
        begin = at + 1


def _values(names: list[str], row: list[str], where: str) -> dict[str, Any] | FormatError:
    if len(row) == len(names):
        return dict(zip(names, row, strict=True))
    return FormatError(
        f"{where}: expected {len(names)} values, one for each name in the first row, got {len(row)}. Put values with "
        "separators or line ends into double quotes."
    )


def _rows(lines: Iterable[str], separator: str, where: Callable[[], str]) -> Iterator[list[str]]:
    """The rows, with longer values than the csv module accepts by default; that limit belongs to the process."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        limit = csv.field_size_limit(utf8.LONGEST_LINE)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise FormatError(f"{where()}: expected a row of values: {error}.") from error
        finally:
            csv.field_size_limit(limit)
        yield row


def _parquet(file: Path) -> Iterator[Item]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise FormatError(f"{file}: reading Parquet needs pyarrow. Type: pip install 'funclora[train]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise FormatError(f"{file}: a column's name appears twice: {', '.join(names)}.")
            i = 0
            for part in table.iter_batches(batch_size=1024):
                for fields in part.to_pylist():
                    yield fields, f"[{i}]"
                    i += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: this is not a complete Parquet file: {' '.join(str(error).split())}") from error


def _short(value: Any) -> str:
    return reprlib.repr(value)


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}

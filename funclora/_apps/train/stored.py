"""Examples on the disk: an Arrow file of which a row is read when it is asked for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from funclora._apps.train.rows import Example
from funclora.errors import FormatError

ROWS = 64  # of a part of the file that is read at once
CHUNK = 1 << 22


class Writer:
    """Writes the examples of a part of the data, one after the other.

    Attributes:
        digest: of the examples so far.
        largest: the row with the largest id.
    """

    def __init__(self, file: Path) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        numbers = pa.list_(pa.int32())
        fields = [
            ("ids", numbers), ("labels", numbers), ("lengths", numbers), ("source", pa.string()),
            ("targets", pa.list_(pa.float64())), ("segments", numbers),
        ]  # fmt: skip
        self._schema = pa.schema(fields)
        self._writer = pa.ipc.new_file(str(file), self._schema)
        self._rows: list[Example] = []
        self._sizes = array("i")
        self._largest = -1
        self._sha = hashlib.sha256()
        self.largest = 0

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        self._writer.close()

    def __len__(self) -> int:
        return len(self._sizes) // 2

    @property
    def digest(self) -> str:
        return self._sha.hexdigest()

    def extend(self, examples: Iterable[Example]) -> None:
        """Add examples."""
        for example in examples:
            self._sha.update(as_bytes(example))
            top = max((*example.ids, *example.labels))
            if top > self._largest:
                self._largest, self.largest = top, len(self)
            self._sizes.extend((len(example.ids), len(example.labels)))
            self._rows.append(example)
            if len(self._rows) == ROWS:
                self._flush()

    def sizes(self) -> Any:
        """The numbers of ids and labels of each row, `[n, 2]`."""
        import numpy as np

        return np.array(self._sizes, dtype=np.int32).reshape(-1, 2)

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = [
                [row.ids for row in self._rows],
                [None if row.labels == row.ids else row.labels for row in self._rows],  # as texts have them
                [row.lengths for row in self._rows],
                [row.source for row in self._rows],
                [row.targets for row in self._rows],
                [row.segments for row in self._rows],
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._rows.clear()


class Stored(Sequence[Example]):
    """The examples of a file, or a stretch of them.

    Args:
        file: written by `Writer`.
        sizes: the numbers of ids and labels of each row of the file, `[n, 2]`.
        largest: the row with the largest id.
        digest: of all its examples.
        rows: those that belong to it; all without.
    """

    def __init__(self, file: Path, sizes: Any, largest: int, digest: str, rows: range | None = None) -> None:
        self._file, self._all, self._largest, self._digest = file, sizes, largest, digest
        self._rows = range(len(sizes)) if rows is None else rows
        self._reader: Any = None
        self._part: tuple[int, Any] = (-1, None)  # of the file, the most recently read

    @property
    def sizes(self) -> Any:
        """The numbers of ids and labels of each row, `[n, 2]`."""
        return self._all[self._rows.start : self._rows.stop]

    @property
    def digest(self) -> str:
        """Equal for equal examples."""
        return self._digest if len(self) == len(self._all) else f"{self._digest} {self._rows}"

    def largest(self) -> Example:
        """The example with the largest id of the file."""
        return self._read(self._largest)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Stored: ...
    def __getitem__(self, i: int | slice) -> Example | Stored:
        if isinstance(i, int):
            return self._read(self._rows[i])
        rows = self._rows[i]
        assert rows.step == 1
        return Stored(self._file, self._all, self._largest, self._digest, rows)

    def __iter__(self) -> Iterator[Example]:
        return map(self._read, self._rows)

    def _read(self, row: int) -> Example:
        import pyarrow as pa

        i, k = divmod(row, ROWS)
        part = self._part  # read once: another thread may read another part
        if part[0] != i:
            try:
                if self._reader is None:
                    self._reader = pa.ipc.open_file(pa.OSFile(str(self._file)))
                self._part = part = i, self._reader.get_batch(i)
            except (pa.ArrowException, OSError) as error:
                raise FormatError(f"{self._file}: cannot be read: {' '.join(str(error).split())}") from error
        ids, labels, lengths, source, targets, segments = (column[k].as_py() for column in part[1].columns)
        return Example(ids, ids if labels is None else labels, tuple(lengths), source, tuple(targets), tuple(segments))


def as_bytes(example: Example) -> bytes:
    """The numbers of an example."""
    whole = [example.ids, example.labels, example.lengths, *([example.segments] if example.segments else [])]
    made = b"".join(array("q", (len(numbers), *numbers)).tobytes() for numbers in whole)
    return made + array("d", example.targets).tobytes()


def sizes(examples: Sequence[Example]) -> Any:
    """The numbers of ids and labels of each example, as pairs."""
    found = getattr(examples, "sizes", None)
    return [(len(example.ids), len(example.labels)) for example in examples] if found is None else found


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the numbers of all examples, or what stands for it."""
    known: str | None = getattr(examples, "digest", None)
    if known is not None:
        return known
    sha = hashlib.sha256()
    for example in examples:
        sha.update(as_bytes(example))
    return sha.hexdigest()


def contents(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()

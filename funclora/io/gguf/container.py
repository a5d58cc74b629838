"""The GGUF container as bytes: metadata, and the position of each tensor.

Every length and count in a file is compared with the size of the file before it is used. The reader of the package
`gguf` does not check them: with an array that claims 2⁶⁰ entries it would never terminate, and its memory would grow.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from funclora.errors import FormatError, UnsupportedError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"
_MOST_DIMS = 4  # GGML_MAX_DIMS
_LONGEST_NAME = 64  # GGML_MAX_NAME, with the zero that ends it


@dataclass(frozen=True)
class Packed:
    """A tensor in a file.

    Attributes:
        name: its name.
        shape: its shape, the outermost dimension first.
        kind: the number of its type in ggml.
        offset: its position, relative to the first tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Container:
    """A file, open for reading.

    Attributes:
        fields: the metadata. Arrays of numbers are not read; their length is stored instead.
        tensors: the descriptions of the tensors.

    Raises:
        FormatError: the file is broken.
        UnsupportedError: it has the byte order of another kind of machine.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self.fields: dict[str, Any] = {}
            self.tensors: list[Packed] = []
            self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def data(self, tensor: Packed, nbytes: int) -> bytes:
        """The bytes of a tensor."""
        start = self._start + tensor.offset
        if start + nbytes > self._size:
            raise self._broken(f"{tensor.name!r} ends {start + nbytes - self._size} bytes after the end of the file")
        self._file.seek(start)
        return self._take(nbytes)

    def padded(self, nbytes: int) -> int:
        """Bytes up to the next possible position of a tensor."""
        return -(-nbytes // self._alignment) * self._alignment

    def _header(self) -> None:
        if self._take(4) != b"GGUF":
            raise self._broken("it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise UnsupportedError(f"{self._path}: the file is in the byte order of another kind of machine.")
            raise self._broken(f"expected version {' or '.join(map(str, _VERSIONS))}, got {version}")
        n_tensors, n_fields = self._count(24), self._count(13)  # its minimum number of bytes
        for _ in range(n_fields):
            key = self._text()
            if key in self.fields:
                raise self._broken(f"{key!r} appears twice")
            self.fields[key] = self._value(self._number("<I"))
        names = set()
        for _ in range(n_tensors):
            self.tensors.append(self._tensor())
            names.add(self.tensors[-1].name)
        if len(names) < n_tensors:
            raise self._broken("a name of a tensor appears twice")
        alignment = self.fields.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment.bit_count() != 1:
            raise self._broken(f"{_ALIGNMENT}: expected a power of two, got {alignment!r}")
        self._alignment: int = alignment
        self._start = self.padded(self._file.tell())

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._broken(f"there is no metadata type {kind}")
        inner = self._number("<I")
        if inner == _STRING:
            return [self._text() for _ in range(self._count(8))]
        if inner not in _SCALARS:  # llama.cpp does not support arrays in arrays either
            raise self._broken(f"there is no array type {inner}")
        size = struct.calcsize(_SCALARS[inner])
        count = self._count(size)
        self._file.seek(count * size, os.SEEK_CUR)
        return count

    def _tensor(self) -> Packed:
        name = self._text()
        if len(name.encode()) >= _LONGEST_NAME:
            raise self._broken(f"the name {name[:80]!r} of a tensor is longer than {_LONGEST_NAME - 1} bytes")
        dims = self._number("<I")
        if not 1 <= dims <= _MOST_DIMS:
            raise self._broken(f"{name!r} has {dims} dimensions, expected 1 to {_MOST_DIMS}")
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
        kind, offset = self._number("<I"), self._number("<Q")
        if not 1 <= math.prod(shape) < 2**63:
            raise self._broken(f"{name!r} has the invalid shape {list(shape)}")
        return Packed(name, shape, kind, offset)

    def _text(self) -> str:
        raw = self._take(self._count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._broken(f"a text is not UTF-8: {error}") from error

    def _count(self, size: int) -> int:
        """The number of following items of at least that size."""
        count: int = self._number("<Q")
        if count * size > self._size - self._file.tell():
            raise self._broken(f"it claims {count} entries, but is too short for them")
        return count

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, n: int) -> bytes:
        raw = self._file.read(n)
        if len(raw) < n:
            raise self._broken("it ends too early")
        return raw

    def _broken(self, why: str) -> FormatError:
        return FormatError(f"{self._path}: this is not a GGUF file, or it is broken or cut off: {why}.")

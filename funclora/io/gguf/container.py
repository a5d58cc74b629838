"""The GGUF container as bytes: metadata, and where each tensor lies.

Every length and count in a file is compared with what the file holds before it is used. The reader of the package
`gguf` believes them: an array that claims 2⁶⁰ entries keeps it busy, and its memory growing, for ever.
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
        offset: where it begins, from the first tensor on.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Container:
    """A file, open for reading.

    Attributes:
        fields: the metadata. An array of numbers is not read: it stands as how many there are.
        tensors: what the file says of its tensors.

    Raises:
        FormatError: the file is broken.
        UnsupportedError: it is written in the byte order of another kind of machine.
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
            raise self._broken(f"{tensor.name!r} ends {start + nbytes - self._size} bytes after the file")
        self._file.seek(start)
        return self._take(nbytes)

    def padded(self, nbytes: int) -> int:
        """Bytes up to where the next tensor may begin."""
        return -(-nbytes // self._alignment) * self._alignment

    def _header(self) -> None:
        if self._take(4) != b"GGUF":
            raise self._broken("it does not begin with 'GGUF'")
        version = self._number("<I")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise UnsupportedError(f"{self._path}: the file is in the byte order of another kind of machine.")
            raise self._broken(f"expected version {' or '.join(map(str, _VERSIONS))}, got {version}")
        n_tensors, n_fields = self._count(24), self._count(13)  # the bytes that one takes at least
        for _ in range(n_fields):
            key = self._text()
            if key in self.fields:
                raise self._broken(f"{key!r} is there twice")
            self.fields[key] = self._value(self._number("<I"))
        names = set()
        for _ in range(n_tensors):
            self.tensors.append(self._tensor())
            names.add(self.tensors[-1].name)
        if len(names) < n_tensors:
            raise self._broken("a name of a tensor is there twice")
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
            raise self._broken(f"there is no type of metadata with the number {kind}")
        inner = self._number("<I")
        if inner == _STRING:
            return [self._text() for _ in range(self._count(8))]
        if inner not in _SCALARS:  # llama.cpp knows no arrays in arrays either
            raise self._broken(f"there is no type of entries of an array with the number {inner}")
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
            raise self._broken(f"{name!r} has the shape {list(shape)}, which no tensor has")
        return Packed(name, shape, kind, offset)

    def _text(self) -> str:
        raw = self._take(self._count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self._broken(f"a text is not UTF-8: {error}") from error

    def _count(self, size: int) -> int:
        """How many things of at least that size follow."""
        count: int = self._number("<Q")
        if count * size > self._size - self._file.tell():
            raise self._broken(f"it says that {count} entries follow, for which it is too short")
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

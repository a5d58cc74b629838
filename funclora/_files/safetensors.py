"""safetensors files as bytes: where each tensor is, and a file whose tensors are written in any order.

The safetensors library returns tensors, or writes them all at once. To copy a checkpoint that does not fit into memory
requires the places of the tensors, and a header that is written before their values are known.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funclora._files.snapshot import ChangedError, OpenFile
from funclora.errors import FormatError, UnsupportedError

# The floating-point types of weights, by their name in a header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # without it transformers refuses a file

_LONGEST = 2**63 - 1  # the largest size in torch
_LONGEST_HEADER = 100_000_000  # as in the safetensors library
_MOST_DIMS = 64  # the limit of torch
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_CHUNK = 64 << 20  # bytes that the kernel is asked to copy at a time
_NO_KERNEL_COPY = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: the file.
        key: its key.
        dtype: the name of its dtype in the header.
        shape: its shape.
        start: the position of its first byte in the file.
        nbytes: its number of bytes.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def is_floating(self) -> bool:
        """Whether it is a weight of a floating-point type, not an index or a packed number."""
        return self.dtype in DTYPES

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype in torch.

        Raises:
            UnsupportedError: it is one that is only read with scales beside it, such as 8-bit floating point.
        """
        found = DTYPES.get(self.dtype) or _INTEGERS.get(self.dtype)
        if found is None:
            raise UnsupportedError(
                f"{self.file}: {self.key!r} has the dtype {self.dtype}, which is not read. Give the folder of a model "
                "in float32, bfloat16 or float16."
            )
        return found

    def read(self, descriptor: int, first: int = 0, length: int | None = None) -> Tensor:
        """A copy of some slices of the tensor along its first dimension.

        Args:
            descriptor: the file, open for reading.
            first: the first slice.
            length: the number of slices; by default all from `first` on.
        """
        n = self.shape[0] if self.shape else 1
        length = n - first if length is None else length
        size = self.nbytes // n if n else 0
        values = torch.empty((length, *self.shape[1:]) if self.shape else (), dtype=self.torch_dtype)
        fill(descriptor, values.reshape(-1).view(torch.uint8), self.start + first * size)
        return values

    def read_flat(self, descriptor: int, first: int, last: int) -> Tensor:
        """A copy of the elements from `first` to before `last`, in the order of the file, `[last - first]`."""
        values = torch.empty(last - first, dtype=self.torch_dtype)
        fill(descriptor, values.view(torch.uint8), self.start + first * values.element_size())
        return values


def _buffer(raw: Tensor) -> memoryview:
    """The memory of a tensor `[n]` of bytes."""
    array: Any = raw.numpy()
    return memoryview(array)


def fill(descriptor: int, raw: Tensor, at: int) -> None:
    """Read bytes of a file into a tensor `[n]` of bytes."""
    view, done = _buffer(raw), 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done:]], at + done)
        if not got:
            raise ChangedError(f"a file ended {len(view) - done} bytes early while it was read: it was cut meanwhile.")
        done += got


def spill(descriptor: int, tensor: Tensor, at: int) -> None:
    """Write the bytes of a contiguous tensor into a file."""
    view, done = _buffer(tensor.reshape(-1).view(torch.uint8)), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)


def copy_range(source: int, start: int, target: int, at: int, nbytes: int) -> None:
    """Copy bytes from one open file into another, inside the kernel if it supports this."""
    done = 0
    while done < nbytes:
        n = min(_CHUNK, nbytes - done)
        try:
            got = os.copy_file_range(source, target, n, start + done, at + done)
        except (AttributeError, OSError) as error:
            # Other systems have no such call, and some file systems refuse it.
            if isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY:
                raise
            raw = torch.empty(n, dtype=torch.uint8)
            fill(source, raw, start + done)
            spill(target, raw, at + done)
            got = n
        if not got:
            raise ChangedError(f"a file ended {nbytes - done} bytes early while it was copied: it was cut meanwhile.")
        done += got


def read_header(file: OpenFile) -> dict[str, Stored]:
    """The tensors of a file by key, in the order of their positions.

    Raises:
        FormatError: it is not a safetensors file, or it is cut off.
        OSError: it cannot be read.
    """
    try:
        begin, header = _header(file)
        return {key: _stored(file.path, key, begin, entry) for key, entry in header}
    except (ValueError, RecursionError) as error:
        file.check()
        said = " ".join(str(error).split())
        raise FormatError(f"{file.path}: this is not a safetensors file, or it is cut off: {said}") from error


def _header(file: OpenFile) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """The start of the first tensor, and the entries of all in order; `ValueError` if the format does not allow it."""
    size = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= size <= min(_LONGEST_HEADER, file.size - 8):
        raise ValueError(f"its header would have {size} bytes, and the file has {file.size}")
    header = json.loads(file.read(8, size).decode(), object_pairs_hook=_unique)
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else 0
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("its header is not a map of tensors")
    end = 0
    entries = sorted(header.items(), key=lambda item: _offsets(*item))
    for key, entry in entries:
        start, stop = _offsets(key, entry)
        bits = _BITS.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
        shape = entry.get("shape")
        if bits is None or not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(map(_is_count, shape)):
            raise ValueError(f"{key!r} has the dtype {entry.get('dtype')!r} and the shape {reprlib.repr(shape)}")
        if start != end or (stop - start) * 8 != bits * math.prod(shape):
            raise ValueError(f"{key!r} is located at {start} to {stop}, but its place or size should be different")
        end = stop
    if 8 + size + end != file.size:
        raise ValueError(f"its tensors end at {8 + size + end}, and the file has {file.size} bytes")
    return 8 + size, entries


def _stored(file: Path, key: str, begin: int, entry: dict[str, Any]) -> Stored:
    start, stop = entry["data_offsets"]
    return Stored(file, key, entry["dtype"], tuple(entry["shape"]), begin + start, stop - start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header has a key twice")
    for key in found:
        key.encode()  # or this raises: half a surrogate pair
    return found


def _offsets(key: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{key!r} has no place")
    return offsets[0], offsets[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LONGEST


@dataclass(frozen=True)
class Draft:
    """The bytes of a file that is to be written.

    Attributes:
        head: the bytes before the tensors.
        places: key -> tensor in it.
        size: the total number of bytes.
    """

    head: bytes
    places: Mapping[str, Stored]
    size: int


def draft(file: Path, tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> Draft:
    """The place of each tensor in a new file.

    Args:
        file: the file.
        tensors: key, name of the dtype, shape and number of bytes of each, in the order to write. Wider types
            always come first, so that every tensor is aligned for its type.
    """
    header: dict[str, object] = {"__metadata__": METADATA}
    begin, begins = 0, {}
    for key, dtype, shape, nbytes in sorted(tensors, key=lambda t: -_width(t)):
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begins[key] = begin
        begin += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    places = {
        key: Stored(file, key, dtype, shape, len(head) + begins[key], nbytes) for key, dtype, shape, nbytes in tensors
    }
    return Draft(head, places, len(head) + begin)


def _width(tensor: tuple[str, str, tuple[int, ...], int]) -> float:
    _, _, shape, nbytes = tensor
    return nbytes / max(1, math.prod(shape))


def certainly_within(values: Tensor, limit: float) -> bool:
    """True if all values are certainly within ±limit, because their norm is.

    This takes a tenth of the time of `isfinite`. False may also mean that the norm is larger than every value, or
    overflows. NaN and infinity always give False.

    Examples:
        >>> import torch
        >>> certainly_within(torch.ones(4), 10.0), certainly_within(torch.tensor([1.0, torch.nan]), 10.0)
        (True, False)
    """
    flat = values.reshape(-1)
    return bool(flat.dot(flat) < limit * limit)

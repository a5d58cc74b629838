"""safetensors files as bytes: where each tensor lies, and a file whose tensors are written in any order.

The library of that name hands out tensors, or writes them all at once. Copying a checkpoint that does not fit into
memory takes the places of the tensors, and a header that is written before they are known.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from funclora.errors import FormatError

# The floating-point types that weights are computed with, by their name in a header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = {"format": "pt"}  # without it transformers refuses a file

_LONGEST = 2**63 - 1  # that torch counts to
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
        start: where its first byte lies in the file.
        nbytes: how many bytes it has.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def is_floating(self) -> bool:
        """It is a weight that can be computed with, not an index or a packed number."""
        return self.dtype in DTYPES

    def read(self, descriptor: int, first: int = 0, length: int | None = None) -> Tensor:
        """Some slices of the tensor along its first dimension, in memory of their own.

        Args:
            descriptor: the file, open for reading.
            first: the first slice.
            length: how many; else all from there on.
        """
        n = self.shape[0] if self.shape else 1
        length = n - first if length is None else length
        size = self.nbytes // n if n else 0
        raw = torch.empty(length * size, dtype=torch.uint8)
        fill(descriptor, raw, self.start + first * size)
        return raw.view(DTYPES[self.dtype]).reshape((length, *self.shape[1:]) if self.shape else ())


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
            raise FormatError(f"a file ended {len(view) - done} bytes early while it was read: it was cut meanwhile.")
        done += got


def spill(descriptor: int, tensor: Tensor, at: int) -> None:
    """Write the bytes of a contiguous tensor into a file."""
    view, done = _buffer(tensor.reshape(-1).view(torch.uint8)), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)


def copy_range(source: int, start: int, target: int, at: int, nbytes: int) -> None:
    """Copy bytes from one open file into another, inside the kernel where it can."""
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
            raise FormatError(f"a file ended {nbytes - done} bytes early while it was copied: it was cut meanwhile.")
        done += got


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a file by key, in the order in which they lie there.

    Raises:
        FormatError: it is not a safetensors file, or it is cut off.
        OSError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:  # which says why, where safe_open says that there is no such file
            with safe_open(file, framework="pt"):  # the header is sound, and the file as long as it says
                pass
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{file}: this is not a safetensors file, or it is cut off: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if max(entry["shape"], default=0) > _LONGEST:
            raise FormatError(f"{file}: {key!r} has the shape {entry['shape']}, which no tensor has.")
        tensors[key] = Stored(file, key, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin)
    return tensors


@dataclass(frozen=True)
class Draft:
    """The bytes of a file that is to be written.

    Attributes:
        head: what stands before the tensors.
        places: key -> tensor in it.
        size: bytes in all.
    """

    head: bytes
    places: Mapping[str, Stored]
    size: int


def draft(file: Path, tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> Draft:
    """Where each tensor of a new file goes.

    Args:
        file: the file.
        tensors: key, name of the dtype, shape and number of bytes of each, in the order that is wanted. Wider types
            come first whatever the order, so that every tensor lies where its type may begin.
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
    """True if it is certain that all values lie within ±limit: their norm does, at a tenth of `isfinite`'s price.

    False may also mean that the norm is larger than every value, or overflows. NaN and infinity always give False.

    Examples:
        >>> import torch
        >>> certainly_within(torch.ones(4), 10.0), certainly_within(torch.tensor([1.0, torch.nan]), 10.0)
        (True, False)
    """
    flat = values.reshape(-1)
    return bool(flat.dot(flat) < limit * limit)

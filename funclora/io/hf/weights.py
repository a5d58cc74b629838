"""The weights of a checkpoint by their names in the model."""

from __future__ import annotations

import bisect
import math
from typing import Any

import torch
from torch import Tensor

from funclora.errors import FormatError, UnsupportedError, near
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.hf.structure import Part, Shape, Structure


class Weights:
    """The parameters and buffers of a model, read one at a time.

    Attributes:
        parts: full name -> its parts in the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, structure: Structure) -> None:
        self._checkpoint, self._structure = checkpoint, structure
        self.parts, self._opaque = structure.places(checkpoint.shapes)
        self._tied = {name: group for group in structure.ties for name in group}

    def parts_of(self, name: str) -> list[Part]:
        """The parts of a parameter; if it has none, of a parameter that it is tied to.

        Raises:
            FormatError: the checkpoint does not contain it.
            UnsupportedError: it is stored in an unknown way.
        """
        for other in (name, *self._tied.get(name, ())):
            if other in self.parts:
                return self.parts[other]
        if name in self._opaque:
            raise UnsupportedError(
                f"{self._checkpoint.folder}: {name!r} is needed, but {self._opaque[name]}, which cannot be done in "
                "parts. Load the model with transformers, save it with save_original_format=False, and use that folder."
            )
        raise FormatError(
            f"{self._checkpoint.folder}: the checkpoint does not contain {name!r}, which the model needs."
            f"{near(name, self.parts, n=3)}"
        )

    def read_flat(self, name: str, first: int, last: int) -> Tensor:
        """The elements from `first` to before `last` of a parameter or buffer, `[last - first]`.

        Only these are read, from as many tensors of the checkpoint as they are in.
        """
        shape, found = self._structure.shapes[name], None
        for part in self.parts_of(name):
            begin, values = self._flat(part, shape, first, last)
            if isinstance(begin, int) and len(values) == last - first:
                return values
            found = values.new_empty(last - first) if found is None else found
            if isinstance(begin, int):
                found[begin - first :][: len(values)] = values.to(found.dtype)
            else:
                found[begin - first] = values.to(found.dtype)
        return torch.empty(0) if found is None else found

    def _flat(self, part: Part, shape: Shape, first: int, last: int) -> tuple[int | Tensor, Tensor]:
        """What a part has of a range of its parameter's elements: where they are in the parameter, and the values.

        Both are in the order of memory, so a range of the parameter is a range of the part.
        """
        starts, lengths = [0] * len(shape), list(shape)
        for dim, start, length in part.cuts:
            starts[dim], lengths[dim] = start, length

        def place(index: Any) -> Any:
            """Where an element of the part is in the parameter; for a tensor of elements, of each."""
            at, stride = 0, 1
            for start, length, size in reversed(list(zip(starts, lengths, shape, strict=True))):
                at, index = at + (index % length + start) * stride, index // length
                stride *= size
            return at

        n = math.prod(lengths)
        begin, end = (bisect.bisect_left(range(n), edge, key=place) for edge in (first, last))
        stored = self._checkpoint.tensors[part.key]
        offset = part.first * math.prod(stored.shape[1:])
        values = stored.read_flat(self._checkpoint.descriptor(stored.file), offset + begin, offset + end)
        if begin == end or place(end - 1) - place(begin) == end - 1 - begin:
            return (place(begin) if begin < end else first), values
        return place(torch.arange(begin, end)), values

    def read(self, name: str) -> Tensor:
        """A copy of a parameter or buffer as in the model; on the meta device if it contains integers."""
        shape = self._structure.shapes[name]
        parts = self.parts_of(name)
        if not all(self._checkpoint.tensors[part.key].is_floating for part in parts):
            return torch.empty(shape, dtype=torch.int64, device="meta")
        whole: Tensor | None = None
        for part in parts:
            piece = self._checkpoint.read(part.key, part.first, part.shape[0] if part.shape else 1)
            if not part.cuts:
                return piece.reshape(shape)
            whole = torch.empty(shape, dtype=piece.dtype) if whole is None else whole
            place = whole
            for cut in part.cuts:
                place = place.narrow(*cut)
            place.copy_(piece.reshape(place.shape))
        assert whole is not None
        return whole

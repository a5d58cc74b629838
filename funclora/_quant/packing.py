"""How weights of few bits are stored: bitsandbytes packs and unpacks them, on every device that it supports.

A packing turns a dense weight into *parts*, a few tensors, and back. It is static: everything that differs between
weights is in the parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora.errors import ConfigError, NonFiniteError, UnsupportedError

Parts = tuple[Tensor, ...]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def library() -> Any:
    """bitsandbytes, imported when it is first needed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnsupportedError(
            "quantised weights are packed and unpacked by bitsandbytes, which cannot be imported "
            f"({error}). Install it: pip install 'funclora[quant]'."
        ) from error
    return bitsandbytes


class Packing(ABC):
    """A way to store a weight."""

    @property
    def is_exact(self) -> bool:
        """Whether unpacking gives the very weight that was packed, not a rounded one."""
        return False

    @abstractmethod
    def pack(self, weight: Tensor) -> Parts:
        """The parts of a dense weight in float32, float16 or bfloat16, stored row by row; the packed values first."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight, in one of the dtypes that `pack` takes."""

    @abstractmethod
    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Rows `[*ids, *]` of the dense weight without the others; None if rows are not stored separately."""

    def narrowed(self, parts: Parts, shape: torch.Size, start: int, length: int) -> tuple[Packing, Parts] | None:
        """How the slice `[start : start + length]` is stored; None if it cannot be unpacked without the rest."""
        return None

    def unit(self, shape: torch.Size) -> int:
        """The number of values, in the order of memory, that can be packed without the others."""
        raise NotImplementedError

    def lengths(self, parts: Parts) -> tuple[int | None, ...]:
        """For each part, how many of its slices along the first dimension a unit has; None if units share it."""
        raise NotImplementedError

    def linear(self, x: Tensor, parts: Parts, shape: torch.Size) -> Tensor:
        """`x·Wᵀ` for a matrix W, without derivatives."""
        return F.linear(x, self.unpack(parts, shape, x.dtype))


@dataclass(frozen=True)
class FourBit(Packing):
    """Blocks of 4-bit values, each block with its largest magnitude (Dettmers et al., QLoRA, arXiv 2305.14314).

    The parts are the packed values, the blocks' magnitudes and the list of the 16 values. With double quantisation the
    magnitudes are 8-bit values too, and their mean, the magnitudes of their own blocks and the list of their values
    follow.

    Attributes:
        kind: "nf4" (quantiles of the normal distribution) or "fp4".
        blocksize: the number of values that share a magnitude.
        nested: double quantisation.
    """

    kind: Literal["nf4", "fp4"]
    blocksize: int = 64
    nested: bool = False

    def __post_init__(self) -> None:
        if self.blocksize not in BLOCK_SIZES:
            raise ConfigError(f"quantize: blocksize: expected one of {BLOCK_SIZES}, got {self.blocksize!r}.")

    def pack(self, weight: Tensor) -> Parts:
        packed, state = library().functional.quantize_4bit(
            weight.contiguous(), blocksize=self.blocksize, compress_statistics=self.nested, quant_type=self.kind
        )
        return self.parts(packed, state)

    def with_nested(self, parts: Parts) -> Parts:
        """The parts of double quantisation, from those without it."""
        packed, magnitudes, code = parts
        offset = magnitudes.mean()
        values, state = library().functional.quantize_blockwise(magnitudes - offset, blocksize=256)
        return packed, values, code, offset, state.absmax, state.code

    def unit(self, shape: torch.Size) -> int:
        return self.blocksize

    def lengths(self, parts: Parts) -> tuple[int | None, ...]:
        return self.blocksize // 2 // parts[0].element_size(), 1, *(None for _ in parts[2:])

    @staticmethod
    def parts(packed: Tensor, state: Any) -> Parts:
        """The parts of a weight that bitsandbytes packed."""
        nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
        return packed, state.absmax, state.code, *nested

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        dense: Tensor = library().functional.dequantize_4bit(parts[0], self._state(parts, shape, dtype))
        return dense.reshape(shape)  # tiny and one-dimensional weights come in another shape

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        n, width = shape[0], shape[1:].numel()
        if width % self.blocksize:
            return None  # a block crosses the end of a row
        some = F.embedding(ids, parts[0].view(torch.uint8).view(n, width // 2))
        scales = F.embedding(ids, self._magnitudes(parts, shape).view(n, width // self.blocksize))
        found = (some.view(-1, 1), scales.flatten(), parts[2])
        return self.plain().unpack(found, torch.Size((*ids.shape, *shape[1:])), dtype)

    def narrowed(self, parts: Parts, shape: torch.Size, start: int, length: int) -> tuple[Packing, Parts] | None:
        width = shape[1:].numel()
        begin, end = start * width, (start + length) * width
        if begin % self.blocksize or end % self.blocksize:
            return None  # a block crosses the edge of the slice
        some = parts[0].view(torch.uint8).view(-1, 1)[begin // 2 : end // 2]
        magnitudes = self._magnitudes(parts, shape)[begin // self.blocksize : end // self.blocksize]
        return self.plain(), (some, magnitudes, parts[2])

    def _magnitudes(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The blocks' magnitudes, `[blocks]`."""
        if not self.nested:
            return parts[1]
        state = self._state(parts, shape, torch.float32)
        magnitudes: Tensor = library().functional.dequantize_blockwise(parts[1], state.state2) + state.offset
        return magnitudes

    def plain(self) -> FourBit:
        """The packing without double quantisation."""
        return FourBit(self.kind, self.blocksize)

    def linear(self, x: Tensor, parts: Parts, shape: torch.Size) -> Tensor:
        y: Tensor = library().matmul_4bit(x, parts[0], self._state(parts, shape, x.dtype))
        return y

    def _state(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Any:
        """The state of a packed weight in bitsandbytes (`QuantState`)."""
        kind = library().functional.QuantState
        _, absmax, code, *nested = parts
        offset = state2 = None
        if nested:
            offset = nested[0]
            state2 = kind(nested[1], blocksize=256, code=nested[2], dtype=torch.float32)
        return kind(absmax, shape, code, self.blocksize, self.kind, dtype, offset, state2)


@dataclass(frozen=True)
class Repacked(Packing):
    """4-bit values that bitsandbytes has reordered for this CPU's instructions, with magnitudes rounded to bfloat16.

    A `Linear4bit` reorders its own weight in its first forward pass in evaluation mode. Shape, dtype and device of the
    weight stay the same; reading its values raises `UnsupportedError`.

    Attributes:
        name: the weight's full name, for the error.
    """

    name: str

    def refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"{self.name!r} was repacked by a forward pass in evaluation mode, for this CPU's instructions, with a "
            "loss of precision. Load the model again and take base_params before the model itself is run."
        )

    def pack(self, weight: Tensor) -> Parts:
        self.refuse()

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.refuse()

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        self.refuse()

    def unit(self, shape: torch.Size) -> int:
        self.refuse()


@dataclass(frozen=True)
class Int8(Packing):
    """8-bit values, each row of the matrix with its largest magnitude (Dettmers et al., LLM.int8(), arXiv 2208.07339).

    The parts are the values, `[rows, columns]`, and the magnitudes, `[rows]`. Inputs are not quantised.
    """

    def pack(self, weight: Tensor) -> Parts:
        self.unit(weight.shape)
        half = weight.to(torch.float16)
        if not torch.isfinite(half).all():
            raise NonFiniteError(
                "quantize: int8 is packed from float16, in which a weight overflows. Use 'nf4' or 'fp4'."
            )
        values, scales, _ = library().functional.int8_vectorwise_quant(half)
        return values, scales

    def unit(self, shape: torch.Size) -> int:
        if len(shape) != 2:
            raise UnsupportedError(
                f"quantize: int8 holds one scale for each row of a matrix, got a weight of shape {list(shape)}. "
                "Use 'nf4' or 'fp4', which pack any shape, or leave it out."
            )
        return shape[1]

    def lengths(self, parts: Parts) -> tuple[int | None, ...]:
        return 1, 1

    def unpack(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        dense: Tensor = library().functional.int8_vectorwise_dequant(*parts)
        return dense.reshape(shape).to(dtype)

    def rows(self, parts: Parts, shape: torch.Size, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        values, scales = parts
        some = F.embedding(ids, values), F.embedding(ids, scales.unsqueeze(1)).flatten()
        found = (some[0].flatten(0, -2), some[1])
        return self.unpack(cast(Parts, found), torch.Size((*ids.shape, *shape[1:])), dtype)

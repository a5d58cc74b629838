"""The GGUF container of an adapter: its metadata, and its tensors by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from funclora._files.atomic import replace_files
from funclora.errors import FormatError, UnsupportedError
from funclora.io.gguf.container import Container

GGUF_DTYPES = (torch.float32, torch.float16)
# The types that are views of their bytes; the others are converted.
_VIEWS = {"F32": np.float32, "F16": np.float16}


def package() -> ModuleType:
    """The `gguf` package.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UnsupportedError("GGUF files need the package gguf. Type: pip install 'funclora[gguf]'") from error
    return gguf  # type: ignore[no-any-return]


@dataclass(frozen=True)
class AdapterFile:
    """The contents of a file.

    Attributes:
        arch: the architecture, as named by llama.cpp.
        alpha: `adapter.lora.alpha`: llama.cpp scales each update by alpha/r, or by 1 if alpha is 0.
        tensors: name -> tensor, in float32.
    """

    arch: str
    alpha: float
    tensors: dict[str, Tensor]


def write_adapter(path: Path, arch: str, alpha: float, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a file, or replace it atomically.

    Args:
        path: the file; its folder is made if it does not exist.
        arch: the architecture.
        alpha: a number that float32 can represent.
        tensors: name -> tensor of that dtype, on the CPU.
        dtype: of the tensors.

    Raises:
        OSError: the file cannot be written. An existing file is then unchanged.
    """
    gguf = package()

    def write(draft: Path) -> None:
        writer = gguf.GGUFWriter(draft, arch)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            file_type = "ALL_F32" if dtype == torch.float32 else "MOSTLY_F16"
            writer.add_file_type(gguf.LlamaFileType[file_type])
            for name, tensor in tensors.items():
                writer.add_tensor(name, tensor.contiguous().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    replace_files(path.parent, {path.name: write})


def read_adapter(path: Path) -> AdapterFile:
    """Read a LoRA adapter in llama.cpp's format.

    Raises:
        FormatError: the file is missing or broken, or is not such an adapter.
        UnsupportedError: it is an adapter of another kind.
    """
    gguf = package()
    if not path.is_file():
        raise FormatError(f"{path}: there is no such file.")
    with Container(path) as container:
        tensors = dict(_unpacked(path, container, gguf))
        fields = container.fields
    keys, wanted = gguf.Keys, {gguf.Keys.General.TYPE: "adapter", gguf.Keys.Adapter.TYPE: "lora"}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise FormatError(
                f"{path}: {key}: expected {value!r}, got {fields.get(key)!r}. This is not a LoRA adapter."
            )
    if fields.get(keys.Adapter.ALORA_INVOCATION_TOKENS):
        raise UnsupportedError(f"{path}: {keys.Adapter.ALORA_INVOCATION_TOKENS} is set; aLoRA is not supported.")
    arch, alpha = fields.get(keys.General.ARCHITECTURE), fields.get(keys.Adapter.LORA_ALPHA, 0.0)
    if not isinstance(arch, str) or not isinstance(alpha, float):
        raise FormatError(
            f"{path}: expected {keys.General.ARCHITECTURE} to be a string and {keys.Adapter.LORA_ALPHA} a float, got "
            f"{arch!r} and {alpha!r}."
        )
    return AdapterFile(arch, alpha, tensors)


def _unpacked(path: Path, container: Container, gguf: ModuleType) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each tensor.

    They must follow each other without gaps, as llama.cpp requires, so a file cannot claim more than its bytes.
    """
    end = 0
    for tensor in container.tensors:
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
        except ValueError as error:
            why = f"{path}: {tensor.name!r} has the unknown type {tensor.kind}."
            raise UnsupportedError(why) from error
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block:
            raise FormatError(
                f"{path}: {tensor.name!r} has rows of {tensor.shape[-1]} numbers, expected a multiple of {block} for "
                f"{kind.name}."
            )
        nbytes = math.prod(tensor.shape) // block * size
        if tensor.offset != end:
            raise FormatError(f"{path}: {tensor.name!r} begins at {tensor.offset}, expected {end}: they have no gaps.")
        end = container.padded(end + nbytes)
        raw = np.frombuffer(container.data(tensor, nbytes), np.uint8).reshape(*tensor.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):  # the caller checks for infinity
                values = gguf.quants.dequantize(raw.view(_VIEWS.get(kind.name, np.uint8)), kind)
        except NotImplementedError as error:
            raise UnsupportedError(f"{path}: {tensor.name!r} is stored as {kind.name}: {error}") from error
        yield tensor.name, torch.from_numpy(values.astype(np.float32, copy=True))

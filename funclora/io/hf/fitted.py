"""The folder of a base model as its adapters know it: with the head that they were trained with, and as many tokens.

A classifier is trained on the folder of a language model, to which transformers adds a head; and a model whose
vocabulary has grown is often in no folder, but its embeddings are beside the adapter. What the base lacks is in the
adapter then, as a new value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funclora._config.peft_fields import HEADS
from funclora._files.safetensors import DTYPES, Stored
from funclora.errors import FormatError
from funclora.io.hf.checkpoint import Checkpoint
from funclora.io.hf.heads import with_head
from funclora.io.hf.structure import Structure
from funclora.io.peft.conversions import Conversions
from funclora.io.peft.embeddings import of_embeddings
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.keys import PREFIX
from funclora.io.peft.tensors import StoredTensors


@dataclass(frozen=True)
class _Longer(Stored):
    """A tensor with fewer rows in its file, or with none; the missing ones are zeros."""

    rows: int = 0

    def read(self, descriptor: int, first: int = 0, length: int | None = None) -> Tensor:
        length = (self.shape[0] if self.shape else 1) - first if length is None else length
        values = torch.zeros((length, *self.shape[1:]) if self.shape else (), dtype=DTYPES[self.dtype])
        have = min(length, self.rows - first)
        if have > 0:
            shorter = Stored(self.file, self.key, self.dtype, (self.rows, *self.shape[1:]), self.start, self.nbytes)
            shorter = replace(shorter, nbytes=self.nbytes // self.shape[0] * self.rows)
            values[:have] = shorter.read(descriptor, first, have)
        return values


class FittedCheckpoint(Checkpoint):
    """A base model's folder, open for reading, as some adapters need it.

    Args:
        folder: the folder.
        adapters: PEFT folders.

    Attributes:
        structure: the model without weights.
        stored_config: the contents of `config.json`; those of `config` are what the adapters need.
        is_fitted: whether something is other than in the folder.
        new: parameters with rows that the folder does not have, which an adapter must replace.
        left_out: tensors of the folder that this class of model does not have.

    Raises:
        ConfigError: the adapters were trained for different tasks.
        FormatError: a folder is broken.
        UnsupportedError: transformers has no class of this model for the task.
    """

    def __init__(self, folder: Path, adapters: Iterable[Path] = ()) -> None:
        super().__init__(folder)
        try:
            self._fit([AdapterFiles(adapter) for adapter in adapters])
        except BaseException:
            self.close()
            raise

    def _fit(self, adapters: Sequence[AdapterFiles]) -> None:
        self.stored_config = before = self.config
        self.new: list[str] = []
        self.left_out: list[str] = []
        self.config = with_head(self.folder, before, adapters)
        self.structure = Structure(self.folder, self.config, self.shapes)
        rows = _rows(self.structure.model, self.structure.shapes, adapters)
        if rows:
            self.config = _with_vocabulary(self.config, rows)
            self.structure = Structure(self.folder, self.config, self.shapes)
        self.is_fitted = self.config != before
        if self.is_fitted:
            self._extend(other_class=self.config.get("architectures") != before.get("architectures"))

    def _extend(self, *, other_class: bool) -> None:
        model, shapes = self.structure.model, self.structure.shapes
        found = Conversions(model, shapes, self.tensors)
        if not found.plain and not found.joined:
            raise FormatError(
                f"{self.folder}: an adapter was trained on a {self.structure.name}, which has other names for its "
                f"layers ({min(shapes)!r}): everything would be random. Give the folder of the model that the adapter "
                "was trained on."
            )
        for key, name in found.plain.items():
            stored, shape = self.tensors[key], shapes[name]
            if stored.shape != shape and (name in of_embeddings(model) or _is_of_head(name)):
                kept = stored.shape[0] if stored.shape[1:] == shape[1:] and stored.shape[0] < shape[0] else 0
                self.tensors[key] = _longer(stored, key, shape, kept)
                self.new.append(name)
        placed = {*found.plain.values(), *found.joined}
        placed |= {name for group in self.structure.ties if placed & {*group} for name in group}
        if other_class:
            if not placed:
                raise FormatError(
                    f"{self.folder}: a {self.structure.name}, which the adapter was trained on, has no weight of this "
                    "folder. Give the folder of the model that it was trained on."
                )
            self.left_out = [key for key in self.tensors if key not in found.plain and not _used(key, found)]
            for key in self.left_out:
                del self.tensors[key]
            for name, parameter in model.named_parameters():
                if name not in placed:
                    alike = next(tensor for tensor in reversed(self.tensors.values()) if tensor.is_floating)
                    self.tensors[name] = _longer(alike, name, tuple(parameter.shape), 0)
                    self.new.append(name)

    def refuse_random(self, replaced: Iterable[str]) -> None:
        """Raise `FormatError` if the adapters do not replace everything that the folder does not have.

        Args:
            replaced: the parameters that they replace.
        """
        have = {*replaced}
        for name in self.new:
            if name not in have:
                raise FormatError(
                    f"{self.folder}: {self.structure.name} needs {name!r}, which neither this folder nor an adapter "
                    "contains, so it would be random. Save it with the adapter (modules_to_save), or give the folder "
                    "of the model that the adapter was trained on."
                )


def _used(key: str, found: Conversions) -> bool:
    return any(key in keys for _, sources in found.joined.values() for keys in sources.values())


def _longer(stored: Stored, key: str, shape: tuple[int, ...], rows: int) -> Stored:
    size = math.prod(shape) * DTYPES[stored.dtype].itemsize
    return _Longer(stored.file, key, stored.dtype, shape, stored.start, size, rows)


def _is_of_head(name: str) -> bool:
    return bool({end for ends in HEADS.values() for end in ends} & {*name.split(".")})


def _rows(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], adapters: Sequence[AdapterFiles]) -> int:
    """The most tokens for which an adapter has embeddings, if they are more than the model's; otherwise 0."""
    names = [name for name in of_embeddings(model) if name.endswith(".weight")]
    found = 0
    for files in adapters:
        stored = StoredTensors(files, components={part for name in shapes for part in name.split(".")}).shapes()
        for name in names:
            for key in (f"{PREFIX}{name}", f"{PREFIX}{name.removesuffix('weight')}base_layer.weight"):
                shape = stored.get(key, ())
                if shape[1:] == shapes[name][1:] and shape and shape[0] > shapes[name][0]:
                    found = max(found, shape[0])
    return found


def _with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A configuration with this number of tokens."""
    changed = dict(config)
    for name, value in config.items():
        if isinstance(value, dict) and "vocab_size" in value and name.startswith(("text", "decoder", "thinker")):
            changed[name] = {**value, "vocab_size": rows}
    return changed | {"vocab_size": rows} if "vocab_size" in config or changed == config else changed

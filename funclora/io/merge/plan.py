"""The plan of a merge: every tensor of every file, decided before anything is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from funclora._files.safetensors import DTYPES, NAMES, Draft, draft
from funclora.errors import ConfigError, UnsupportedError
from funclora.io.hf.checkpoint import INDEX_FILE, SINGLE_FILE, untied, with_dtype
from funclora.io.hf.fitted import FittedCheckpoint
from funclora.io.hf.structure import Part
from funclora.io.hf.weights import Weights
from funclora.io.merge.adapters import LazyMapping, WeightedAdapters
from funclora.rules.dense import Full


@dataclass(frozen=True)
class Written:
    """A tensor of the result.

    Attributes:
        key: its key.
        source: key of the tensor of the base that it is made from.
        dtype: the name of its dtype.
        nbytes: its size in bytes.
        parts: the parts of rewritten parameters in it; empty if it is only copied.
    """

    key: str
    source: str
    dtype: str
    nbytes: int
    parts: list[Part] = field(default_factory=list)


class MergePlan:
    """Everything that is decided before a merge writes anything.

    Attributes:
        base: the checkpoint.
        structure: the model without weights.
        adapters: the merged adapters.
        config: the contents of the new `config.json`.
        tensors: key -> tensor of the result, file after file.
        holders: full name of a rewritten parameter -> the tensors and parts that contain it. A parameter that stays
            tied to another one is listed under the other's name.
        files: name of a file -> keys of the tensors in it.
        untied: parameters that are tied to another one in the base and get their own value.
    """

    def __init__(
        self,
        base: FittedCheckpoint,
        adapter_dirs: Sequence[Path],
        weights: Sequence[float] | None,
        dtype: torch.dtype | None,
        max_shard_size: int | str | None,
    ) -> None:
        self.base = base
        self.structure = base.structure
        self._weights = Weights(base, self.structure)
        self._parts = self._weights.parts
        values = LazyMapping([*self.structure.shapes], self._weights.read)
        self.adapters = WeightedAdapters(adapter_dirs, weights, self.structure.model, values)
        self.adapters.check()
        base.refuse_random(self.adapters.full)
        self.config, self.untied, names = self._untie()
        if dtype is not None:
            if dtype not in NAMES:
                raise ConfigError(f"dtype: expected one of {', '.join(map(str, NAMES))}, got {dtype}.")
            self.config = with_dtype(self.config, str(dtype).removeprefix("torch."))
        self._dtype = None if dtype is None else NAMES[dtype]
        self.tensors = self._tensors(names)
        self.holders: dict[str, list[tuple[Written, Part]]] = {}
        for written in self.tensors.values():
            for part in written.parts:
                self.holders.setdefault(part.parameter, []).append((written, part))
        self.files = self._files(None if max_shard_size is None else parse_size(max_shard_size))

    # Ties.

    def _untie(self) -> tuple[dict[str, Any], list[str], dict[str, str]]:
        """The new configuration, the parameters that it unties, and name -> name of the tied parameter in the file.

        Raises:
            UnsupportedError: an adapter changes only one of two tied weights, which this class of model cannot untie.
        """
        rewritten = set(self.adapters.names)
        broken = [group for group in self.structure.ties if rewritten & {*group} and not self._stays_tied(group)]
        if not broken:
            return dict(self.base.config), [], {}
        config = untied(self.base.config)
        names = ", ".join(map(repr, sorted(rewritten & {name for group in broken for name in group})))
        try:
            after = self.structure.untied(config)
        except UnsupportedError as error:
            raise UnsupportedError(f"the adapter rewrites {names}, which is tied to others, but {error}") from error
        for group in after.ties:
            if rewritten & {*group} and not self._stays_tied(group):
                raise UnsupportedError(
                    f"the adapter rewrites {names}, and {self.structure.name} ties {', '.join(map(repr, group))} "
                    "regardless of its configuration, so they cannot have different values."
                )
        still = {name: group for group in after.ties for name in group}
        apart = {}
        for group in self.structure.ties:
            stored = self._weights.parts_of(group[0])[0].parameter
            for name in group:
                if name not in self._parts and not any(other in self._parts for other in still.get(name, ())):
                    apart[name] = stored
        return config, sorted(apart), apart

    def _stays_tied(self, group: Sequence[str]) -> bool:
        """True if every name of the group gets the same new value."""
        rewritten = set(self.adapters.names)
        if rewritten.issuperset(group) and len({self.adapters.follows(name) or name for name in group}) == 1:
            return True
        if not self.adapters.full.issuperset(group):
            return False
        values = []
        for name in group:
            (rule,) = self.adapters.rules(name)
            assert isinstance(rule, Full)
            values.append(rule.value)
        return all(torch.equal(values[0], value) for value in values[1:])

    # Tensors and files.

    def _tensors(self, apart: Mapping[str, str]) -> dict[str, Written]:
        tensors = {key: self._written(key, key) for key in self.base.tensors}
        for name, stored in apart.items():
            parts = self._parts[stored]
            if len(parts) != 1 or parts[0].cuts or parts[0].shape != self.base.tensors[parts[0].key].shape:
                raise UnsupportedError(
                    f"{name!r} is tied to {stored!r}, which is not a single tensor of the checkpoint."
                )
            tensors[name] = self._written(name, parts[0].key)
        for name in self.adapters.names:
            if name in apart:
                (part,) = self._parts[apart[name]]
                tensors[name].parts.append(Part(name, part.key, 0, part.shape))
                continue
            for part in self._weights.parts_of(name):
                if part.parameter != name:
                    continue  # it stays tied to that parameter, which gets the value
                if not self.base.tensors[part.key].is_floating:
                    raise UnsupportedError(
                        f"{name!r} is stored as {self.base.tensors[part.key].dtype}; only floating-point weights of 16 "
                        "bits and more can be merged."
                    )
                tensors[part.key].parts.append(part)
        return tensors

    def _written(self, key: str, source: str) -> Written:
        stored = self.base.tensors[source]
        if self._dtype is None or not stored.is_floating:
            return Written(key, source, stored.dtype, stored.nbytes)
        size = torch.empty((), dtype=DTYPES[self._dtype]).element_size()
        return Written(key, source, self._dtype, size * math.prod(stored.shape))

    def _files(self, limit: int | None) -> dict[str, list[str]]:
        """The files of the base, with new tensors next to their sources, or files up to a size."""
        if limit is None:
            files: dict[str, list[str]] = {file.name: [] for file in self.base.files}
            for key, written in self.tensors.items():
                files[self.base.tensors[written.source].file.name].append(key)
            return {name: keys for name, keys in files.items() if keys}
        groups: list[list[str]] = [[]]
        room = limit
        for key, written in self.tensors.items():
            if groups[-1] and written.nbytes > room:
                groups.append([])
                room = limit
            groups[-1].append(key)
            room -= written.nbytes
        if len(groups) == 1:
            return {SINGLE_FILE: groups[0]}
        n = len(groups)
        return {f"model-{i:05d}-of-{n:05d}.safetensors": keys for i, keys in enumerate(groups, start=1)}

    def drafts(self, folder: Path) -> dict[str, Draft]:
        """Name of a file -> its bytes before the tensors, and the positions of these."""
        drafts = {}
        for name, keys in self.files.items():
            written = [(self.tensors[key], self.base.tensors[self.tensors[key].source].shape) for key in keys]
            drafts[name] = draft(folder / name, [(w.key, w.dtype, shape, w.nbytes) for w, shape in written])
        return drafts

    def index(self) -> str | None:
        """The text of the index, if there are several files or the base's only file has another name."""
        if [*self.files] == [SINGLE_FILE]:
            return None
        total = sum(written.nbytes for written in self.tensors.values())
        weight_map = {key: name for name, keys in self.files.items() for key in keys}
        metadata = {"total_size": total}
        return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"

    @property
    def skipped(self) -> list[Path]:
        """Files of the base that are not copied: weights in other formats, and remains of training."""
        own = {file.relative_to(self.base.folder) for file in self.base.files} | {Path(INDEX_FILE)}
        return [path for path in self.base.left if path not in own]


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "5GB" or "500MiB".

    Raises:
        ConfigError: it is neither.

    Examples:
        >>> parse_size("5GB"), parse_size("1.5MiB"), parse_size(7)
        (5000000000, 1572864, 7)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"max_shard_size: expected bytes, or a text such as '5GB' or '500MiB', got {size!r}.")
    number = int(float(match[1]) * _UNITS[match[2].upper()])
    if number < 1:
        raise ConfigError(f"max_shard_size: expected at least one byte, got {size!r}.")
    return number

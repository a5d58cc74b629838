"""The folder of a transformers model: its tensors, in any number of files, and its other files."""

from __future__ import annotations

import os
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from funclora._files.atomic import read_json
from funclora._files.locks import entries
from funclora._files.names import file_inside
from funclora._files.safetensors import Stored, read_header
from funclora._files.snapshot import ChangedError, OpenFile, State, Stillness, attempts, being_replaced, state_of
from funclora.errors import FormatError, UnsupportedError, near
from funclora.io.peft.files import CONFIG_FILE as ADAPTER_CONFIG

OnProgress = Callable[[int, int], None]  # called with the finished and the total amount

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Files of weights in any format, and remains of training, which are wrong after a merge.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".ggml", ".onnx", ".onnx_data", ".npz", ".ot", ".tflite", ".mlmodel", ".pkl", ".pickle", ".index",
)  # fmt: skip

C = TypeVar("C", bound="Checkpoint")


class Checkpoint:
    """A model's folder, open for reading: what it was when it was opened, even while another process replaces it.

    Attributes:
        folder: the folder.
        config: the contents of `config.json`.
        tensors: key -> position of the tensor, file after file.
        files: the files of tensors, in order.
        small: the files to copy, as paths inside the folder.
        left: the files that a copy leaves out, as paths inside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.tensors, self._opened, seen = _opened(folder)
        if self.config.get("quantization_config"):
            raise UnsupportedError(
                f"{folder}: its weights are quantised (quantization_config), and are not read in parts; to quantise a "
                "merged weight again would also lose precision. Give the folder of the model before it was quantised."
            )
        self.files = [*dict.fromkeys(tensor.file for tensor in self.tensors.values())]
        self.small: list[Path] = []
        self.left: list[Path] = []
        for path in seen:
            (self.left if path.name.endswith(_WEIGHTS) else self.small).append(path)
        if Path(ADAPTER_CONFIG) in self.small:
            raise UnsupportedError(
                f"{folder}: it also contains an adapter ({ADAPTER_CONFIG}), which transformers would add to the model. "
                "Move the adapter to its own folder."
            )
        self._seen = {path: seen[path] for path in self.small}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, for all tensors."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}

    def descriptor(self, file: Path) -> int:
        """The file, open for reading."""
        return self._opened[file].descriptor

    def read(self, key: str, first: int = 0, length: int | None = None) -> Tensor:
        """A copy of a tensor, or of some slices along its first dimension."""
        stored = self.tensors[key]
        return stored.read(self.descriptor(stored.file), first, length)

    def copy(self, path: Path, target: Path) -> None:
        """Copy one of the small files.

        Raises:
            ChangedError: it is no longer what it was when the folder was opened.
            FormatError: it is a link to a file that is not there.
            OSError: it cannot be read, or the target not be written.
        """
        file, seen = self.folder / path, self._seen[path]
        if seen is None and file.is_symlink():
            raise FormatError(f"{file}: it is a link to a file that is not there.")
        if seen is None or state_of(file) != seen:
            raise ChangedError(f"{file}: another process has changed or removed it meanwhile.")
        shutil.copyfile(file, target)
        if state_of(file) != seen:
            raise ChangedError(f"{file}: another process has changed or removed it meanwhile.")

    def check(self) -> None:
        """Raise `ChangedError` if a program has written into the files of tensors since they were opened."""
        for file in self._opened.values():
            file.check()

    def close(self) -> None:
        """Close the files."""
        for file in self._opened.values():
            file.close()

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The position of each tensor of a model's folder, file after file, as transformers finds them.

    Raises:
        FormatError: there is none, a file is broken, or the index does not fit the files.
        UnsupportedError: there are pickles instead.
    """
    return _tensors(folder)[0]


_Opened = tuple[dict[str, Any], dict[str, Stored], dict[Path, OpenFile], dict[Path, State | None]]


def _opened(folder: Path) -> _Opened:
    """The configuration, the tensors, their files, and all paths inside the folder, all of one version."""
    stands_still = Stillness(folder)
    for last in attempts():
        before = _states(folder)
        try:
            seen = {path: state_of(folder / path) for path in _files(folder)}
            found = _config(folder), *_tensors(folder), seen
        except (FormatError, OSError):
            if last or (_states(folder) == before and stands_still()):
                raise
        else:
            if _states(folder) == before:
                return found
    raise being_replaced(folder)


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such folder. Give the folder of a transformers model.")
    if not (folder / CONFIG_FILE).is_file():
        hint = " It is an adapter folder." if (folder / ADAPTER_CONFIG).is_file() else ""
        raise FormatError(f"{folder}: there is no {CONFIG_FILE} in this folder.{hint}")
    return read_json(folder / CONFIG_FILE)


def _states(folder: Path) -> dict[Path, State | None]:
    """What tells versions of the model apart."""
    files = [folder / CONFIG_FILE, folder / INDEX_FILE, *(f for f in entries(folder) if f.suffix == ".safetensors")]
    return {file: state_of(file) for file in files}


def _tensors(folder: Path) -> tuple[dict[str, Stored], dict[Path, OpenFile]]:
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():  # transformers looks for it first
        single = OpenFile(folder / SINGLE_FILE)
        return read_header(single), {single.path: single}
    if not index.is_file():
        pickles = sorted(folder.glob("*.bin"))
        if pickles:
            raise UnsupportedError(
                f"{pickles[0]} is a pickle, which can run code when it is read. Load the model with transformers "
                "if you trust it, and save it again."
            )
        raise FormatError(f"{folder}: contains neither {SINGLE_FILE} nor {INDEX_FILE}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map: expected a JSON object, got {reprlib.repr(weight_map)}.")
    tensors: dict[str, Stored] = {}
    opened: dict[Path, OpenFile] = {}
    paths = [file_inside(folder, name, f"{index}: weight_map", links=True) for name in weight_map.values()]
    for path in dict.fromkeys(paths):
        if not path.is_file():
            raise FormatError(f"{index}: it names {path.name}, which does not exist.")
        opened[path] = OpenFile(path)
        # transformers loads all tensors of the files, also those that are not in the index
        found = read_header(opened[path])
        tensors |= {key: tensor for key, tensor in found.items() if weight_map.get(key, path.name) == path.name}
    for key, name in weight_map.items():
        if key not in tensors:
            raise FormatError(f"{index}: {key!r} is not in {name}.{near(key, tensors, n=3)}")
    return tensors, opened


def with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with this dtype, in every field for it."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    changed = {**config, **dict.fromkeys(keys, name)}
    for key, value in config.items():
        if isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            changed[key] = with_dtype(value, name)
    return changed


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without tied embeddings."""
    changed = {**config, "tie_word_embeddings": False}
    for key, value in config.items():
        if isinstance(value, dict) and "tie_word_embeddings" in value:
            changed[key] = untied(value)
    return changed


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders, relative to it, without hidden ones."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield (Path(path) / name).relative_to(folder)

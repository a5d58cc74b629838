"""Which weights an adapter belongs to: a sample of its base's values beside it, compared when it is used with a model.

Base and instruct versions of a model have the same shapes, so that an adapter of one loads on the other without an
error. `adapter_config.json` names the base, but a name is useless after a folder was moved. What `funclora train` and
`funclora sweep` write has `base.json` too: for some tensors, chosen by their names, a digest of a few values, rounded
to bfloat16. A copy in another dtype, in other files or in another place is the same base.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from funclora._files.atomic import read_json, replace_files
from funclora._files.safetensors import Stored, fill
from funclora.errors import FormatError, OtherBaseWarning
from funclora.io.hf.checkpoint import stored_tensors
from funclora.io.peft.files import CONFIG_FILE, AdapterFiles

ORIGIN_FILE = "base.json"
_TENSORS, _VALUES = 128, 64


def sample(tensors: Mapping[str, Stored], keys: Iterable[str] | None = None) -> dict[str, str]:
    """Digests of shape and some values, for some tensors of a model's folder.

    Args:
        tensors: their positions, as from `stored_tensors`.
        keys: which tensors to use, if they exist; by default, as many as are written, chosen by digests of their names.
    """
    if keys is None:
        keys = sorted(tensors, key=lambda key: hashlib.sha256(key.encode()).digest())[:_TENSORS]
    found: dict[str, str] = {}
    files: dict[Path, int] = {}
    with contextlib.ExitStack() as opened:
        for key in keys:
            stored = tensors.get(key)
            if stored is None:
                continue
            if stored.file not in files:
                files[stored.file] = os.open(stored.file, os.O_RDONLY)
                opened.callback(os.close, files[stored.file])
            found[key] = _digest(stored, files[stored.file])
    return found


def _digest(stored: Stored, descriptor: int) -> str:
    dtype = stored.torch_dtype
    count = stored.nbytes // dtype.itemsize
    n = min(_VALUES, count)
    raw = torch.empty(n * dtype.itemsize, dtype=torch.uint8)
    fill(descriptor, raw, stored.start + (count - n) // 2 * dtype.itemsize)
    if dtype.is_floating_point:
        raw = raw.view(dtype).to(torch.bfloat16).view(torch.uint8)
    return hashlib.sha256(f"{list(stored.shape)}".encode() + raw.numpy().tobytes()).hexdigest()[:16]


def write_origin(adapter: Path, base: Path) -> None:
    """Write the sample of a base beside an adapter.

    Args:
        adapter: the PEFT folder.
        base: the folder of the model that it belongs to.
    """
    text = json.dumps({"tensors": sample(stored_tensors(base))}, indent=1) + "\n"

    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    replace_files(adapter, {ORIGIN_FILE: write})


def check_origin(adapters: Iterable[Path], base: Path | None) -> None:
    """Warn in one line about each adapter that belongs to another model.

    The sample decides if there is one that can be compared; otherwise the name of the base in `adapter_config.json`.

    Args:
        adapters: PEFT folders.
        base: the model's folder; None for a model without a folder, for which there are no warnings.

    Raises:
        FormatError: a sample, or the base, is broken.
    """
    if base is None:
        return
    tensors: dict[str, Stored] | None = None
    for adapter in adapters:
        named = _named(adapter)
        stored = _stored(adapter / ORIGIN_FILE)
        if stored:
            tensors = stored_tensors(base) if tensors is None else tensors
            found = sample(tensors, stored)
            if 2 * len(found) > len(stored):
                differ = sum(stored[key] != value for key, value in found.items())
                if differ:
                    _warn(
                        f"{adapter}: it belongs to other weights than those in {base}: {differ} of {len(found)} tensors"
                        f" that were compared differ. It was trained on {named!r}."
                    )
                continue
        if named and not _is_name_of(named, base):
            _warn(
                f"{adapter}: {CONFIG_FILE} names {named!r} as its base, but this is {base}. If this is another model, "
                "the result is meaningless."
            )


def _stored(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    tensors = read_json(file).get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(value, str) for value in tensors.values()):
        raise FormatError(f"{file}: expected tensors and their digests. Remove the file to skip the comparison.")
    return tensors


def _named(adapter: Path) -> str | None:
    named = AdapterFiles(adapter).config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _is_name_of(named: str, base: Path) -> bool:
    """Whether a name, of a folder or on the hub, appears to be the name of the folder."""
    with contextlib.suppress(OSError, ValueError):
        if Path(named).samefile(base):
            return True
    config: Any = read_json(base / "config.json")
    known = [base.name, base.resolve().name, config.get("_name_or_path")]
    known += [part.removeprefix("models--").replace("--", "/") for part in base.parts if part.startswith("models--")]
    return _last(named) in {_last(name) for name in known if isinstance(name, str) and name}


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _warn(message: str) -> None:
    warnings.warn(message, OtherBaseWarning, stacklevel=4)

"""The models of a diffusers pipeline's folder, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from funclora._files.atomic import read_json
from funclora.errors import FormatError, UnsupportedError
from funclora.io.foreign.image_files import package
from funclora.io.hf.library import OPTIONS, check_config, reading, transformers

INDEX_FILE = "model_index.json"


def empty_pipeline(folder: Path) -> tuple[dict[str, nn.Module], type]:
    """The models of a pipeline that can have adapters, on the meta device, and the class of the pipeline.

    Args:
        folder: as `pipe.save_pretrained` writes it.

    Raises:
        FormatError: there is no pipeline in the folder, or it is broken.
        UnsupportedError: it has code of its own, or diffusers is not installed.
    """
    diffusers, file = package(), folder / INDEX_FILE
    if not file.is_file():
        raise FormatError(f"{folder}: there is no {INDEX_FILE}. Give the folder of a diffusers pipeline.")
    index = read_json(file)
    name = index.get("_class_name")
    pipeline: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not _is_subclass(pipeline, diffusers.DiffusionPipeline):
        raise UnsupportedError(f"{file}: {name!r} is no pipeline of diffusers; code from a folder is never run.")
    models = {}
    for component in getattr(pipeline, "_lora_loadable_modules", ()):
        entry = index.get(component)
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            models[component] = _empty(folder / component, *entry)
    return models, pipeline


def _empty(folder: Path, library: str, name: str) -> nn.Module:
    sources = {"diffusers": (package(), "ModelMixin"), "transformers": (transformers(), "PreTrainedModel")}
    source, parent = sources.get(library, (None, ""))
    cls: Any = getattr(source, name, None)
    if source is None or not _is_subclass(cls, getattr(source, parent)):
        raise UnsupportedError(
            f"{folder.parent / INDEX_FILE}: {folder.name} is {library}.{name}, which is no model of diffusers or "
            "transformers; code from a folder is never run."
        )
    file = folder / "config.json"
    check_config(folder, read_json(file))
    with reading(folder, f"{folder} cannot be loaded as {name}"), torch.device("meta"):
        if library == "transformers":
            return cls(cls.config_class.from_pretrained(folder, **OPTIONS))  # type: ignore[no-any-return]
        return cls.from_config(cls.load_config(folder, **OPTIONS), **OPTIONS)  # type: ignore[no-any-return]


def _is_subclass(cls: object, parent: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, parent)

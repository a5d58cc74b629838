"""The conversions of `funclora convert`: from a PEFT folder to another format, and from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from funclora._config.config import LoraConfig
from funclora.cli._adapters import adapter_out
from funclora.cli._base import base_model
from funclora.cli._output import claimed_out
from funclora.errors import ConfigError, FormatError, FuncloraError
from funclora.io.foreign.image_models import load_parts, loader_of, save_diffusers
from funclora.io.foreign.mlx import load_mlx, save_mlx
from funclora.io.foreign.pipelines import empty_pipeline
from funclora.io.gguf.adapter import load_gguf, save_gguf
from funclora.io.hf.origin import check_origin
from funclora.io.peft.files import CONFIG_FILE, AdapterFiles
from funclora.io.peft.folder import load_files, load_peft, save_peft
from funclora.io.peft.tensors import StoredTensors
from funclora.rules.base import Rule

Facts = dict[str, Any]


def to_gguf(folder: Path, out: Path, base: Path, dtype: torch.dtype, *, overwrite: bool) -> Facts:
    """Write llama.cpp's file."""
    with claimed_out(out, overwrite=overwrite):
        adapters, model = _read(folder, base)
        save_gguf(out, adapters, model, dtype=dtype)
    facts = {"out": out, "updates": len(adapters), "dtype": str(dtype).removeprefix("torch.")}
    return facts | {"bytes": out.stat().st_size}


def to_mlx(folder: Path, out: Path, base: Path, *, overwrite: bool) -> Facts:
    """Write mlx-lm's folder."""
    with adapter_out(out, overwrite=overwrite):
        adapters, model = _read(folder, base)
        save_mlx(out, adapters, model)
    return {"out": out, "updates": len(adapters)}


def to_diffusers(folder: Path, out: Path, base: Path, *, overwrite: bool) -> Facts:
    """Write a file for a pipeline, from the folders of its components, which are called as these are."""
    with claimed_out(out, overwrite=overwrite):
        if out.suffix != ".safetensors":
            raise ConfigError(f"--out: expected a file that ends with .safetensors, got {out}.")
        models, _ = _pipeline(base)
        found = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        unknown = [name for name in found if name not in models]
        if unknown or not found:
            raise FormatError(
                f"{folder}: expected a PEFT folder for each component, among {', '.join(models)}, in a folder of that "
                f"name, got {', '.join(unknown) or 'none'}."
            )
        parts = {name: load_peft(folder / name, models[name]) for name in found}
        save_diffusers(out.parent, parts, name=out.name)
    return {"out": out, "updates": sum(len(rules) for rules, _ in parts.values()), "components": found}


def from_gguf(file: Path, out: Path, base: Path, *, overwrite: bool) -> Facts:
    """Read llama.cpp's file."""
    with adapter_out(out, overwrite=overwrite):
        model = base_model(base, weights=False)
        return _write(out, base, model, *load_gguf(file, model))


def from_mlx(folder: Path, out: Path, base: Path, *, overwrite: bool) -> Facts:
    """Read mlx-lm's folder."""
    with adapter_out(out, overwrite=overwrite):
        model = base_model(base, weights=False)
        return _write(out, base, model, *load_mlx(folder, model))


def from_diffusers(path: Path, out: Path, base: Path, *, overwrite: bool) -> Facts:
    """Read a file for a pipeline, into a folder for each component."""
    models, loader = _pipeline(base)
    found, updates = load_parts(path, models, loader), 0
    for name in found:
        if (out / name / CONFIG_FILE).exists() and not overwrite:
            raise ConfigError(f"--out: {out / name} already contains an adapter. Give another folder, or --overwrite.")
    for name, (adapters, config) in found.items():
        with adapter_out(out / name, overwrite=overwrite):
            updates += _write(out / name, base / name, models[name], adapters, config)["updates"]
    return {"out": out, "updates": updates, "components": [*found]}


def _read(folder: Path, base: Path) -> tuple[dict[str, Rule], nn.Module]:
    files = AdapterFiles(folder)
    # PEFT stores the weights of adapted embeddings next to the adapter; they must be compared with the model's. The
    # factors of experts have such keys too.
    weights = any(".base_layer." in key and ".lora_" not in key for key in StoredTensors(files).shapes())
    model = base_model(base, weights=weights)
    adapters, _ = load_files(files, model)
    check_origin([folder], base)
    return adapters, model


def _write(out: Path, base: Path, model: nn.Module, adapters: dict[str, Rule], config: LoraConfig) -> Facts:
    save_peft(out, adapters, config.replace(base_model_name_or_path=str(base)), model=model)
    return {"out": out, "updates": len(adapters), "r": config.r, "lora_alpha": config.lora_alpha}


def _pipeline(folder: Path) -> tuple[dict[str, nn.Module], type]:
    """The models of the pipeline that `--base` names, and the class that loads LoRA files for it."""
    try:
        models, pipeline = empty_pipeline(folder)
        return models, loader_of(pipeline)
    except FuncloraError as error:
        raise type(error)(f"--base: {error}") from error

"""The base model that `--base` names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from funclora.errors import ConfigError


def base_model(folder: Path, *, weights: bool = True) -> nn.Module:
    """The transformers model of a folder, of the class that its configuration names.

    Args:
        folder: the folder.
        weights: load the weights; else the model has its structure only, on the meta device.

    Raises:
        ConfigError: there is no such model, or no transformers.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--base: {folder} holds no config.json. It takes the folder of a transformers model.")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError("--base needs transformers. Type: pip install 'funclora[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (config.architectures or ["?"])[0]
        cls = getattr(transformers, name, transformers.AutoModel)
        model: nn.Module
        if weights:
            model = cls.from_pretrained(folder, local_files_only=True, dtype="auto")
        else:
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(config) if cls is transformers.AutoModel else cls(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--base: {folder} cannot be loaded: {error}") from error
    return model

"""The base model that `--base` names."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from funclora.errors import FuncloraError


def base_model(folder: Path, *, weights: bool = True) -> nn.Module:
    """The transformers model of a folder, of the class that its configuration names.

    Args:
        folder: the folder.
        weights: load the weights; otherwise the model has only its structure, on the meta device.

    Raises:
        FuncloraError: there is no such model, it cannot be loaded, or transformers is not installed.
    """
    from funclora._apps.train.folder import empty_model, load_model

    try:
        return load_model(folder, None)[0] if weights else empty_model(folder, None)
    except FuncloraError as error:
        raise type(error)(f"--base: {str(error).removeprefix('model: ')}") from error

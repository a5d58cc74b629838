"""The base model of a command: the folder that `--base` names, and the forms of its weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn


Device = Annotated[str, typer.Option(help="Device to compute on: auto (CUDA, MPS or the CPU), cpu, cuda, cuda:1.")]
Threshold = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Probability from which on a text is of a class, where it has several.")
]


class Dtype(str, Enum):
    """The dtype of the base weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(str, Enum):
    """How the base weights are quantised."""

    none = "none"
    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


def base_model(folder: Path, *, weights: bool = True) -> nn.Module:
    """The transformers model of a folder, of the class that its configuration names.

    Args:
        folder: the folder.
        weights: load the weights; otherwise the model has only its structure, on the meta device, and may be an
            outline of the model.

    Raises:
        FuncloraError: there is no such model, it cannot be loaded, or transformers is not installed.
    """
    from funclora.errors import FuncloraError

    try:
        return _loaded(folder) if weights else _outlined(folder)
    except FuncloraError as error:
        raise type(error)(f"--base: {str(error).removeprefix('model: ')}") from error


def _loaded(folder: Path) -> nn.Module:
    from funclora._apps.train.folder import load_model

    return load_model(folder, None)[0]


def _outlined(folder: Path) -> nn.Module:
    from funclora._apps.train.tokenizer import model_folder
    from funclora._files.atomic import read_json
    from funclora._files.snapshot import being_replaced
    from funclora.io.hf.checkpoint import CONFIG_FILE
    from funclora.io.hf.outline import outlined

    config = read_json(model_folder(folder) / CONFIG_FILE)

    def make() -> nn.Module:
        from funclora._apps.train.folder import empty_model

        model = empty_model(folder, None)
        if read_json(folder / CONFIG_FILE) != config:
            raise being_replaced(folder)
        return model

    # transformers then reads another file of the folder.
    return make() if "configuration_files" in config else outlined({"automatic config": config}, make)

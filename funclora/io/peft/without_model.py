"""Reading a PEFT folder without the model: the low-rank updates of modules, which its files describe completely."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from funclora._config.config import LoraConfig
from funclora._config.covers import covers
from funclora._config.peft_fields import HEADS
from funclora.errors import FormatError, UnsupportedError
from funclora.io.peft.config_file import read_config
from funclora.io.peft.files import AdapterFiles
from funclora.io.peft.keys import FORMS, PREFIX
from funclora.io.peft.tensors import StoredTensors
from funclora.rules.base import Rule
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Conv, Conv1D, Embedding, Layout, Linear
from funclora.rules.low_rank import LoRA

_A = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<suffix>lora_A\.weight|lora_embedding_A)$")
_ADVICE = "Give the base model (--base on the command line, model= in Python)."


def read_bare(files: AdapterFiles, *, in_out: bool, dora: bool = False) -> tuple[dict[str, Rule], LoraConfig]:
    """The adapters of a folder, as far as they can be understood without the model.

    The layout of a convolution leaves out its padding, and all linear layers get the same one: enough to calculate
    with the factors and to write them back, not to apply them to a model. A target of the configuration that has no
    tensors goes unnoticed.

    Args:
        files: a PEFT folder.
        in_out: linear layers are taken for transformers' `Conv1D` (see `AdapterFiles`).
        dora: read `DoRA` too, for callers that look at the factors only: what it computes depends on the model.

    Returns:
        Full parameter name -> rule, in float32 at least, and the configuration.

    Raises:
        FormatError: a file is missing or broken, or the files do not fit each other.
        UnsupportedError: what the folder holds depends on the model.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    file = files.config_file
    config, _ = read_config(files, nn.Module())
    depends = {
        "init_lora_weights": config.decomposition,
        "use_dora": config.use_dora and not dora,
        "target_parameters": config.target_parameters,
        "modules_to_save": config.modules_to_save,
        "bias": "" if config.bias == "none" else config.bias,
        "task_type": config.task_type if HEADS.get(config.task_type or "") else "",
    }
    for field, value in depends.items():
        if value:
            raise UnsupportedError(f"{file}: with {field}={value!r} the adapter depends on the base model. {_ADVICE}")
    stored = StoredTensors(files)
    adapters = {
        f"{match['module']}.weight": _rule(stored, match, shape, config, in_out=in_out)
        for key, shape in stored.shapes().items()
        if (match := _A.match(key))
    }
    for key in stored.shapes():
        raise UnsupportedError(f"{stored.file}: {key!r} is no factor of a low-rank update. {_ADVICE}")
    if not adapters:
        raise FormatError(f"{stored.file}: there are no low-rank updates in this file.")
    files.check()
    return adapters, config


def _rule(
    stored: StoredTensors, match: re.Match[str], shape: tuple[int, ...], config: LoraConfig, *, in_out: bool
) -> Rule:
    key, module = match.string, match["module"]
    if ".base_layer" in f".{module}":
        raise UnsupportedError(f"{stored.file}: {key!r} lies inside another adapted module. {_ADVICE}")
    layout = _layout(match["suffix"], len(shape), in_out=in_out)
    if not covers(config, module, linear=isinstance(layout, (Linear, Conv1D))):
        raise FormatError(
            f"{stored.file}: unexpected key {key!r}. The configuration does not target {module!r}, and PEFT would drop "
            "it without a word."
        )
    form, r, why = FORMS[type(layout)], config.rank_of(module), f"{module!r} (rank {config.rank_of(module)})"
    key_b = f"{PREFIX}{module}.{form.b}"
    blank = torch.empty(0)  # on the CPU
    dtype = torch.promote_types(stored.dtype(key), torch.float32)
    shape_b = (stored.rows(key_b, why), r, *(1 for _ in shape[2:]))
    a = stored.take(key, (r, *shape[1:]), blank, dtype, why)
    b = stored.take(key_b, shape_b, blank, dtype, why)
    options: dict[str, Any] = {
        "scaling": config.scaling(r, config.alpha_of(module)), "dropout": float(config.lora_dropout), "layout": layout,
    }  # fmt: skip
    if not config.use_dora:
        return LoRA(a, b, **options)
    shape_m = (1, shape_b[0], *(1 for _ in shape[2:])) if len(shape) > 2 else (shape_b[0],)
    magnitude = stored.take(f"{PREFIX}{module}.{form.magnitude}", shape_m, blank, dtype, why)
    return DoRA(a, b, magnitude.flatten(), **options)


def _layout(suffix: str, dims: int, *, in_out: bool) -> Layout:
    if suffix == FORMS[Embedding].a:
        return Embedding()
    if dims > 2:
        return Conv()
    return Conv1D() if in_out else Linear()

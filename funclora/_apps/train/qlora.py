"""Which weights of a base are quantised (QLoRA, arXiv 2305.14314), and their quantisation one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from funclora._apps.train.settings import CAUSAL, EMBEDDING, PREFERENCE, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._config.config import LoraConfig
from funclora._config.peft_fields import DECOMPOSITIONS, HEADS
from funclora._config.targets import select
from funclora._quant.quantize import quantize
from funclora.rules.base import Params

# PEFT's names of the tasks.
TASK_TYPES = {
    CAUSAL: "CAUSAL_LM",
    SEQUENCE: "SEQ_CLS",
    TOKEN: "TOKEN_CLS",
    SEQ2SEQ: "SEQ_2_SEQ_LM",
    PREFERENCE: "CAUSAL_LM",
    EMBEDDING: "FEATURE_EXTRACTION",
}


def splits_weights(settings: Settings) -> bool:
    """Whether `init` moves a part of the weights into the adapter, so that only the rest is quantised."""
    return settings.init.startswith("pissa") or settings.init in DECOMPOSITIONS


def trained_whole(model: nn.Module, settings: Settings, new: Iterable[str]) -> list[str]:
    """The modules that are fully fine-tuned and saved.

    These are the modules in the settings; new modules that are not in the folder, because otherwise the result could
    not be loaded again; and the heads that PEFT trains with the task, new or not, found by the ends of their names as
    in PEFT.
    """
    return list(dict.fromkeys([*settings.modules_to_save, *new, *_heads(model, settings)]))


def task_type(model: nn.Module, settings: Settings) -> str | None:
    """PEFT's name of the task; None if its class for the task would expect a head that the model does not have."""
    name = TASK_TYPES[settings.task]
    return name if name not in HEADS or _heads(model, settings) else None


def _heads(model: nn.Module, settings: Settings) -> list[str]:
    ends = HEADS.get(TASK_TYPES[settings.task], ())
    return [name for name, _ in model.named_modules() if ends and name.endswith(ends)]


def packed_names(model: nn.Module, settings: Settings, new: Iterable[str]) -> list[str]:
    """The weights to quantise: of all linear layers, except the output layer and fully fine-tuned modules.

    They need not be targets of the adapter. bitsandbytes quantises the same weights, so the adapter fits its models.

    Args:
        model: the structure.
        settings: `task` and `modules_to_save` are used.
        new: modules that are also fully fine-tuned, because their weights are new.

    Returns:
        Full parameter names.

    Raises:
        TargetError: the model has no linear layer, or lacks one of `modules_to_save`.
    """
    everything = LoraConfig(
        target_modules="all-linear",
        modules_to_save=trained_whole(model, settings, new),
        task_type=task_type(model, settings),
    )
    return [name for name, target in select(model, everything).items() if target.layout is not None]


def pack(params: Params, names: Iterable[str], settings: Settings, device: torch.device) -> dict[str, Tensor]:
    """The named weights, quantised on a device, with only one dense weight there at a time.

    Raises:
        ParamsError: a weight cannot be quantised.
        UnsupportedError: bitsandbytes is not installed.
    """
    kind: Any = settings.quantize
    options: Any = {"double_quant": settings.double_quant} if kind != "int8" else {}
    packed: dict[str, Tensor] = {}
    for name in names:
        packed |= quantize({name: params[name].to(device)}, [name], kind, **options)
    return packed


def forget(model: nn.Module, names: Iterable[str]) -> None:
    """Move the parameters of a model to the meta device, which frees their memory; the values are elsewhere.

    Tied parameters stay tied.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    gone = {known[name]: nn.Parameter(known[name].to("meta"), requires_grad=False) for name in names}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter in gone:
                module._parameters[leaf] = gone[parameter]

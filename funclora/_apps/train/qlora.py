"""Which weights a quantised base packs (QLoRA, arXiv 2305.14314), and the packing of them one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from funclora._apps.train.settings import CAUSAL, SEQ2SEQ, SEQUENCE, TOKEN, Settings
from funclora._config.config import LoraConfig
from funclora._config.peft_fields import DECOMPOSITIONS, HEADS
from funclora._config.targets import select
from funclora._quant.quantize import quantize
from funclora.rules.base import Params

# PEFT's names of the tasks.
TASK_TYPES = {CAUSAL: "CAUSAL_LM", SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS", SEQ2SEQ: "SEQ_2_SEQ_LM"}


def splits_weights(settings: Settings) -> bool:
    """Whether `init` moves a part of the weights into the adapter, so that only the rest is packed."""
    return settings.init.startswith("pissa") or settings.init in DECOMPOSITIONS


def trained_whole(model: nn.Module, settings: Settings, new: Iterable[str]) -> list[str]:
    """The modules that are trained and saved in full.

    Those that are named; those that the folder did not have, or the result could not be loaded again; and the heads
    that PEFT trains with the task, new or not, by the ends of their names as it finds them.
    """
    return list(dict.fromkeys([*settings.modules_to_save, *new, *_heads(model, settings)]))


def task_type(model: nn.Module, settings: Settings) -> str | None:
    """PEFT's name of the task; None where its class for the task would look for a head that the model does not have."""
    name = TASK_TYPES[settings.task]
    return name if name not in HEADS or _heads(model, settings) else None


def _heads(model: nn.Module, settings: Settings) -> list[str]:
    ends = HEADS.get(TASK_TYPES[settings.task], ())
    return [name for name, _ in model.named_modules() if ends and name.endswith(ends)]


def packed_names(model: nn.Module, settings: Settings, new: Iterable[str]) -> list[str]:
    """The weights to pack: of all linear layers, without the output layer and without what is trained in full.

    Targets of the adapter or not: it is as bitsandbytes packs a model, so the adapter fits one that it has packed.

    Args:
        model: the structure.
        settings: `task` and `modules_to_save` are looked at.
        new: modules that are trained in full as well, because their weights are new.

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
    """The named weights as quantised ones on a device, on which one dense weight at a time is.

    Raises:
        ParamsError: a weight cannot be packed.
        UnsupportedError: bitsandbytes is not installed.
    """
    kind: Any = settings.quantize
    options: Any = {"double_quant": settings.double_quant} if kind != "int8" else {}
    packed: dict[str, Tensor] = {}
    for name in names:
        packed |= quantize({name: params[name].to(device)}, [name], kind, **options)
    return packed


def forget(model: nn.Module, names: Iterable[str]) -> None:
    """Put the parameters of a model on the meta device: their values are elsewhere, and their memory is free."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[leaf] = nn.Parameter(owner._parameters[leaf].to("meta"), requires_grad=False)  # type: ignore[union-attr]

"""Names that PEFT gives to the tensors of an adapter, because transformers renames those of older checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from funclora._config.experts import converted_like
from funclora._config.outlined import asked
from funclora.io.peft.keys import PREFIX

_ADAPTER = ".default"


def renamed_by_peft(model: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """`(key, other key)` for each tensor of a low-rank update that PEFT looks for under another name in this model."""
    if converted_like(model) is None:
        return
    low_rank = [key for key in keys if ".lora_" in key]
    yield from asked(model, ["renamed by PEFT", low_rank], lambda model: [*_renamed(model, low_rank)])


def _renamed(model: nn.Module, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    changes = get_model_conversion_mapping(cast(Any, model))
    renamings = [
        loading.WeightRenaming(f"{PREFIX}model.", "model."),
        loading.WeightRenaming(PREFIX, ""),
        loading.WeightRenaming(r"(lora_[^\.]*)", rf"\1{_ADAPTER}"),
        *(change for change in changes if isinstance(change, loading.WeightRenaming)),
    ]
    for key in keys:
        name = "".join(loading.rename_source_key(key, renamings, [])[0].rsplit(_ADAPTER, 1))
        if not key.endswith(name):
            yield key, PREFIX + name.removeprefix(PREFIX)

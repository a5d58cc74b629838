"""transformers' own table of conversions: what the tensors of older checkpoints are in the installed version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

Sources = dict[str, list[str]]  # pattern -> the keys that match it, in the order of the experts


class Conversions:
    """The parameters of a model that the tensors of a checkpoint become.

    Args:
        model: a transformers model.
        names: the full names of its parameters and saved buffers.
        keys: the keys of the tensors. Those that transformers would not load are left out.

    Attributes:
        plain: key -> parameter, for tensors that at most get another name.
        joined: parameter -> the conversion that makes it of several tensors, or of a part of one, and these.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], keys: Iterable[str]) -> None:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.plain: dict[str, str] = {}
        self.joined: dict[str, tuple[Any, Sources]] = {}
        changes = get_model_conversion_mapping(cast(Any, model))
        renamings = [c for c in changes if isinstance(c, loading.WeightRenaming)]
        converters = [c for c in changes if isinstance(c, loading.WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known: dict[str, Any] = dict.fromkeys(names, True)
        prefix = cast(Any, model).base_model_prefix
        # Experts are ordered by the numbers in their names, as in transformers.
        for key in sorted(keys, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = loading.rename_source_key(key, [], [], prefix, known)
            if name not in known:
                continue
            if pattern is None:
                self.plain[key] = name
            else:
                _, sources = self.joined.setdefault(name, (by_pattern[pattern], {}))
                sources.setdefault(pattern, []).append(key)


def experts_joined(converter: Any) -> bool:
    """Whether a conversion stacks the matrices of experts, and joins those of several kinds along their outputs."""
    from transformers import core_model_loading as loading

    ways = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return ways in ([(loading.MergeModulelist, 0)], [(loading.MergeModulelist, 0), (loading.Concatenate, 1)])

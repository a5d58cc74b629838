"""transformers' own table of conversions: what the tensors of older checkpoints are in the installed version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from funclora._config.outlined import Plain, asked

Sources = dict[str, list[str]]  # pattern -> the keys that match it, in the order of the experts


class Conversion(NamedTuple):
    """How parameters are made of several tensors, or of a part of one.

    Attributes:
        operations: the name of each operation in transformers, and its `dim`; None for one without.
        sources: patterns of the keys of tensors.
        targets: patterns of the names of parameters.
    """

    operations: Sequence[tuple[str, int | None]]
    sources: Sequence[str]
    targets: Sequence[str]

    @property
    def joins_experts(self) -> bool:
        """Whether it stacks the matrices of experts, and joins those of several kinds along their outputs."""
        stacks = ("MergeModulelist", 0)
        return [*self.operations] in ([stacks], [stacks, ("Concatenate", 1)])


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
        names, keys = sorted(names), sorted(keys)
        found = asked(model, ["conversions", names, keys], lambda model: _found(model, names, keys))
        self.plain: dict[str, str] = found["plain"]
        self.joined: dict[str, tuple[Conversion, Sources]] = {}
        for name, (number, sources) in found["joined"].items():
            operations, patterns, targets = found["conversions"][number]
            self.joined[name] = (Conversion([(way, dim) for way, dim in operations], patterns, targets), sources)


def _found(model: nn.Module, names: Iterable[str], keys: Iterable[str]) -> Plain:
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    changes = get_model_conversion_mapping(cast(Any, model))
    renamings = [c for c in changes if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in changes if isinstance(c, loading.WeightConverter)]
    by_pattern = {pattern: i for i, c in enumerate(converters) for pattern in c.source_patterns}
    prefix = cast(Any, model).base_model_prefix
    known: dict[str, Any] = dict.fromkeys(names, True)
    plain: dict[str, str] = {}
    joined: dict[str, tuple[int, Sources]] = {}
    # Experts are ordered by the numbers in their names, as in transformers.
    for key in sorted(keys, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = loading.rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue
        if pattern is None:
            plain[key] = name
        else:
            _, sources = joined.setdefault(name, (by_pattern[pattern], {}))
            sources.setdefault(pattern, []).append(key)
    return {"plain": plain, "joined": joined, "conversions": [*map(_plain, converters)]}


def _plain(converter: Any) -> Conversion:
    operations = [(type(each).__name__, getattr(each, "dim", None)) for each in converter.operations]
    return Conversion(operations, [*converter.source_patterns], [*converter.target_patterns])

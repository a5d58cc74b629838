"""One rule and its tensors in a file, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funclora._config.config import LoraConfig
from funclora._config.target import Target
from funclora.errors import FormatError
from funclora.io.peft.keys import Keys, Leaves, PeftTarget, swapped
from funclora.io.peft.limits import counts_twice
from funclora.io.peft.tensors import StoredTensors
from funclora.rules.base import Adapters, Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Attention
from funclora.rules.low_rank import LoRA
from funclora.rules.tokens import Tied, TrainableTokens
from funclora.rules.weights import refuse_weight


def tensors_of(adapters: Adapters, wrapped: Mapping[str, PeftTarget]) -> dict[str, Tensor]:
    """The tensors of a file, by key.

    Args:
        adapters: full name -> rule.
        wrapped: the weights that PEFT wraps, tied ones included.
    """
    keys = Keys(wrapped.values())
    tensors: dict[str, Tensor] = {}
    for name, rule in adapters.items():
        followed = adapters[rule.to] if isinstance(rule, Tied) else rule
        if isinstance(followed, Full):
            tensors[keys.full(name)] = followed.value
        elif isinstance(followed, Delta):
            tensors[keys.bias_of_b(name)] = followed.value
        elif isinstance(followed, (LoRA, DoRA)):
            w = wrapped[name]
            leaves = {leaf: getattr(followed, leaf) for leaf in followed.leaf_names}
            leaves = w.form.pack(leaves if followed is rule else swapped(leaves), w)
            tensors |= {keys.leaf(w, leaf): tensor for leaf, tensor in leaves.items()}
        elif isinstance(rule, TrainableTokens):  # what is tied to its table has no rows of its own
            tensors[keys.tokens(name)] = rule.value
    return tensors


@dataclass(frozen=True)
class Reader:
    """Makes rules from the tensors of a file.

    Attributes:
        stored: the tensors.
        keys: their keys.
        config: the configuration in the folder.
        wrapped: the weights that PEFT wraps, tied ones included.
    """

    stored: StoredTensors
    keys: Keys
    config: LoraConfig
    wrapped: Mapping[str, PeftTarget]

    def rule(self, name: str, target: Target, weight: Tensor) -> Rule:
        """The rule of a parameter that is not tied to another one."""
        refuse_weight(name, weight)
        stored, dtype = self.stored, torch.promote_types(weight.dtype, torch.float32)
        if target.rule is TrainableTokens:
            shape = (len(target.tokens), weight.shape[1])
            value = stored.take(self.keys.tokens(name), shape, weight, dtype, f"the tokens of {name!r}")
            return TrainableTokens(value, token_indices=target.tokens)
        if target.rule is Delta:
            key = self.keys.bias_of_b(name)
            return Delta(stored.take(key, weight.shape, weight, dtype, repr(name)), scaling=target.scaling)
        if target.rule is Full:
            return Full(stored.take(self.keys.full(name), weight.shape, weight, weight.dtype, repr(name)))
        return self._low_rank(self.wrapped[name], target, weight)

    def tied(self, name: str, target: Target, followed: Rule, weight: Tensor) -> Tied:
        """The rule of a parameter that follows another one, whose values the file must repeat."""
        pairs: list[tuple[Tensor, Tensor]] = []
        if isinstance(followed, Full):
            key = self.keys.full(name)
            pairs = [(self.stored.take(key, weight.shape, weight, weight.dtype, repr(name)), followed.value)]
        elif isinstance(followed, LoRA):
            alike = replace(target, rule=LoRA, r=followed.r)
            own, same = self._low_rank(self.wrapped[name], alike, weight), swapped({"a": followed.a, "b": followed.b})
            pairs = [(own.a, same["a"]), (own.b, same["b"])]
        if not all(torch.equal(one, other) for one, other in pairs):
            raise FormatError(
                f"{self.stored.file}: the adapters of {name!r} and {target.tied_to!r} are tied by "
                f"ensure_weight_tying, but "
                "have other values: PEFT loses the tie on a base in half precision. To read them as two adapters, set "
                f"ensure_weight_tying to false and add {target.module!r} to target_modules in the configuration."
            )
        return Tied(target.tied_to)

    def _low_rank(self, w: PeftTarget, target: Target, weight: Tensor) -> LoRA | DoRA:
        stored, keys, config = self.stored, self.keys, self.config
        rows, wanted = stored.rows(keys.leaf(w, "a"), repr(w.name)), target.r * w.experts
        if rows != wanted:
            raise FormatError(
                f"{stored.file}: {keys.leaf(w, 'a')!r} has {rows} rows, expected {wanted}: rank {target.r} by r and "
                f"rank_pattern of the configuration{f', {w.experts} experts' if w.experts > 1 else ''}. Give it the "
                "rank of the tensors."
                + (" PEFT sorts rank_pattern when it saves, and the first key that matches counts."
                   if config.rank_pattern else "")
            )  # fmt: skip
        shapes = dict(zip(("a", "b"), w.layout.factor_shapes(w.shape, target.r), strict=True))
        if target.rule is DoRA:
            shapes["magnitude"] = w.layout.magnitude_shape(w.shape)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        blank: Leaves = {leaf: torch.empty(shape, device="meta") for leaf, shape in shapes.items()}
        packed = {
            leaf: stored.take(keys.leaf(w, leaf), tensor.shape, weight, dtype, f"{w.name!r} (rank {target.r})")
            for leaf, tensor in w.form.pack(blank, w).items()
        }
        leaves = [leaf.contiguous() for leaf in w.form.unpack(packed, w).values()]
        scaling, dropout = target.scaling, float(config.lora_dropout)
        if isinstance(w.layout, Attention):
            dropout = 0.0  # PEFT merges before it calls the module
            scaling *= 2 if counts_twice(w) else 1
        return (DoRA if target.rule is DoRA else LoRA)(*leaves, scaling=scaling, dropout=dropout, layout=w.layout)

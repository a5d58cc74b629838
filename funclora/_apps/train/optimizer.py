"""The optimizer of a run: schedule, clipping, AdamW and LoRA+, on a few long vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._apps.train.settings import Settings
from funclora.errors import ConfigError
from funclora.optim import (
    GradientTransformation,
    adamw,
    chain,
    clip_by_global_norm,
    lora_plus,
    warmup_cosine,
    warmup_linear,
)
from funclora.optim._values import Schedule
from funclora.rules.base import Adapters, Rule

DECAYED, UNDECAYED = "decayed", "undecayed"


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    """The optimizer steps of a run.

    Examples:
        >>> total_steps(Settings(epochs=1.5), steps_per_epoch=3)
        5
    """
    return settings.steps or max(1, math.ceil(settings.epochs * steps_per_epoch))


def warmup_steps(settings: Settings, total: int) -> int:
    """The steps of the warm-up; a share is rounded up, as in transformers' Trainer, but leaves at least one step.

    Raises:
        ConfigError: a number of steps leaves none of `total`.

    Examples:
        >>> warmup_steps(Settings(warmup=0.03), total=100), warmup_steps(Settings(warmup=0.03), total=1)
        (3, 0)
    """
    if settings.warmup < 1:
        return min(math.ceil(settings.warmup * total), total - 1)
    if settings.warmup != int(settings.warmup):
        raise ConfigError(f"warmup: expected a share below 1 or a whole number of steps, got {settings.warmup}.")
    if settings.warmup >= total:
        raise ConfigError(
            f"warmup: expected less than the {total} steps of the run, got {settings.warmup:g}: the full rate would "
            "never be reached. Lower it, or train for more --steps or --epochs."
        )
    return int(settings.warmup)


def schedule(settings: Settings, total: int) -> Schedule:
    """The learning rate as a function of the steps taken."""
    warmup = warmup_steps(settings, total)
    if settings.schedule == "linear":
        return warmup_linear(settings.lr, warmup, total)
    end = settings.lr if settings.schedule == "constant" else 0.0
    return warmup_cosine(settings.lr, warmup, total, end=end)


def optimizer(settings: Settings, total: int) -> GradientTransformation:
    """Clipping, then AdamW (LoRA+), on the vectors of `Vectors`."""
    rate = schedule(settings, total)

    def adam(decay: float, plus: bool) -> GradientTransformation:
        if plus:
            return lora_plus(rate, settings.lora_plus, weight_decay=decay)
        return adamw(rate, weight_decay=decay)

    parts = {DECAYED: adam(settings.weight_decay, settings.lora_plus != 1), UNDECAYED: adam(0.0, False)}
    by_key = _by_key(parts)
    return chain(clip_by_global_norm(settings.clip), by_key) if settings.clip else by_key


def _by_key(parts: Mapping[str, GradientTransformation]) -> GradientTransformation:
    """Another transformation for each key of a dict."""

    def init(params: Any) -> Any:
        return {key: parts[key].init(tree) for key, tree in params.items()}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        pairs = {key: parts[key].update(tree, state[key], params=params[key]) for key, tree in grads.items()}
        return {key: updates for key, (updates, _) in pairs.items()}, {key: after for key, (_, after) in pairs.items()}

    return GradientTransformation(init, update)


class Vectors:
    """All leaves of adapters as a few vectors, so that an update is a few operations instead of several for each leaf.

    A tree `{"decayed": {dtype: {"b": [n], "rest": [m]}}, ...}`: `b` is separate for LoRA+, and leaves without weight
    decay are
    separate: biases and fully fine-tuned weights of norms, as in transformers' Trainer.

    Args:
        adapters: give the structure.
    """

    def __init__(self, adapters: Adapters) -> None:
        tree: Any = dict(adapters)
        paths, leaves, self.spec = optree.tree_flatten_with_path(tree)
        self.shapes = [leaf.shape for leaf in leaves]
        self.groups: dict[tuple[str, ...], list[int]] = {}
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            kind = "b" if path[1] in tree[path[0]].up_leaf_names else "rest"
            decay = UNDECAYED if _is_bias(tree[path[0]], leaf) else DECAYED
            self.groups.setdefault((decay, str(leaf.dtype).removeprefix("torch."), kind), []).append(i)

    def of(self, tree: Any) -> dict[str, Any]:
        """The leaves of a tree of that structure, copied into vectors."""
        leaves: Sequence[Tensor] = optree.tree_leaves(tree)
        vectors: dict[str, Any] = {}
        for (decay, dtype, kind), indices in self.groups.items():
            joined = torch.cat([leaves[i].reshape(-1) for i in indices])
            vectors.setdefault(decay, {}).setdefault(dtype, {})[kind] = joined
        return vectors

    def tree(self, vectors: Mapping[str, Any]) -> dict[str, Rule]:
        """The tree whose leaves are views of vectors."""
        leaves: list[Any] = [None] * len(self.shapes)
        for (decay, dtype, kind), indices in self.groups.items():
            parts = vectors[decay][dtype][kind].split([self.shapes[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                leaves[i] = part.view(self.shapes[i])
        tree: Any = self.spec.unflatten(leaves)
        return dict(tree)


def _is_bias(rule: Rule, leaf: Tensor) -> bool:
    return rule.layout is None and leaf.dim() <= 1

"""The optimizer of a run: schedule, clipping, and the update, on a few long vectors where it may join leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funclora._apps.train.settings import Settings
from funclora.errors import ConfigError
from funclora.optim import (
    GradientTransformation,
    adafactor,
    adamw,
    adamw_8bit,
    chain,
    clip_by_global_norm,
    lora_plus,
    sgd,
    warmup_cosine,
    warmup_cosine_restarts,
    warmup_linear,
    warmup_polynomial,
    warmup_stable_decay,
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
    warmup, lr = warmup_steps(settings, total), settings.lr
    end = lr if settings.schedule == "constant" else lr * settings.lr_end
    if settings.schedule == "linear":
        return warmup_linear(lr, warmup, total, end)
    if settings.schedule == "polynomial":
        return warmup_polynomial(lr, warmup, total, settings.power, end)
    if settings.schedule == "cosine-restarts":
        if settings.cycles > total - warmup:
            raise ConfigError(
                f"cycles: expected at most one for each of the {total - warmup} steps after the warm-up, got "
                f"{settings.cycles}. Lower it, or train for more --steps or --epochs."
            )
        return warmup_cosine_restarts(lr, warmup, total, settings.cycles, end)
    if settings.schedule == "wsd":
        return warmup_stable_decay(lr, warmup, total, decay_steps(settings, total - warmup, total), end)
    return warmup_cosine(lr, warmup, total, end)


def decay_steps(settings: Settings, left: int, total: int) -> int:
    """The steps of the decay of "wsd"; a share is rounded up, but leaves the warm-up as it is.

    Raises:
        ConfigError: it is a number of steps of which there are not so many after the warm-up.

    Examples:
        >>> decay_steps(Settings(decay=0.1), left=97, total=100), decay_steps(Settings(decay=0.9), left=50, total=100)
        (10, 50)
    """
    if settings.decay < 1:
        return min(math.ceil(settings.decay * total), left)
    if settings.decay != int(settings.decay):
        raise ConfigError(f"decay: expected a share below 1 or a whole number of steps, got {settings.decay}.")
    if settings.decay > left:
        raise ConfigError(
            f"decay: expected at most the {left} steps after the warm-up, got {settings.decay:g}. Lower it, or train "
            "for more --steps or --epochs."
        )
    return int(settings.decay)


def optimizer(settings: Settings, total: int) -> GradientTransformation:
    """Clipping, then the optimizer of the settings (LoRA+), on the vectors of `Vectors`."""
    rate = schedule(settings, total)
    moments = {"b1": settings.beta1, "b2": settings.beta2, "eps": settings.epsilon}
    kinds: dict[str, tuple[Callable[..., GradientTransformation], dict[str, float]]] = {
        "adamw": (adamw, moments),
        "adamw-8bit": (adamw_8bit, moments),
        "sgd": (sgd, {"momentum": settings.momentum}),
        "adafactor": (adafactor, {}),
    }
    build, options = kinds[settings.optimizer]

    def one(decay: float, plus: bool) -> GradientTransformation:
        given: dict[str, Any] = {**options, "weight_decay": decay}
        return lora_plus(rate, settings.lora_plus, build, **given) if plus else build(rate, **given)

    parts = {DECAYED: one(settings.weight_decay, settings.lora_plus != 1), UNDECAYED: one(0.0, False)}
    by_key = _by_key(parts)
    return chain(clip_by_global_norm(settings.clip), by_key) if settings.clip else by_key


def joins(settings: Settings) -> bool:
    """Whether leaves may become one vector: the optimizer changes each number by its own gradient only."""
    return settings.optimizer in ("adamw", "sgd")


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
    decay are separate: biases and fully fine-tuned weights of norms, as in transformers' Trainer.

    Optimizers whose update of a number depends on its whole leaf get each leaf by itself, in its shape:
    `{"decayed": {"float32, leaf 3": {"b": [out, r]}}, ...}`.

    Args:
        adapters: give the structure.
        joined: whether leaves may become one vector.
    """

    def __init__(self, adapters: Adapters, *, joined: bool = True) -> None:
        tree: Any = dict(adapters)
        paths, leaves, self.spec = optree.tree_flatten_with_path(tree)
        self.shapes = [leaf.shape for leaf in leaves]
        self.joined = joined
        self.groups: dict[tuple[str, ...], list[int]] = {}
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            kind = "b" if path[1] in tree[path[0]].up_leaf_names else "rest"
            decay = UNDECAYED if _is_bias(tree[path[0]], leaf) else DECAYED
            dtype = str(leaf.dtype).removeprefix("torch.") + (f", leaf {i}" if not joined else "")
            self.groups.setdefault((decay, dtype, kind), []).append(i)

    def of(self, tree: Any) -> dict[str, Any]:
        """The leaves of a tree of that structure, copied into vectors."""
        leaves: Sequence[Tensor] = optree.tree_leaves(tree)
        vectors: dict[str, Any] = {}
        for (decay, dtype, kind), indices in self.groups.items():
            if self.joined:
                part = torch.cat([leaves[i].reshape(-1) for i in indices])
            else:
                part = leaves[indices[0]].clone(memory_format=torch.contiguous_format)
            vectors.setdefault(decay, {}).setdefault(dtype, {})[kind] = part
        return vectors

    def tree(self, vectors: Mapping[str, Any]) -> dict[str, Rule]:
        """The tree whose leaves are views of vectors."""
        leaves: list[Any] = [None] * len(self.shapes)
        for (decay, dtype, kind), indices in self.groups.items():
            flat = vectors[decay][dtype][kind].reshape(-1)
            parts = flat.split([self.shapes[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                leaves[i] = part.view(self.shapes[i])
        tree: Any = self.spec.unflatten(leaves)
        return dict(tree)


def _is_bias(rule: Rule, leaf: Tensor) -> bool:
    return rule.layout is None and leaf.dim() <= 1

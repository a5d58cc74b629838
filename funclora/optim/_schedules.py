"""Learning rates as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from funclora.optim._values import PerMember, Schedule, check, nonnegative, wide


def constant(lr: PerMember) -> Schedule:
    """The schedule that is `lr` (a number, or a tensor `[]` or `[n_adapters]`) at every step.

    Examples:
        >>> constant(0.1)(torch.arange(3))
        tensor([0.1000, 0.1000, 0.1000])
    """
    check("lr", lr, nonnegative, "a finite number >= 0", "pass the rate itself", tensor=True)
    return lambda step: lr * torch.ones_like(step, dtype=wide(torch.get_default_dtype()))


def warmup_cosine(lr: PerMember, warmup_steps: int, total_steps: int, end: PerMember = 0.0) -> Schedule:
    """A linear warmup from 0 to `lr`, then half a cosine down to `end`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 + cos πx)/2
                               x = min(1, (step - warmup_steps)/(total_steps - warmup_steps))

    The first update has step 0: with a warmup its rate is 0, as in optax and transformers.

    Args:
        lr: The highest rate: a number, or a tensor `[]` or `[n_adapters]`.
        warmup_steps: Length of the warmup; may be 0.
        total_steps: The first step with the rate `end`; the warmup is included.
        end: The last rate: a number, or a tensor `[]` or `[n_adapters]`.

    Returns:
        A function of int64 steps, `[]` or of any shape that broadcasts with `lr`, that returns learning rates
        of this shape, in torch's default dtype, at least float32.

    Raises:
        ConfigError: If an argument is out of range, or the warmup leaves no step.

    Examples:
        >>> warmup_cosine(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000])

    References:
        Cosine annealing: arXiv 1608.03983.
    """
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: (1 + torch.cos(math.pi * x)) / 2)


def warmup_linear(lr: PerMember, warmup_steps: int, total_steps: int, end: PerMember = 0.0) -> Schedule:
    """A linear warmup from 0 to `lr`, then a straight line down to `end`; everything else as in `warmup_cosine`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 - x)

    Examples:
        >>> warmup_linear(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: 1 - x)


def _warmup(lr: PerMember, warmup: int, total: int, end: PerMember, decay: Callable[[Tensor], Tensor]) -> Schedule:
    for name, rate in (("lr", lr), ("end", end)):
        check(name, rate, nonnegative, "a finite number >= 0", "pass the rate itself", tensor=True)
    check("warmup_steps", warmup, lambda n: n >= 0 and n == int(n), "an integer >= 0", "0 means no warmup")
    need = f"an integer > warmup_steps={warmup}"
    check("total_steps", total, lambda n: n > warmup and n == int(n), need, "it includes the warmup")

    def schedule(step: Tensor) -> Tensor:
        x = step.to(wide(torch.get_default_dtype()))
        after = end + (lr - end) * decay(((x - warmup) / (total - warmup)).clamp(0, 1))
        return torch.where(step < warmup, lr * (x / max(warmup, 1)), after)

    return schedule

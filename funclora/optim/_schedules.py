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
    return _warmup(lr, warmup_steps, total_steps, end, _cosine)


def warmup_linear(lr: PerMember, warmup_steps: int, total_steps: int, end: PerMember = 0.0) -> Schedule:
    """A linear warmup from 0 to `lr`, then a straight line down to `end`; everything else as in `warmup_cosine`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 - x)

    Examples:
        >>> warmup_linear(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: 1 - x)


def warmup_cosine_restarts(
    lr: PerMember, warmup_steps: int, total_steps: int, cycles: int, end: PerMember = 0.0
) -> Schedule:
    """A linear warmup from 0 to `lr`, then `cycles` times half a cosine down to `end`, each starting again at `lr`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 + cos π·((cycles·x) mod 1))/2, and `end` from total_steps on

    Args:
        lr: as in `warmup_cosine`, like everything else.
        warmup_steps: Length of the warmup.
        total_steps: The first step with the rate `end`.
        cycles: Number of cosines; 1 gives `warmup_cosine`.
        end: The last rate.

    Returns:
        A function of steps, as in `warmup_cosine`. It equals transformers' `cosine_with_restarts`.

    Raises:
        ConfigError: If an argument is out of range, or a cycle has less than one step.

    Examples:
        >>> warmup_cosine_restarts(1.0, warmup_steps=1, total_steps=5, cycles=2)(torch.arange(6))
        tensor([0.0000, 1.0000, 0.5000, 1.0000, 0.5000, 0.0000])

    References:
        Warm restarts: arXiv 1608.03983.
    """
    check("cycles", cycles, lambda n: n >= 1 and n == int(n), "an integer >= 1", "1 means no restart")
    _check_steps(warmup_steps, total_steps)
    need = f"at most one for each of the {total_steps - warmup_steps} steps after the warmup"
    check("cycles", cycles, lambda n: n <= total_steps - warmup_steps, need, "pass fewer cycles")
    return _warmup(lr, warmup_steps, total_steps, end, _cosine, cycles=cycles)


def warmup_polynomial(
    lr: PerMember, warmup_steps: int, total_steps: int, power: float = 2.0, end: PerMember = 0.0
) -> Schedule:
    """A linear warmup from 0 to `lr`, then a power of the remaining share of steps; all else as in `warmup_cosine`.

        step < warmup_steps:   lr·step/warmup_steps
        else:                  end + (lr - end)·(1 - x)^power

    Examples:
        >>> warmup_polynomial(1.0, warmup_steps=2, total_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.5625, 0.2500, 0.0625, 0.0000])
    """
    check("power", power, lambda p: 0 < p < math.inf, "a finite number > 0", "1.0 gives warmup_linear")
    return _warmup(lr, warmup_steps, total_steps, end, lambda x: (1 - x) ** power)


def warmup_stable_decay(
    lr: PerMember, warmup_steps: int, total_steps: int, decay_steps: int, end: PerMember = 0.0
) -> Schedule:
    """A linear warmup from 0 to `lr`, then `lr`, and in the last `decay_steps` half a cosine down to `end` (WSD).

    Only the last part depends on the length of the training, so that a longer one begins like a shorter one.

    Args:
        lr: as in `warmup_cosine`, like everything else.
        warmup_steps: Length of the warmup.
        total_steps: The first step with the rate `end`; warmup and decay are included.
        decay_steps: Length of the decay.
        end: The last rate.

    Returns:
        A function of steps, as in `warmup_cosine`. With `end=0.0` it equals transformers' `warmup_stable_decay`.

    Raises:
        ConfigError: If an argument is out of range, or the parts are longer than the whole.

    Examples:
        >>> warmup_stable_decay(1.0, warmup_steps=2, total_steps=6, decay_steps=2)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000])

    References:
        WSD: MiniCPM, arXiv 2404.06395.
    """
    _check_steps(warmup_steps, total_steps)
    most = total_steps - warmup_steps
    need = f"an integer from 1 to total_steps - warmup_steps = {most}"
    check("decay_steps", decay_steps, lambda n: 1 <= n <= most and n == int(n), need, "a tenth of the steps is usual")
    return _warmup(lr, warmup_steps, total_steps, end, _cosine, start=total_steps - decay_steps)


def _cosine(x: Tensor) -> Tensor:
    return (1 + torch.cos(math.pi * x)) / 2


def _check_steps(warmup: int, total: int) -> None:
    check("warmup_steps", warmup, lambda n: n >= 0 and n == int(n), "an integer >= 0", "0 means no warmup")
    need = f"an integer > warmup_steps={warmup}"
    check("total_steps", total, lambda n: n > warmup and n == int(n), need, "it includes the warmup")


def _warmup(
    lr: PerMember,
    warmup: int,
    total: int,
    end: PerMember,
    decay: Callable[[Tensor], Tensor],
    *,
    start: int | None = None,
    cycles: int = 1,
) -> Schedule:
    """A linear warmup; then `decay` of the share of the steps from `start` (the end of the warmup) to `total`."""
    for name, rate in (("lr", lr), ("end", end)):
        check(name, rate, nonnegative, "a finite number >= 0", "pass the rate itself", tensor=True)
    _check_steps(warmup, total)
    first = warmup if start is None else start
    length = total - first

    def schedule(step: Tensor) -> Tensor:
        dtype = wide(torch.get_default_dtype())
        # Whole numbers: a restart must not be missed by rounding.
        taken = (step - first).clamp(0, length)
        x = torch.where(taken == length, length, taken * cycles % length).to(dtype) / length
        return torch.where(step < warmup, lr * (step.to(dtype) / max(warmup, 1)), end + (lr - end) * decay(x))

    return schedule

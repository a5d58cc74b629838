"""Adafactor: the second moment of a matrix, as the means of its rows and columns."""

from __future__ import annotations

import math
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from funclora._api.arguments import refuse
from funclora.errors import ConfigError
from funclora.optim._optimizers import check_rates, check_state, is_decayed, no_step, rate_at
from funclora.optim._transforms import GradientTransformation
from funclora.optim._trees import PyTree, tree_map, widest
from funclora.optim._values import Schedule, check, nonnegative, wide


class AdafactorState(NamedTuple):
    """State of `adafactor`: the steps taken, and the second moments by leaf.

    A leaf `[..., n, m]` has the means of its rows `[..., n]` in `rows`, and of its columns `[..., m]` in `columns`. A
    leaf with fewer dimensions has its whole moment in `rows`, and `[0]` in `columns`.
    """

    step: Tensor
    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]


def adafactor(
    lr: float | Tensor | Schedule,
    decay: float = 0.8,
    clip: float = 1.0,
    eps: float = 1e-30,
    weight_decay: float | Tensor = 0.0,
) -> GradientTransformation:
    """Adafactor without momentum: transformers' `Adafactor` with a given learning rate, as a pure function.

        t = steps taken, including this one        d = 1 - t^-decay        s = g² + eps
        R' = d·R + (1 - d)·(means of the rows of s)        C' = d·C + (1 - d)·(means of its columns)
        u = g / √(R'·C' / mean of R')        update = -lr·(u / max(1, RMS(u)/clip) + weight_decay·p)

    For a factor `[r, n]`, it keeps r + n numbers, where `adamw` keeps 2·r·n. Leaves with fewer than two dimensions keep
    their whole second moment.

    Args:
        lr: A number, a tensor `[]`, or a schedule.
        decay: Exponent of the decay of the second moment, > 0.
        clip: Largest root mean square of a leaf's `u`.
        eps: Added to the squared gradient, > 0.
        weight_decay: A number, or a tensor `[]`.

    Returns:
        The transformation; dtypes as in `adamw`. The update of a number depends on its whole leaf: train a stack of
        adapters with `per_member`.

    Raises:
        ConfigError: If an argument is out of range; in `update`, if trees differ or decay lacks `params`.

    Examples:
        >>> params, grads = {"w": torch.ones(2, 2)}, {"w": torch.tensor([[3.0, -3.0], [1.0, 1.0]])}
        >>> optimizer = adafactor(lr=0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates["w"]
        tensor([[-0.1000,  0.1000],
                [-0.1000, -0.1000]])

    References:
        arXiv 1804.04235. In transformers' words, `relative_step` and `scale_parameter` are off, as in its Trainer.
    """
    check_rates(lr, weight_decay)
    check("decay", decay, lambda x: 0 < x < math.inf, "a finite number > 0", "0.8 is usual")
    check("clip", clip, lambda x: x > 0, "a number > 0", "1.0 is usual")
    check("eps", eps, lambda x: x > 0 and nonnegative(x), "a finite number > 0", "1e-30 is usual")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, Tensor) and value.dim():
            raise ConfigError(
                f"{name}: expected one number, got {len(value)}, one for each adapter. Use per_member(adafactor, "
                f"{name}=[...]): the update of a number depends on its whole leaf."
            )

    def init(params: PyTree) -> AdafactorState:
        step = no_step(params)
        leaves: list[Tensor] = optree.tree_leaves(params)
        shapes = [_means(leaf.shape) for leaf in leaves]
        rows, columns = (
            tuple(leaf.new_zeros(shape[i], dtype=wide(leaf.dtype)) for leaf, shape in zip(leaves, shapes, strict=True))
            for i in range(2)
        )
        return AdafactorState(step, rows, columns)

    def update(grads: PyTree, state: AdafactorState, params: PyTree = None) -> tuple[PyTree, AdafactorState]:
        check_state(state, AdafactorState)
        decays, t = is_decayed(weight_decay, params), state.step + 1
        count = t.to(widest(grads))
        rate, kept = rate_at(lr, state.step, count), 1 - count**-decay
        leaves: list[Tensor] = optree.tree_leaves(grads)
        found = [(rows.shape, columns.shape) for rows, columns in zip(state.rows, state.columns, strict=True)]
        if found != [_means(leaf.shape) for leaf in leaves]:
            refuse("state", "what init, or update before, returned", state, "It belongs to other adapters.")
        moments = iter(zip(state.rows, state.columns, strict=True))

        def step(g: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows, columns = next(moments)
            g, d = g.to(rows.dtype), kept.to(rows.device, rows.dtype)
            squared = g * g + eps
            if g.dim() < 2:
                rows = d * rows + (1 - d) * squared
                direction = g * rows.rsqrt()
            else:
                rows = d * rows + (1 - d) * squared.mean(-1)
                columns = d * columns + (1 - d) * squared.mean(-2)
                shares = rows / rows.mean(-1, keepdim=True)
                direction = g * shares.rsqrt()[..., :, None] * columns.rsqrt()[..., None, :]
            rms = torch.linalg.vector_norm(direction) / max(1, direction.numel()) ** 0.5
            change = direction / (rms / clip).clamp(min=1.0)
            if decays:
                change = change + weight_decay * p.to(g.dtype)
            return (-rate * change).to(p.dtype), rows, columns

        like = grads if params is None else params
        updates, rows, columns = tree_map(step, 3, grads=grads, params=like)
        return updates, AdafactorState(t, tuple(optree.tree_leaves(rows)), tuple(optree.tree_leaves(columns)))

    return GradientTransformation(init, update)


def _means(shape: torch.Size) -> tuple[torch.Size, torch.Size]:
    """The shapes of a leaf's moments."""
    return (shape, torch.Size([0])) if len(shape) < 2 else (shape[:-1], shape[:-2] + shape[-1:])

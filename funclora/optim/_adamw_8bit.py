"""AdamW with moments of 8 bits, by bitsandbytes' kernels, which run on copies."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funclora._api.arguments import refuse
from funclora._quant.packing import library
from funclora._torch.functions import in_transform
from funclora.errors import UnsupportedError
from funclora.optim._optimizers import adamw, check_betas, check_rates, check_state, is_decayed, no_step, rate_at
from funclora.optim._transforms import GradientTransformation
from funclora.optim._trees import PyTree, tree_map
from funclora.optim._values import Schedule, check, wide

BLOCK = 256  # values with one scale, fixed in bitsandbytes' kernels
SMALLEST = 4096  # values of a leaf whose moments are quantised, as in bitsandbytes


class Moments(NamedTuple):
    """The moments of a leaf: their codes, and the scale of each block of 256."""

    mu: Tensor
    nu: Tensor
    mu_scales: Tensor
    nu_scales: Tensor


class AdamW8bitState(NamedTuple):
    """State of `adamw_8bit`: the steps taken, quantised moments of large leaves, and adamw's state of small ones."""

    step: Tensor
    quantized: tuple[Moments, ...]
    dense: Any


def adamw_8bit(
    lr: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> GradientTransformation:
    """AdamW whose moments take 8 bits: bitsandbytes' `AdamW8bit` as a pure function.

    A leaf of less than 4096 values keeps moments in float32, as in bitsandbytes. It needs `funclora[quant]`.

    Args:
        lr: A number, or a schedule.
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the denominator.
        weight_decay: A number.

    Returns:
        The transformation. Its kernels work neither in `vmap` or other transforms, nor in a compiled function.

    Raises:
        ConfigError: If an argument is out of range; in `update`, if trees differ or decay lacks `params`.
        UnsupportedError: If bitsandbytes is missing; in `update`, inside a transform.

    Examples:
        >>> params, grads = {"w": torch.ones(64, 64)}, {"w": torch.full((64, 64), 3.0)}
        >>> optimizer = adamw_8bit(lr=0.1)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates["w"][0, 0], state.quantized[0].mu.dtype
        (tensor(-0.1010), torch.uint8)

    References:
        arXiv 2110.02861.
    """
    check_rates(lr, weight_decay)
    check_betas(b1, b2)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, Tensor):
            refuse(name, "a number" + " or a schedule" * (name == "lr"), value)
    check("eps", eps, lambda x: 0 <= x < float("inf"), "a finite number >= 0", "1e-8 is usual")
    library()
    small = adamw(lr, b1, b2, eps, weight_decay)

    def init(params: PyTree) -> AdamW8bitState:
        step = no_step(params)
        large, rest = _split(optree.tree_leaves(params))
        return AdamW8bitState(step, tuple(map(_zeros, large)), small.init(rest))

    def update(grads: PyTree, state: AdamW8bitState, params: PyTree = None) -> tuple[PyTree, AdamW8bitState]:
        check_state(state, AdamW8bitState)
        if in_transform() or torch.compiler.is_compiling():
            raise UnsupportedError(
                "adamw_8bit: bitsandbytes' kernels work in no transform and in no compiled function. Use adamw there."
            )
        decays = is_decayed(weight_decay, params)
        like = grads if params is None else params
        tree_map(lambda *leaves: None, grads=grads, params=like)  # for its errors
        leaves: list[Any]
        leaves, spec = optree.tree_flatten(grads)
        given: list[Any] = spec.flatten_up_to(like)
        (large, rest), (large_params, rest_params) = _split(leaves), _split(given)
        if [moments.mu.shape for moments in state.quantized] != [leaf.shape for leaf in large]:
            refuse("state", "what init, or update before, returned", state, "It belongs to other adapters.")
        with torch.no_grad():
            t = state.step + 1
            rate = float(rate_at(lr, state.step, t.to(torch.float64)))
            made = []
            for g, p, moments in zip(large, large_params, state.quantized, strict=True):
                direction, after = _stepped(g, moments, int(t), b1, b2, eps)
                change = rate * direction
                made.append((change - rate * weight_decay * p if decays else change, after))
            updates, dense = small.update(rest, state.dense, params=rest_params)
        big, little = iter([change for change, _ in made]), iter(updates)
        merged = [next(big if _is_large(leaf) else little).to(p.dtype) for leaf, p in zip(leaves, given, strict=True)]
        return optree.tree_unflatten(spec, merged), AdamW8bitState(t, tuple(after for _, after in made), dense)

    return GradientTransformation(init, update)


def _is_large(leaf: Tensor) -> bool:
    return leaf.numel() >= SMALLEST


def _split(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [leaf for leaf in leaves if _is_large(leaf)], [leaf for leaf in leaves if not _is_large(leaf)]


def _zeros(leaf: Tensor) -> Moments:
    wide(leaf.dtype)  # for its error
    codes = [torch.zeros(leaf.shape, dtype=torch.uint8, device=leaf.device) for _ in range(2)]
    scales = [torch.zeros(-(-leaf.numel() // BLOCK), device=leaf.device) for _ in range(2)]
    return Moments(*codes, *scales)


def _stepped(g: Tensor, moments: Moments, t: int, b1: float, b2: float, eps: float) -> tuple[Tensor, Moments]:
    """The update at a rate of 1 without decay, and the new moments."""
    functional = library().functional
    maps = [functional.create_dynamic_map(signed=signed).to(g.device) for signed in (True, False)]
    after = Moments(*(part.clone() for part in moments))
    direction = torch.zeros(g.shape, device=g.device)
    functional.optimizer_update_8bit_blockwise(
        "adam", g.float().contiguous(), direction, after.mu, after.nu, b1, b2, 0.0, 0.0, eps, t, 1.0, *maps,
        after.mu_scales, after.nu_scales,
    )  # fmt: skip
    return direction, after

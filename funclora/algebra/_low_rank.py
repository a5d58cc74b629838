"""Matrices of low rank: the best factors of a given rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from funclora._torch.functions import no_autocast
from funclora._torch.linalg import svd
from funclora.algebra._terms import Term, compute_dtype, made_of, positive, rules
from funclora.errors import UnsupportedError
from funclora.rules.base import Adapters, Rule
from funclora.rules.low_rank import LowRank


def recompress(adapters: Adapters, rank: int) -> dict[str, Rule]:
    """The adapter with the best approximations of its low-rank updates by updates of at most the given rank.

    The update is the truncated singular value decomposition of s·B·A: no matrix of this rank is closer to it
    (Eckart and Young 1936). It is computed from QR decompositions of the factors, `B = Q₁R₁`, `Aᵀ = Q₂R₂`, and the
    decomposition of `s·R₁R₂ᵀ`, which is `[r, r]`: the dense update is never computed.

    The new B has the singular vectors times the singular values, the new A has orthonormal rows, the scaling is 1.
    Rules with a rank of at most `rank` and `Full` rules are not changed. `DoRA` keeps its magnitude, and W + s·B·A is
    approximated.

    Args:
        adapters: full parameter name -> rule.
        rank: the largest rank to keep. The matrix of each expert counts separately.

    Returns:
        Full parameter name -> rule, in the dtypes of the factors. The computation is in at least float32.

    Raises:
        ConfigError: `rank` is not a positive integer.
        UnsupportedError: the adapter has other rules.
        NonFiniteError: a factor contains NaN or infinity.

    Examples:
        >>> from funclora import LoRA
        >>> a, b = torch.eye(3), torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        >>> recompress({"weight": LoRA(a, b)}, rank=2)["weight"].dense(torch.zeros(3, 3)).diag()
        tensor([0., 3., 2.])
    """
    positive("rank", rank)
    found: dict[str, Rule] = {}
    for name, rule in rules("adapters", adapters).items():
        term = Term.of(1.0, rule)
        if term.low is None or term.low.r <= rank:
            found[name] = rule
            continue
        short = made_of(name, [term.low], *truncated_product(name, term.low, rank))
        if term.linear:
            found[name] = short
        elif isinstance(rule, LowRank):
            found[name] = replace(rule, a=short.a, b=short.b, scaling=1.0)
        else:
            raise UnsupportedError(
                f"adapters[{name!r}]: {type(rule).__name__} has no as_lora, and its factors are not its leaves: "
                "there is no such rule of a smaller rank. Leave the parameter out."
            )
    return found


def truncated_product(name: str, rule: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of s·B·A by at most this rank: `[*lead, k, in]` and `[*lead, out, k]`."""
    a, b = rule.layout.factors(rule.a, rule.b)
    dtype = compute_dtype(a.dtype, b.dtype)
    with no_autocast(a.device):
        q1, r1 = torch.linalg.qr(b.to(dtype))
        q2, r2 = torch.linalg.qr(a.to(dtype).mT)
        core_a, core_b = truncated(name, rule.scaling * r1 @ r2.mT, rank)
        return core_a @ q2.mT, q1 @ core_b


def truncated(name: str, matrix: Tensor, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of a matrix by at most the given rank.

    Args:
        name: of the parameter, for messages.
        matrix: `[*lead, out, in]`.
        rank: k is the minimum of it, out and in.
        clamp: clamp the factors to ± this quantile of their entries, as PEFT does. The signs of singular vectors
            are arbitrary, and the quantile depends on them.

    Returns:
        Vᵀ `[*lead, k, in]` and U·S `[*lead, out, k]`.
    """
    u, s, vh = svd(name, matrix)
    a, b = vh[..., :rank, :], u[..., :rank] * s[..., None, :rank]
    if clamp is not None:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a, b

"""The merging methods of the papers, by their own names, applied to the changes of the weights as in the papers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator

from funclora.algebra._combine import combine
from funclora.rules.base import Adapters, Params, Rule


def ties(
    adapters: Sequence[Adapters],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int | None = None,
    majority_sign_method: str = "total",
    params: Params | None = None,
) -> dict[str, Rule]:
    """TIES-merging (arXiv 2306.01708) of the changes of the weights: trim, elect a sign, add the entries with it.

    This is `combine(..., "ties_svd")`. PEFT's "ties" is another operation: it is applied to A and to B.

    Args:
        adapters: adapters of one model.
        weights: a number for each, 1 for all if None. Votes are unweighted.
        density: the share of the entries of each change that is kept; the largest are kept.
        rank: the rank of the result; the largest of the adapters if None.
        majority_sign_method: "total" elects the sign of the sum, "frequency" the sign of most entries.
        params: the base weights, needed for `Full` and `DoRA` only.

    Returns:
        Full parameter name -> rule: the best approximation of that rank.

    Raises:
        FuncloraError: as `combine`.

    Examples:
        >>> import torch
        >>> from funclora import LoRA
        >>> b = torch.tensor([[3.0], [-1.0]]), torch.tensor([[1.0], [2.0]])
        >>> adapters = [{"weight": LoRA(torch.ones(1, 1), each)} for each in b]
        >>> ties(adapters, density=1.0)["weight"].dense(torch.zeros(2, 1)).round(decimals=3)
        tensor([[2.],
                [2.]])
    """
    return combine(
        adapters,
        weights,
        "ties_svd",
        svd_rank=rank,
        density=density,
        majority_sign_method=majority_sign_method,
        params=params,
    )


def dare(
    adapters: Sequence[Adapters],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int | None = None,
    params: Params | None = None,
    generator: Generator | None = None,
) -> dict[str, Rule]:
    """DARE (arXiv 2311.03099) of the changes of the weights: drop random entries, divide by the share that is kept.

    This is `combine(..., "dare_linear_svd")`. PEFT's "dare_linear" is another operation: it is applied to A and to B.

    Args:
        adapters: adapters of one model.
        weights: a number for each, 1 for all if None.
        density: the probability that an entry is kept, 1 − p in the paper.
        rank: the rank of the result; the largest of the adapters if None.
        params: the base weights, needed for `Full` and `DoRA` only.
        generator: of the random numbers; torch's default one if None.

    Returns:
        Full parameter name -> rule: the best approximation of that rank.

    Raises:
        FuncloraError: as `combine`.

    Examples:
        >>> import torch
        >>> from funclora import LoRA
        >>> adapters = {"weight": LoRA(torch.ones(1, 6), torch.ones(1, 1))}
        >>> sparse = dare([adapters], density=0.5, generator=torch.Generator().manual_seed(0))
        >>> sparse["weight"].dense(torch.zeros(1, 6)).round(decimals=3)
        tensor([[2., 0., 2., 2., 2., 0.]])
    """
    return combine(
        adapters, weights, "dare_linear_svd", svd_rank=rank, density=density, params=params, generator=generator
    )


def magnitude_prune(
    adapters: Sequence[Adapters],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int | None = None,
    params: Params | None = None,
) -> dict[str, Rule]:
    """The weighted sum of the changes of the weights, with only the largest entries of each change.

    This is `combine(..., "magnitude_prune_svd")`. PEFT's "magnitude_prune" is another operation: it is applied to A and
    to B.

    Args:
        adapters: adapters of one model.
        weights: a number for each, 1 for all if None.
        density: the share of the entries of each change that is kept.
        rank: the rank of the result; the largest of the adapters if None.
        params: the base weights, needed for `Full` and `DoRA` only.

    Returns:
        Full parameter name -> rule: the best approximation of that rank.

    Raises:
        FuncloraError: as `combine`.

    Examples:
        >>> import torch
        >>> from funclora import LoRA
        >>> adapters = {"weight": LoRA(torch.tensor([[1.0, -4.0, 2.0, 3.0]]), torch.ones(1, 1))}
        >>> magnitude_prune([adapters], density=0.5)["weight"].dense(torch.zeros(1, 4)).round(decimals=3)
        tensor([[ 0., -4.,  0.,  3.]])
    """
    return combine(adapters, weights, "magnitude_prune_svd", svd_rank=rank, density=density, params=params)

"""Losses of embeddings: in-batch negatives, triplets, and pairs with scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora.errors import ConfigError


def in_batch(anchors: Tensor, candidates: Tensor, *, scale: float = 20.0) -> Tensor:
    """The loss of telling the positive of each anchor from those of the others (InfoNCE, arXiv 1807.03748).

    loss_i = log Σ_j exp(scale·cos(a_i, c_j)) − scale·cos(a_i, c_i), of which sentence-transformers'
    MultipleNegativesRankingLoss is the mean. `scale` is 1 / temperature.

    Args:
        anchors: `[n, dim]`.
        candidates: `[m, dim]`, m ≥ n: the positive of each anchor, in the same order, and then any further negatives.
        scale: of the cosine similarities.

    Returns:
        The losses, `[n]`.

    Raises:
        ConfigError: the shapes do not fit.

    Examples:
        >>> import torch
        >>> in_batch(torch.eye(2), torch.eye(2), scale=1.0)
        tensor([0.3133, 0.3133])
    """
    if anchors.dim() != 2 or candidates.dim() != 2 or len(candidates) < len(anchors):
        raise ConfigError(
            f"in_batch: candidates: expected [m, dim] with at least as many rows as anchors, got "
            f"{list(candidates.shape)} for anchors of {list(anchors.shape)}."
        )
    similarities = scale * F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T
    return similarities.logsumexp(1) - similarities.diagonal()


def triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, *, margin: float = 1.0) -> Tensor:
    """The loss of anchors that are not closer to their positive than to their negative by a margin.

    loss_i = max(0, ‖a_i − p_i‖ − ‖a_i − n_i‖ + margin), of which sentence-transformers' TripletLoss with Euclidean
    distances is the mean.

    Args:
        anchors: `[n, dim]`.
        positives: `[n, dim]`.
        negatives: `[n, dim]`.
        margin: in units of the embeddings.

    Returns:
        The losses, `[n]`.

    Raises:
        ConfigError: the shapes differ.

    Examples:
        >>> import torch
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> triplet(zero, zero, one), triplet(zero, one, one)
        (tensor([0.]), tensor([1.]))
    """
    _check_alike("triplet", anchors, positives, negatives)
    near, far = (F.pairwise_distance(anchors, other) for other in (positives, negatives))
    return (near - far + margin).clamp(min=0)


def cosine(first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
    """The squared difference between cosine similarities and scores.

    loss_i = (cos(u_i, v_i) − s_i)², of which sentence-transformers' CosineSimilarityLoss is the mean.

    Args:
        first: `[n, dim]`.
        second: `[n, dim]`.
        scores: `[n]`, between -1 and 1.

    Returns:
        The losses, `[n]`.

    Raises:
        ConfigError: the shapes differ.

    Examples:
        >>> import torch
        >>> cosine(torch.eye(2), torch.eye(2), torch.tensor([1.0, 0.5]))
        tensor([0.0000, 0.2500])
    """
    _check_alike("cosine", first, second)
    _check_scores("cosine", scores, first)
    return (F.cosine_similarity(first, second) - scores).square()


def cosent(first: Tensor, second: Tensor, scores: Tensor, *, scale: float = 20.0) -> Tensor:
    """The loss of pairs whose similarities are in another order than their scores (CoSENT).

    loss = log(1 + Σ exp(scale·(cos_i − cos_j))) over all i, j with s_i < s_j. Only the order of the scores matters.

    Args:
        first: `[n, dim]`.
        second: `[n, dim]`.
        scores: `[n]`, of any size.
        scale: of the cosine similarities.

    Returns:
        The loss of the batch, `[]`.

    Raises:
        ConfigError: the shapes differ.

    Examples:
        >>> import torch
        >>> one, two = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> cosent(one, two, torch.tensor([0.9, 0.1]), scale=1.0), cosent(one, two, torch.tensor([0.1, 0.9]), scale=1.0)
        (tensor(0.3133), tensor(1.3133))
    """
    _check_alike("cosent", first, second)
    _check_scores("cosent", scores, first)
    similarities = scale * F.cosine_similarity(first, second)
    wrong = similarities[:, None] - similarities[None, :]
    wrong = wrong.masked_fill(scores[:, None] >= scores[None, :], -torch.inf).flatten()
    return torch.cat([wrong.new_zeros(1), wrong]).logsumexp(0)


def _check_alike(name: str, first: Tensor, *others: Tensor) -> None:
    for other in others:
        if first.dim() != 2 or other.shape != first.shape:
            raise ConfigError(
                f"{name}: expected embeddings of one shape, [n, dim], got {list(first.shape)} and {list(other.shape)}."
            )


def _check_scores(name: str, scores: Tensor, first: Tensor) -> None:
    if scores.shape != first.shape[:1]:
        raise ConfigError(f"{name}: scores: expected one for each of {len(first)} pairs, got {list(scores.shape)}.")

"""The losses of embeddings against sentence-transformers, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer import losses as theirs
from torch import Tensor

from funclora import losses
from funclora.errors import ConfigError


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


class SameDtype(torch.nn.MSELoss):
    """For sentence-transformers, which makes scores float32 whatever the embeddings are."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target.to(input.dtype))


A, B, C, D = (some(7, 5, seed=seed) for seed in range(4))
NOTHING: Any = None  # the losses need no model
SCORES = torch.tensor([0.1, 0.9, 0.9, 0.3, -0.2, 0.5, 0.3], dtype=torch.float64)
CASES: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "in-batch": (
        lambda: losses.in_batch(A, B, scale=7.0).mean(),
        lambda: theirs.MultipleNegativesRankingLoss(NOTHING, scale=7.0).compute_loss_from_embeddings([A, B], NOTHING),
    ),
    "negatives": (
        lambda: losses.in_batch(A, torch.cat([B, C, D])).mean(),
        lambda: theirs.MultipleNegativesRankingLoss(NOTHING).compute_loss_from_embeddings([A, B, C, D], NOTHING),
    ),
    "triplet": (
        lambda: losses.triplet(A, B, C, margin=0.7).mean(),
        lambda: theirs.TripletLoss(NOTHING, triplet_margin=0.7).compute_loss_from_embeddings([A, B, C], NOTHING),
    ),
    "cosine": (
        lambda: losses.cosine(A, B, SCORES).mean(),
        lambda: theirs.CosineSimilarityLoss(NOTHING, loss_fct=SameDtype()).compute_loss_from_embeddings([A, B], SCORES),
    ),
    "cosent": (
        lambda: losses.cosent(A, B, SCORES, scale=3.0),
        lambda: theirs.CoSENTLoss(NOTHING, scale=3.0).compute_loss_from_embeddings([A, B], SCORES),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_sentence_transformers(name: str) -> None:
    ours, want = (function() for function in CASES[name])
    torch.testing.assert_close(ours, want.to(ours.dtype), rtol=1e-6, atol=1e-6)
    read = [A, B, *([C] if name in ("negatives", "triplet") else []), *([D] if name == "negatives" else [])]
    got, expected = (torch.autograd.grad(loss, read) for loss in (ours, want))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert all(grad.abs().max() > 1e-3 for grad in got)


def test_scores_count_by_their_order_only() -> None:
    torch.testing.assert_close(losses.cosent(A, B, SCORES), losses.cosent(A, B, SCORES.exp() * 10))
    assert losses.cosent(A, B, SCORES) != losses.cosent(A, B, -SCORES)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (losses.in_batch, (A, B[:3]), r"candidates: expected \[m, dim\] with at least as many rows .* got \[3, 5\]"),
        (losses.in_batch, (A[0], B), r"for anchors of \[5\]"),
        (losses.triplet, (A, B, C[:3]), r"triplet: expected embeddings of one shape, .* got \[7, 5\] and \[3, 5\]"),
        (losses.cosine, (A, B[:, :2], SCORES), r"cosine: expected embeddings of one shape"),
        (losses.cosent, (A, B[:2], SCORES), r"cosent: expected embeddings of one shape"),
        (losses.cosent, (A, B, SCORES[:2]), r"cosent: scores: expected one for each of 7 pairs, got \[2\]"),
        (losses.cosine, (A, B, SCORES[:, None]), r"cosine: scores: expected one for each of 7 pairs, got \[7, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(function: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        function(*arguments)

"""Losses of pairs of answers, and of single answers with a verdict."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from funclora._api.arguments import kind_of
from funclora.errors import ArgumentError, ConfigError


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (DPO): the chosen answer becomes likelier than the rejected one.

    With the reward r(y) = β·(log π(y|x) − log π_ref(y|x)) of an answer, the loss of a pair is

        −(1 − ε)·log σ(r(chosen) − r(rejected)) − ε·log σ(r(rejected) − r(chosen))

    Args:
        chosen: log π of the chosen answers, sums over their tokens, `[*pairs]`.
        rejected: of the rejected ones.
        reference_chosen: log π_ref of the chosen answers.
        reference_rejected: of the rejected ones.
        beta: β > 0, how dear a distance from the reference is; a number, or a tensor that broadcasts over pairs.
        label_smoothing: ε, the share of pairs whose label is taken to be wrong, from 0, below 0.5.

    Returns:
        The loss of each pair, `[*pairs]`.

    Raises:
        ConfigError: the shapes differ, or a number is out of range.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7. With ε: Mitchell 2023, "A note on DPO with noisy
        preferences", equation 3 (conservative DPO).

    Examples:
        >>> dpo(torch.tensor([-4.0]), torch.tensor([-9.0]), torch.tensor([-5.0]), torch.tensor([-6.0]), beta=0.5)
        tensor([0.1269])
    """
    _check(beta, chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing: expected a number from 0, below 0.5, got {label_smoothing}.")
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    loss = -F.logsigmoid(margin)
    return loss if not label_smoothing else (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float | Tensor = 0.1,
) -> Tensor:
    """Identity preference optimisation (IPO): the margin goes to 1/(2β) and no further.

    With h(y) = log π(y|x) − log π_ref(y|x), the loss of a pair is

        (h(chosen) − h(rejected) − 1/(2β))²

    Args:
        chosen: log π of the chosen answers, means over their tokens, `[*pairs]`. The paper does not speak of lengths;
            with sums, the margin of long answers would be reached at once. TRL takes means too.
        rejected: of the rejected ones.
        reference_chosen: log π_ref of the chosen answers.
        reference_rejected: of the rejected ones.
        beta: β > 0, the paper's τ; a number, or a tensor that broadcasts over pairs.

    Returns:
        The loss of each pair, `[*pairs]`.

    Raises:
        ConfigError: the shapes differ, or a number is out of range.

    References:
        Azar et al. 2023, arXiv 2310.12036, equation 17.

    Examples:
        >>> ipo(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([-2.0]), torch.tensor([-2.0]), beta=0.25)
        tensor([0.])
    """
    _check(beta, chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (margin - 1 / (2 * beta)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 0.1) -> Tensor:
    """Odds ratio preference optimisation (ORPO): SFT on the chosen answer, and a push from the rejected one.

    With m(y) = log π(y|x)/|y| and odds(y) = e^m(y) / (1 − e^m(y)), the loss of a pair is

        −m(chosen) − β·log σ(log odds(chosen) − log odds(rejected))

    Args:
        chosen: m of the chosen answers, log π as means over their tokens, at most 0, `[*pairs]`.
        rejected: of the rejected ones.
        beta: β > 0, the paper's λ; a number, or a tensor that broadcasts over pairs.

    Returns:
        The loss of each pair, `[*pairs]`. TRL's trainer has another first term: its mean is over all tokens of a batch,
        and not over pairs.

    Raises:
        ConfigError: the shapes differ, or a number is out of range.

    References:
        Hong et al. 2024, arXiv 2403.07691, equations 4 to 7.

    Examples:
        >>> orpo(torch.tensor([-0.5]), torch.tensor([-1.5]), beta=0.1)
        tensor([0.5171])
    """
    _check(beta, chosen, rejected=rejected)
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float | Tensor = 2.0, gamma: float | Tensor = 1.0) -> Tensor:
    """Simple preference optimisation (SimPO): without a reference, answers of all lengths alike.

    With m(y) = log π(y|x)/|y|, the loss of a pair is

        −log σ(β·m(chosen) − β·m(rejected) − γ)

    Args:
        chosen: m of the chosen answers, log π as means over their tokens, `[*pairs]`.
        rejected: of the rejected ones.
        beta: β > 0; a number, or a tensor that broadcasts over pairs.
        gamma: γ ≥ 0, the margin that is asked for.

    Returns:
        The loss of each pair, `[*pairs]`.

    Raises:
        ConfigError: the shapes differ, or a number is out of range.

    References:
        Meng et al. 2024, arXiv 2405.14734, equation 6.

    Examples:
        >>> simpo(torch.tensor([-0.5]), torch.tensor([-1.5]), beta=2.0, gamma=1.0)
        tensor([0.3133])
    """
    _check(beta, chosen, rejected=rejected)
    if not isinstance(gamma, Tensor) and not 0 <= gamma < math.inf:
        raise ConfigError(f"gamma: expected a number from 0, got {gamma}.")
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(
    answers: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float | Tensor = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (KTO): single answers, each called desirable or not.

    With h(y) = log π(y|x) − log π_ref(y|x) and z = max(kl, 0), the loss of an answer is

        λ_D·(1 − σ(β·(h − z)))    if it is desirable
        λ_U·(1 − σ(β·(z − h)))    if not

    Args:
        answers: log π of the answers, sums over their tokens, `[*answers]`.
        reference: log π_ref of them.
        desirable: true for the desirable ones, bool `[*answers]`.
        kl: an estimate of KL(π‖π_ref), a scalar: the mean of log π − log π_ref over answers of other prompts. It is a
            constant: no gradient passes it.
        beta: β > 0; a number, or a tensor that broadcasts over answers.
        desirable_weight: λ_D ≥ 0.
        undesirable_weight: λ_U ≥ 0. λ_D times the number of desirable answers should be 1 to 4/3 of λ_U times that of
            the others.

    Returns:
        The loss of each answer, `[*answers]`.

    Raises:
        ConfigError: the shapes differ, or a number is out of range.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equation 8; the estimate of KL is the one of its section 4.1.

    Examples:
        >>> kto(torch.tensor([-4.0, -4.0]), torch.tensor([-5.0, -5.0]), torch.tensor([True, False]), 0.5, beta=1.0)
        tensor([0.3775, 0.6225])
    """
    _check(beta, answers, reference=reference, desirable=desirable)
    if desirable.dtype != torch.bool:
        raise ArgumentError(f"desirable: expected a tensor of true and false, got {desirable.dtype}.")
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: expected a number from 0, got {value}.")
    z = torch.as_tensor(kl, dtype=answers.dtype, device=answers.device).detach().clamp(min=0)
    gain = beta * (answers - reference - z)
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )  # 1 − σ(x) = σ(−x)


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p, exactly where p is near 0 or near 1."""
    below = mean.clamp(max=-torch.finfo(mean.dtype).tiny)  # p = 1 has no odds
    near_one = below > -math.log(2)
    # Each branch gets what is harmless for it, or its gradient would be NaN where the other one is taken.
    rest = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, below, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, below))),
    )
    return mean - rest


def _check(beta: float | Tensor, first: Tensor, **others: Tensor) -> None:
    """Check β, and that all log-probabilities have one shape."""
    if not isinstance(beta, Tensor) and not 0 < beta < math.inf:
        raise ConfigError(f"beta: expected a number above 0, got {beta}.")
    for name, value in others.items():
        if not (isinstance(first, Tensor) and isinstance(value, Tensor)):
            raise ArgumentError(
                f"{name}: expected log-probabilities as tensors of one shape, got {kind_of(value)} with "
                f"{kind_of(first)}."
            )
        if value.shape != first.shape:
            raise ConfigError(
                f"{name}: expected the shape of the others, {list(first.shape)}, got {list(value.shape)}: one "
                "log-probability for each pair, or for each answer."
            )

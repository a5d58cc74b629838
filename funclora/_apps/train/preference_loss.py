"""A frozen model that is trained to prefer answers: losses, rewards and the reference, which is the model itself."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora import losses
from funclora._apps.train.base import Base, Batch, takes
from funclora._apps.train.rows import IGNORED
from funclora._apps.train.settings import Settings
from funclora._apps.train.step import autocast
from funclora._apps.train.tokenizer import ByteTokenizer
from funclora._bind.apply import bind
from funclora.rules.base import Adapters

FREE = ("orpo", "simpo")  # losses that have no reference
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")  # as TRL calls them
# The divergence on the answers of the data; and as TRL calls it, the estimate that KTO's loss uses.
KL, KTO_KL = "kl_per_token", "kl"


def beta_of(settings: Settings) -> float:
    """β, if it is given or not.

    Examples:
        >>> beta_of(Settings()), beta_of(Settings(loss="simpo"))
        (0.1, 2.0)
    """
    if settings.beta is not None:
        return settings.beta
    return 2.0 if settings.loss == "simpo" else 0.1


@dataclass(frozen=True, eq=False)
class PreferenceBase(Base):
    """A base whose losses are those of preferences.

    The reference costs no second model: its adapter is bound to the same weights. It has a pass of its own, without
    gradients: as more rows of the policy's batch, the backward pass would run over them too.

    Attributes:
        settings: of the run.
        reference: the adapter of the reference; `{}` is the base.
    """

    settings: Settings = field(default_factory=Settings)
    reference: Adapters = field(default_factory=dict)

    @property
    def constants(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights, and the adapter of the reference."""
        tree: Any = dict(self.reference)
        leaves = {str(i): leaf for i, leaf in enumerate(optree.tree_leaves(tree))}
        return {**super().constants, "reference": leaves}

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of what `watch` gives besides the loss."""
        loss = self.settings.loss
        return (*REWARDS, *((KL,) if loss not in FREE else ()), *((KTO_KL,) if loss == "kto" else ()))

    @functools.cached_property
    def _reference(self) -> nn.Module:
        return bind(self.model, self.params, self.reference)

    def prepared(self, batch: Batch) -> Batch:
        """The batch with the reference's log-probability of each token, `[batch, 2, seq]`, if the loss has one.

        It has no more of an answer than the model can read.
        """
        batch = self._limited(batch)
        if self.settings.loss in FREE:
            return batch
        with torch.no_grad(), autocast(self.settings, self.device):
            return {**batch, "reference": self._log_probs(self._reference, batch)}

    def count(self, batch: Batch) -> int:
        """The number of pairs, or of single answers."""
        return int(batch["pairs"].sum()) if "pairs" in batch else len(batch["input_ids"])

    def loss(self, bound: Any, batch: Batch) -> Tensor:
        """The SUM of the losses of pairs or answers."""
        return self.watch(bound, batch)[0]

    def watch(self, bound: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses; and what is watched, each as a sum and the number of values in it, `[2]`."""
        beta = batch["beta"][0] if "beta" in batch else beta_of(self.settings)
        values, found = judged(self.settings, beta, **self._answers(self._policy(bound, batch), batch))
        return values.sum(), found

    def score(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """As `watch`, in one dict, without gradients."""
        with torch.no_grad():
            loss, found = self.watch(bound, batch)
        return {"loss": loss, **found}

    def by_row(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """What `judge` needs of each pair or answer, `[batch]` and `[batch, 2]`."""
        batch = self.prepared(batch)
        return self._answers(self._log_probs(bound, batch), batch)

    def judge(self, rows: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The mean loss and the means of what is watched, for rows of `by_row`."""
        values, found = judged(self.settings, beta_of(self.settings), **rows)
        return float(values.mean()), {name: float(x[0] / x[1]) for name, x in found.items() if x[1]}

    def _limited(self, batch: Batch) -> Batch:
        if self.limit is None:
            return batch
        if "position_ids" not in batch:
            return {**batch, **{name: batch[name][..., : self.limit] for name in _READ if name in batch}}
        at = batch["position_ids"]
        labels = batch["labels"].masked_fill(at >= self.limit, IGNORED)
        return {**batch, "labels": labels, "position_ids": at.clamp(max=self.limit - 1)}

    def _policy(self, bound: Any, batch: Batch) -> Tensor:
        """The log-probabilities of tokens; without gradients where KTO only estimates the divergence."""
        if "desirable" not in batch:
            return self._log_probs(bound, batch)
        own, other = ({name: batch[name][:, k : k + 1] for name in _READ if name in batch} for k in (0, 1))
        with torch.no_grad():
            elsewhere = self._log_probs(bound, other)
        return torch.cat([self._log_probs(bound, own), elsewhere], 1)

    def _log_probs(self, bound: Any, batch: Batch) -> Tensor:
        """The log-probability of each token of the answers, and 0 elsewhere: `[batch, 1 or 2, seq]`."""
        rows = batch["input_ids"].shape[:2]
        given = {name: batch[name].flatten(0, 1).to(self.device) for name in _READ if name in batch}
        labels = given.pop("labels")
        # Processes that share the output layer must use it equally often: once, however many labels they have.
        at_once: dict[str, int] = {"at_once": sys.maxsize} if self.settings.shard else {}
        if isinstance(self.tokenizer, ByteTokenizer):
            found = losses.token_log_probs(bound, given["input_ids"], labels, **at_once)
        else:
            more = {"use_cache": False} if takes(type(self.model).forward, "use_cache") else {}
            found = losses.token_log_probs(bound, {**given, **more}, labels, **at_once)
        return found.view(*rows, -1)

    def _answers(self, policy: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What `judged` needs besides the settings.

        Args:
            policy: the log-probability of each token, `[batch, 2, seq]`.
            batch: from `prepared`.
        """
        lengths = F.pad((batch["labels"][..., 1:] != IGNORED).to(policy.dtype), (1, 0))
        by_token = {"policy": policy, "lengths": lengths}
        if "reference" in batch:
            reference = batch["reference"]
            by_token |= {"reference": reference, "squares": (policy.detach() - reference).square() / 2}
        found = {name: _by_answer(x, batch) for name, x in by_token.items()}
        return found | {name: batch[name].flatten() for name in ("pairs", "desirable") if name in batch}


_READ = ("input_ids", "labels", "attention_mask", "position_ids")


def _by_answer(x: Tensor, batch: Batch) -> Tensor:
    """The sums over the tokens of each answer.

    Args:
        x: `[batch, 2, seq]`, 0 for tokens that do not count.
        batch: `[batch]` pairs, or rows with up to `most` of them.

    Returns:
        `[batch, 2]`, or `[batch·most, 2]` with zeros for the answers that are not there.
    """
    if "pairs" not in batch:
        return x.sum(-1)
    number = (batch["position_ids"] == 0).cumsum(-1) - 1
    own = number[..., None] == torch.arange(batch["pairs"].shape[-1], device=x.device)
    return (x[..., None] * own).sum(-2).transpose(1, 2).flatten(0, 1)


def judged(
    settings: Settings,
    beta: float | Tensor,
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor | None = None,
    squares: Tensor | None = None,
    desirable: Tensor | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of pairs or answers, and their rewards.

    Besides TRL's rewards there is `kl_per_token` for losses with a reference: the mean of (log π − log π_ref)²/2 over
    the tokens of the answers. Where policy or reference would say them, that is KL(π‖π_ref) for each token, up to
    higher orders of the difference (Schulman 2020, "Approximating KL divergence", the estimator k2). It is not TRL's
    `kl`, which for KTO is the estimate in its loss, here of that name too, and for GRPO is of sampled answers.

    Args:
        settings: `loss` and its options.
        beta: the loss's.
        policy: log π, sums over tokens: of the chosen and the rejected answer; or of an answer and of one to another
            prompt, `[n, 2]`.
        lengths: the numbers of tokens, of the same.
        reference: log π_ref, of the same.
        squares: half the squares of log π − log π_ref, sums over tokens, of the same.
        desirable: `[n]`, for single answers.
        pairs: which of them there are, `[n]`; all without. The others count nowhere.

    Returns:
        `[n]`, and by name the sum of what is watched and the number of values in it, `[2]`.
    """
    there = torch.ones_like(policy[:, 0]) if pairs is None else pairs.to(policy.dtype)
    if desirable is not None:
        assert reference is not None
        values, watched = _of_answers(settings, beta, policy, lengths, reference, desirable, there)
    else:
        values, watched = _of_pairs(settings, beta, policy, lengths.clamp(min=1), reference, there)
    if squares is not None:
        columns = slice(1) if desirable is not None else slice(None)
        watched[KL] = torch.stack([squares[:, columns].sum(), lengths[:, columns].sum()])
    return values * there, watched


def _of_pairs(
    settings: Settings,
    beta: float | Tensor,
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    there: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    if reference is None:
        policy = policy / lengths
        more: dict[str, Any] = {"gamma": settings.gamma} if settings.loss == "simpo" else {}
        function: Callable[..., Tensor] = losses.orpo if settings.loss == "orpo" else losses.simpo
        values = function(*policy.unbind(1), beta=beta, **more)
        rewards = beta * policy.detach()
    else:
        if settings.loss == "ipo":
            values = losses.ipo(*(policy / lengths).unbind(1), *(reference / lengths).unbind(1), beta=beta)
        else:
            smoothing = settings.label_smoothing
            values = losses.dpo(*policy.unbind(1), *reference.unbind(1), beta=beta, label_smoothing=smoothing)
        rewards = beta * (policy.detach() - reference)
    good, bad = rewards.unbind(1)
    by_pair = (good, bad, good - bad, (good > bad).to(good.dtype))
    return values, {
        name: torch.stack([(x * there).sum(), there.sum()]) for name, x in zip(REWARDS, by_pair, strict=True)
    }


def _of_answers(
    settings: Settings,
    beta: float | Tensor,
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor,
    desirable: Tensor,
    there: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    apart = (policy - reference).detach()
    elsewhere = (lengths[:, 1] > 0).to(apart.dtype) * there  # an answer that is alone has no other prompt
    kl = ((apart[:, 1] * elsewhere).sum() / elsewhere.sum().clamp(min=1)).clamp(min=0)
    values = losses.kto(
        policy[:, 0],
        reference[:, 0],
        desirable,
        kl,
        beta=beta,
        desirable_weight=settings.desirable,
        undesirable_weight=settings.undesirable,
    )
    rewards = beta * apart[:, 0]
    good, bad = (
        torch.stack([(rewards * which).sum(), which.sum()]) for which in (desirable * there, ~desirable * there)
    )
    both = (good[1] * bad[1] > 0).to(rewards.dtype)
    margin = (good[0] / good[1].clamp(min=1) - bad[0] / bad[1].clamp(min=1)) * both
    right = ((rewards > 0) == desirable) * there
    means = (good, bad, torch.stack([margin, both]), torch.stack([right.sum(), there.sum()]))
    return values, dict(zip(REWARDS, means, strict=True)) | {KTO_KL: torch.stack([kl, torch.ones_like(kl)])}

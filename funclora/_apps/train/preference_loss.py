"""A frozen model that is trained to prefer answers: losses, rewards and the reference, which is the model itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
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
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")  # as TRL calls them


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

    The reference costs no second model: its adapter is bound to the same weights, and it runs without gradients.

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
        return REWARDS if self.settings.loss == "kto" else REWARDS[:-1]

    @functools.cached_property
    def _reference(self) -> nn.Module:
        return bind(self.model, self.params, self.reference)

    def prepared(self, batch: Batch) -> Batch:
        """The batch with the log-probabilities of the reference, `[batch, 2]`, if the loss has one."""
        if self.settings.loss in FREE:
            return batch
        with torch.no_grad(), autocast(self.settings, self.device):
            return {**batch, "reference": self._answers(self._reference, batch)}

    def count(self, batch: Batch) -> int:
        """The number of pairs, or of single answers."""
        return len(batch["input_ids"])

    def loss(self, bound: Any, batch: Batch) -> Tensor:
        """The SUM of the losses of pairs or answers."""
        return self.watch(bound, batch)[0]

    def watch(self, bound: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses; and what is watched, each as a sum and the number of values in it, `[2]`."""
        values, found = self._judged(self._policy(bound, batch), batch)
        return values.sum(), found

    def score(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """As `watch`, in one dict, without gradients."""
        with torch.no_grad():
            loss, found = self.watch(bound, batch)
        return {"loss": loss, **found}

    def by_row(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """The log-probabilities of each pair or answer, `[batch, 2]`, and of what `judge` needs with them."""
        batch = self.prepared(batch)
        given = {name: batch[name] for name in ("reference", "desirable") if name in batch}
        return {"policy": self._answers(bound, batch), "lengths": _lengths(batch), **given}

    def judge(self, rows: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The mean loss and the means of what is watched, for rows of `by_row`."""
        values, found = judged(self.settings, beta_of(self.settings), **rows)
        return float(values.mean()), {name: float(x[0] / x[1]) for name, x in found.items() if x[1]}

    def _policy(self, bound: Any, batch: Batch) -> Tensor:
        if "desirable" not in batch or batch["input_ids"].shape[1] == 1:
            return self._answers(bound, batch)
        names = ("input_ids", "labels", "attention_mask")
        own, other = ({name: batch[name][:, k : k + 1] for name in names} for k in (0, 1))
        with torch.no_grad():
            elsewhere = self._answers(bound, other)
        return torch.cat([self._answers(bound, own), elsewhere], 1)

    def _judged(self, policy: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: batch[name] for name in ("reference", "desirable") if name in batch}
        beta = batch["beta"][0] if "beta" in batch else beta_of(self.settings)
        return judged(self.settings, beta, policy=policy, lengths=_lengths(batch), **given)

    def _answers(self, bound: Any, batch: Batch) -> Tensor:
        """The log-probability of each answer, a sum over its tokens: `[batch, 1 or 2]`."""
        rows = batch["input_ids"].shape[:2]
        given = {name: batch[name].flatten(0, 1).to(self.device)[:, : self.limit] for name in _READ}
        labels = given.pop("labels")
        if isinstance(self.tokenizer, ByteTokenizer):
            found = losses.token_log_probs(bound, given["input_ids"], labels)
        else:
            more = {"use_cache": False} if takes(type(self.model).forward, "use_cache") else {}
            found = losses.token_log_probs(bound, {**given, **more}, labels)
        return found.sum(1).view(rows)


_READ = ("input_ids", "labels", "attention_mask")


def judged(
    settings: Settings,
    beta: float | Tensor,
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor | None = None,
    desirable: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of pairs or answers, and their rewards.

    Args:
        settings: `loss` and its options.
        beta: the loss's.
        policy: log π, sums over tokens: of the chosen and the rejected answer, `[n, 2]`; or of an answer and of one to
            another prompt, `[n, 2]` or `[n, 1]`.
        lengths: the numbers of tokens.
        reference: log π_ref, of the same.
        desirable: `[n]`, for single answers.

    Returns:
        `[n]`, and by name the sum of what is watched and the number of values in it, `[2]`.
    """
    if desirable is not None:
        assert reference is not None
        return _of_answers(settings, beta, policy, reference, desirable)
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
    watched = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/margins": good - bad,
        "rewards/accuracies": (good > bad).to(good.dtype),
    }
    return values, {name: torch.stack([x.sum(), torch.ones_like(x).sum()]) for name, x in watched.items()}


def _of_answers(
    settings: Settings, beta: float | Tensor, policy: Tensor, reference: Tensor, desirable: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    apart = (policy - reference).detach()
    kl = apart[:, 1].mean().clamp(min=0) if apart.shape[1] > 1 else apart.new_zeros(())
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
        torch.stack([(rewards * which).sum(), which.sum().to(rewards.dtype)]) for which in (desirable, ~desirable)
    )
    both = (good[1] * bad[1] > 0).to(rewards.dtype)
    margin = (good[0] / good[1].clamp(min=1) - bad[0] / bad[1].clamp(min=1)) * both
    right = ((rewards > 0) == desirable).to(rewards.dtype)
    return values, {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/margins": torch.stack([margin, both]),
        "rewards/accuracies": torch.stack([right.sum(), torch.ones_like(right).sum()]),
        "kl": torch.stack([kl, torch.ones_like(kl)]),
    }


def _lengths(batch: Batch) -> Tensor:
    """The number of tokens of each answer, `[batch, 2]`."""
    return (batch["labels"][..., 1:] != IGNORED).sum(-1)

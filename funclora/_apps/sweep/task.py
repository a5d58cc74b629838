"""The task of a search: a run of `funclora train` whose options differ by member."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funclora._apps.sweep.space import Member
from funclora._apps.train.adapters import Start, begin
from funclora._apps.train.base import Base
from funclora._apps.train.batches import Batches, collate
from funclora._apps.train.checkpoint import fingerprint
from funclora._apps.train.examples import Data
from funclora._apps.train.folder import load_model
from funclora._apps.train.optimizer import Vectors, joins, optimizer, total_steps
from funclora._apps.train.packing import Packed, is_packed
from funclora._apps.train.preference_loss import beta_of
from funclora._apps.train.reference import START, WORDS, load_reference, preferring
from funclora._apps.train.rows import Example
from funclora._apps.train.scores import Score, scores
from funclora._apps.train.settings import PREFERENCE, SEQ2SEQ, Settings
from funclora._apps.train.setup import load
from funclora._apps.train.step import autocast, moved, step_seed, training_model
from funclora._bind.params import base_params
from funclora.errors import ConfigError
from funclora.optim import GradientTransformation
from funclora.rules.base import Adapters, Rule


@dataclass(frozen=True, eq=False)
class Task:
    """What all members train on, and with.

    Attributes:
        base: the frozen model, never changed.
        data: the training and validation data.
        settings: of the run; `member_settings` has them with a member's options.
        heldout: the examples of an evaluation.
    """

    base: Base
    data: Data
    settings: Settings
    heldout: Sequence[Example]

    @property
    def name(self) -> str:
        """For messages."""
        return ", ".join([*(file.name for file in self.settings.data), self.base.name])

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.base.device

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model in training mode."""
        return training_model(self.base, self.settings)

    @functools.cached_property
    def steps(self) -> int:
        """The steps of a member that is never dropped."""
        return total_steps(self.settings, self._batches(self.settings.seed).steps_per_epoch)

    @functools.cached_property
    def _by_seed(self) -> dict[int, Batches]:
        return {}

    def _batches(self, seed: int) -> Batches:
        if seed not in self._by_seed:
            settings = self.settings
            rows = settings.batch * settings.accumulation  # of a step; how much fits is the population's question
            own = replace(settings, seed=seed, batch=rows, accumulation=1)
            self._by_seed[seed] = Batches.of(own, self.data.train, self.base.tokenizer.pad_token_id, self.data.shares)
        return self._by_seed[seed]

    def batch(self, seeds: Sequence[int], step: int, betas: Sequence[float | None] = ()) -> dict[str, Tensor]:
        """The rows of a step for members with these seeds: those that training has.

        Args:
            seeds: the members'.
            step: which.
            betas: of preferences, the members'; those of the settings if None.

        Returns:
            As from `collate`, `[n_members, n_rows, *]`, and `scale`, 1 / the number of the member's labels.
        """
        rows = [row for seed in seeds for row in self._batches(seed).rows(step)]
        pad, task = self.base.tokenizer.pad_token_id, self.base.task
        context, group = self.settings.context, len(rows) // len(seeds)
        batch = collate(rows, pad=pad, task=task, packed=is_packed(self.data.train, task), context=context, group=group)
        batch = dict(self.base.prepared(moved(batch, self.device)))
        if task == SEQ2SEQ:
            batch["decoder_input_ids"] = self.base.decoder_ids(batch["labels"])
        batch = {key: x.unflatten(0, (len(seeds), -1)) for key, x in batch.items()}
        labels = [self.base.count({key: x[i] for key, x in batch.items()}) for i in range(len(seeds))]
        if not all(labels):
            sources = ", ".join(self._batches(seeds[labels.index(0)]).sources(step)[:8])
            raise ConfigError(f"data: no position of step {step + 1} has a label. Its examples: {sources}.")
        n_rows = batch["input_ids"].shape[1]
        batch["scale"] = (1 / torch.tensor(labels, dtype=torch.float32))[:, None].expand(-1, n_rows).contiguous()
        if any(beta is not None for beta in betas):
            own = torch.tensor([beta_of(self.settings) if beta is None else beta for beta in betas])
            batch["beta"] = own[:, None].expand(-1, n_rows).contiguous()
        return dict(moved(batch, self.device))

    def loss(self, bound: Any, batch: dict[str, Tensor]) -> Tensor:
        """The training loss of one member, in nats for each label."""
        rest = {key: x for key, x in batch.items() if key != "scale"}
        with autocast(self.settings, self.device):
            return self.base.loss(bound, rest) * batch["scale"][0]

    def seeds(self, members: Sequence[Member], step: int) -> list[int]:
        """The seeds of the members' dropout in a step."""
        return [step_seed(member.seed, step) for member in members]

    def optimizer(self) -> Callable[..., GradientTransformation]:
        """`lr -> optimizer` of one member."""
        joined = joins(self.settings)
        return lambda lr: _on_vectors(optimizer(replace(self.settings, lr=lr), self.steps), joined=joined)

    def scores(self, members: Sequence[Adapters]) -> list[Score]:
        """The members' scores on the held-out examples."""
        return scores(self.base, members, self.heldout)

    def start(self, member: Member) -> Start:
        """What a member starts from.

        Raises:
            ConfigError: it is not what the base says, which is the reference of all members.
        """
        if self.settings.task == PREFERENCE and (member.init, self.settings.reference) == ("false", START):
            raise ConfigError(
                "init: with false each member starts from another adapter, and all have the same reference. Set "
                "--reference to base, or leave false out."
            )
        return begin(self._base_of(member.seed), self.member_settings(member))

    def member_settings(self, member: Member) -> Settings:
        """The settings of a run that trains a member alone."""
        return replace(
            self.settings,
            lr=member.lr,
            rank=member.rank,
            alpha=member.alpha,
            targets=tuple(member.targets.split("+")),
            method=member.method,
            init=member.init,
            dropout=member.dropout,
            beta=member.beta,
            seed=member.seed,
        )

    @functools.cached_property
    def _heads(self) -> dict[int, dict[str, Tensor]]:
        return {}

    def _base_of(self, seed: int) -> Base:
        """The base with the new head of a seed, which is where its training starts."""
        base, settings = self.base, self.settings
        if seed == settings.seed or not base.new or settings.model is None:
            return base
        if seed not in self._heads:
            model, _ = load_model(
                settings.model, settings.task, dtype=settings.dtype, classes=base.classes, problem=base.problem,
                seed=seed,
            )  # fmt: skip
            inside = tuple(f"{module}." for module in base.new)
            params = base_params(model)
            self._heads[seed] = {name: x.to(base.device) for name, x in params.items() if name.startswith(inside)}
        return replace(base, params={**base.params, **self._heads[seed]})

    def digests(self) -> dict[str, str]:
        """Digests of the data and the base, to detect that one was exchanged."""
        return {"data": self.data.digest(), "base": fingerprint(self.base.params)}


def load_task(settings: Settings, folder: Path, rows: int | None = None) -> Task:
    """Load the data and the base of a search.

    Args:
        settings: of the run, with the seed that decides which part of the data is held out.
        folder: where the demo's data is written, for a search without data.
        rows: maximum number of examples of an evaluation, spread over the held-out ones; None for all.

    Raises:
        FuncloraError: as for a run; or nothing is held out.
    """
    settings, data, base = load(settings, folder)
    heldout = data.validation
    if settings.task == PREFERENCE and isinstance(heldout, Packed):
        heldout = heldout.examples  # each has scores of its own
    if not heldout:
        raise ConfigError(
            "validation: nothing is held out, so members cannot be compared. Give --validation, or a larger "
            "--validation-split."
        )
    if rows is not None and len(heldout) > rows:
        heldout = [heldout[i] for i in torch.linspace(0, len(heldout) - 1, rows).round().long().tolist()]
    if settings.task == PREFERENCE:
        reference = {} if settings.reference in WORDS else load_reference(base, settings)
        base = preferring(base, reference, settings)
    return Task(base, data, settings, heldout)


def _on_vectors(inner: GradientTransformation, *, joined: bool) -> GradientTransformation:
    """A run's optimizer, on adapters instead of on `Vectors`."""

    def init(params: dict[str, Rule]) -> Any:
        return inner.init(Vectors(params, joined=joined).of(params))

    def update(grads: dict[str, Rule], state: Any, params: Any = None) -> tuple[Any, Any]:
        vectors = Vectors(grads, joined=joined)
        updates, state = inner.update(vectors.of(grads), state, params=None if params is None else vectors.of(params))
        return vectors.tree(updates), state

    return GradientTransformation(init, update)

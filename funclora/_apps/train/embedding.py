"""A frozen model that is trained to embed texts: pooling, the losses of a batch, and how good embeddings are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from funclora import losses
from funclora._apps.train.base import Base, Batch, takes
from funclora._apps.train.embedding_rows import inputs
from funclora._apps.train.metrics import pearson, spearman
from funclora._apps.train.settings import AUTO, COSENT, COSINE, IN_BATCH, LAST, MEAN, TRIPLET, Settings
from funclora._apps.train.tokenizer import load_config
from funclora._train.step import micro_seed, seeded
from funclora.distributed._mean import rows_of_all
from funclora.distributed._ranks import part_of, parts_of
from funclora.errors import ConfigError
from funclora.io.hf.sentence import Pooling, read_pooling

USUAL = Pooling(MEAN, normalize=True)
RECALLS = (1, 10)  # how many of the nearest candidates are looked at
PART = 1024  # anchors that are compared with all candidates at a time


@dataclass(frozen=True, eq=False)
class EmbeddingBase(Base):
    """A base whose losses are those of embeddings.

    Attributes:
        settings: of the run.
        pooling: how an embedding is made of the tokens of a text.
    """

    settings: Settings = field(default_factory=Settings)
    pooling: Pooling = USUAL

    def count(self, batch: Batch) -> int:
        """The number of rows."""
        return len(batch["input_ids"])

    def loss(self, bound: Any, batch: Batch) -> Tensor:
        """The mean loss of the rows of a batch, times their number."""
        embeddings = self._shared(bound, batch) if self.together else torch.stack(self.embedded(bound, batch), 1)
        return loss_of(self.settings, embeddings, batch.get("labels")).mean() * len(embeddings)

    def by_row(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """The embeddings of each row, `[batch, texts, dim]`, and their scores if they have some, `[batch]`."""
        scores = {"scores": batch["labels"]} if "labels" in batch else {}
        return {"embeddings": torch.stack(self.embedded(bound, batch), 1), **scores}

    def judge(self, rows: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
        """The loss of all rows as one batch, and how good the embeddings are.

        For scored pairs that is Spearman's and Pearson's correlation of cosine similarities and scores; otherwise the
        share of anchors whose positive is among the nearest of all candidates. Candidates that are as near as the
        positive do not count.

        Args:
            rows: from `by_row`.
        """
        embeddings, scores = rows["embeddings"].float().cpu(), rows.get("scores")
        scores = None if scores is None else scores.cpu()
        if scores is not None:
            said = F.cosine_similarity(embeddings[:, 0], embeddings[:, 1]).tolist()
            found = {"spearman": spearman(scores.tolist(), said), "pearson": pearson(scores.tolist(), said)}
            return float(loss_of(self.settings, embeddings, scores).mean()), found
        anchors, candidates = _normal(embeddings[:, 0]), _normal(embeddings[:, 1:].transpose(0, 1).flatten(0, 1))
        nats, places = [], []
        for start in range(0, len(anchors), PART):
            similar = anchors[start : start + PART] @ candidates.T
            own = similar.diagonal(start)[:, None]
            nats.append((self.settings.scale * similar).logsumexp(1) - self.settings.scale * own[:, 0])
            places.append((similar > own).sum(1))
        place = torch.cat(places)
        recalls = {f"recall_at_{k}": float((place < k).double().mean()) for k in RECALLS if k < len(candidates)}
        triplets = self.settings.objective == TRIPLET
        loss = loss_of(self.settings, embeddings, None) if triplets else torch.cat(nats)
        return float(loss.mean()), recalls

    def embedded(self, bound: Any, batch: Batch) -> list[Tensor]:
        """The embeddings of the first texts of a batch, of the second ones, and so on, each `[batch, dim]`.

        With `settings.chunk`, only so many texts are computed at a time, and what their gradient needs is computed
        again in the backward pass (GradCache, arXiv 2101.06983), with the same dropout.
        """
        if not self.settings.chunk:
            return [self.embed(bound, *some) for some in inputs(batch)]
        parts = [self._part(bound, batch, *part) for part in self._parts(batch)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def _shared(self, bound: Any, batch: Batch) -> Tensor:
        """The embeddings of all rows, `[batch, texts, dim]`, of which this process computes some parts.

        All processes compute equally often, since one may hold weights that others wait for.
        """
        parts = self._parts(batch)
        own, most = part_of(len(parts)), max(map(len, parts_of(len(parts))))
        found = [torch.stack(self._part(bound, batch, *parts[i]), 1) for i in own]
        found += [torch.stack(self._part(bound, batch, *parts[0]), 1)[:0] for _ in range(most - len(own))]
        return rows_of_all(torch.cat(found), parts[own.start][0].start if own else 0, len(batch["input_ids"]))

    def _parts(self, batch: Batch) -> list[tuple[slice, int]]:
        """The rows of each part, and the seed of its dropout, whichever process computes it."""
        n = len(batch["input_ids"])
        starts = range(0, n, self.settings.chunk or n)
        seed = torch.initial_seed()  # of the step
        return [(slice(start, start + starts.step), micro_seed(seed, i)) for i, start in enumerate(starts)]

    def _part(self, bound: Any, batch: Batch, rows: slice, seed: int) -> list[Tensor]:
        """The embeddings of some rows, computed again in the backward pass."""
        embed = functools.partial(self.embed, bound)
        with seeded(seed, self.params):
            parts = [(ids[rows], mask[rows]) for ids, mask in inputs(batch)]
            if not torch.is_grad_enabled():
                return [embed(*part) for part in parts]
            return [checkpoint(embed, *part, use_reentrant=False) for part in parts]

    def embed(self, bound: Any, ids: Tensor, mask: Tensor) -> Tensor:
        """The embeddings of texts, `[batch, dim]`.

        Args:
            bound: as for `loss`.
            ids: `[batch, seq]`, padded on the right.
            mask: 1 for tokens, 0 for padding.
        """
        given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        more = {"use_cache": False} if takes(type(self.model).forward, "use_cache") else {}
        hidden = bound(**given, **more).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weights = token_weights(given["attention_mask"], self.pooling.tokens).to(hidden.dtype)
        pooled = (hidden * weights[..., None]).sum(1)
        return _normal(pooled) if self.pooling.normalize else pooled


def token_weights(mask: Tensor, tokens: str) -> Tensor:
    """The weight of each token in the embedding of its text, `[batch, seq]`.

    Args:
        mask: 1 for tokens, 0 for padding on the right, `[batch, seq]`.
        tokens: one of `settings.POOLINGS`.

    Examples:
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> [token_weights(mask, tokens).tolist()[0] for tokens in ("mean", "first", "last")]
        [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    there = mask.float()
    if tokens == MEAN:
        return there / there.sum(1, keepdim=True).clamp(min=1)
    if tokens == LAST:
        return there - F.pad(there, (0, 1))[:, 1:]
    return there * (torch.arange(mask.shape[1], device=mask.device) == 0)


def loss_of(settings: Settings, embeddings: Tensor, scores: Tensor | None) -> Tensor:
    """The losses of a batch: of each row, `[batch]`, or of all together, `[]`.

    Args:
        settings: `objective`, `scale` and `margin` are used.
        embeddings: `[batch, texts, dim]`.
        scores: of pairs, `[batch]`.

    Raises:
        ConfigError: the objective does not fit the number of texts.
    """
    first, second, *more = embeddings.unbind(1)
    objective = settings.objective
    if objective == AUTO:
        objective = IN_BATCH if scores is None else COSENT
    if objective == IN_BATCH:
        return losses.in_batch(first, torch.cat([second, *more]), scale=settings.scale)
    if objective == TRIPLET:
        if len(more) != 1:
            raise ConfigError(
                f"objective: {TRIPLET} needs one negative for each anchor, and there are {len(more)}. Set it to "
                f"{IN_BATCH}, which takes any number."
            )
        return losses.triplet(first, second, more[0], margin=settings.margin)
    assert scores is not None
    if objective == COSINE:
        return losses.cosine(first, second, scores.to(first.device))
    return losses.cosent(first, second, scores.to(first.device), scale=settings.scale)


def embedding(base: Base, settings: Settings) -> EmbeddingBase:
    """A base with the losses of embeddings.

    Args:
        base: of a model without a head.
        settings: of the run; the pooling is known.
    """
    own = {each.name: getattr(base, each.name) for each in fields(Base)}
    return EmbeddingBase(**own, settings=settings, pooling=Pooling(settings.pooling, settings.normalize))


def with_pooling(settings: Settings, folders: Mapping[str, Path]) -> Settings:
    """The settings with the pooling of adapters; or else that of the model's folder, or the usual one of its kind.

    Args:
        settings: of a run or a command.
        folders: PEFT folders by name.

    Raises:
        ConfigError: the adapters differ, or the settings say something else than they.
        FormatError: a folder's files cannot be read.
    """
    known = {found: name for name, folder in folders.items() if (found := read_pooling(folder)) is not None}
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise ConfigError(f"{first} has the {_words(one)}, {second} the {_words(other)}. Give adapters of one pooling.")
    for found, name in known.items():
        if settings.pooling not in (AUTO, found.tokens):
            raise ConfigError(f"pooling: {name} was trained with {found.tokens}, not {settings.pooling}. Leave it out.")
        if found.normalize and not settings.normalize:
            raise ConfigError(f"normalize: the embeddings of {name} have the length 1. Leave it out.")
        return _pooled(settings, found)
    if settings.model is None:
        raise ConfigError("task: the demo's base embeds no texts. Give another with --model.")
    if settings.pooling == AUTO and (own := read_pooling(settings.model)) is not None:
        return _pooled(settings, own)
    names = map(str, load_config(settings.model).architectures or ())
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    tokens = settings.pooling if settings.pooling != AUTO else LAST if causal else MEAN
    return _pooled(settings, Pooling(tokens, settings.normalize))


def _pooled(settings: Settings, pooling: Pooling) -> Settings:
    return replace(settings, pooling=pooling.tokens, normalize=pooling.normalize)


def _words(pooling: Pooling) -> str:
    return f"pooling {pooling.tokens}, {'' if pooling.normalize else 'not '}normalised"


def _normal(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings, dim=-1)
